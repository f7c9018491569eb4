// A model's folder on a web server: config.json, index, headers and the small files of known names are fetched, tensors are not.
// Servers do not list folders, so that other files of other names are not seen.
import { rmSync } from 'node:fs'
import { mkdir, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { ViaductError } from '../../base/errors.js'
import { ioError, removeStale, temporaryName } from '../atomic.js'
import { headerLength, parseHeader } from '../safetensorsHeader.js'
import { indexFile, joinFiles, readIndex, singleFile, type WeightFile, type WeightFolder } from '../weightFolder.js'
import { HttpClient, type HttpOptions, httpFault } from './httpClient.js'
import { RemoteBytes } from './remoteBytes.js'
import { RemoteFile } from './remoteFile.js'

/** Files beside the weights that a model may have. */
const knownFiles = [
  'config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'vocab.txt',
  'tokenizer.model',
  'chat_template.jinja',
  'chat_template.json',
  'preprocessor_config.json',
  'processor_config.json',
  'README.md',
  'LICENSE',
  'LICENSE.txt',
  'NOTICE',
  'USE_POLICY.md',
]
const mostSmallBytes = 64 << 20

export interface RemoteOptions extends Omit<HttpOptions, 'token' | 'origin'> {
  /** Most bytes of tensors held on disk. Default 128 MiB. */
  readonly spoolBytes?: number
}

/** True for an http or https address. */
export function isAddress(path: string): boolean {
  return /^https?:\/\//i.test(path)
}

/**
 * Opens a folder by its address. Its small files lie in `folder`, which is removed when the process ends; its tensors have
 * addresses as paths and are read through `remote`.
 * @throws ERR_USAGE for an address that is no folder's; ERR_FILE_MISSING; ERR_HTTP; ERR_NETWORK; ERR_INDEX; the errors of
 *   parseHeader; ERR_PATH_ESCAPE
 */
export async function openRemoteFolder(address: string, options: RemoteOptions = {}): Promise<WeightFolder> {
  const base = URL.canParse(address) ? new URL(address.endsWith('/') ? address : `${address}/`) : null
  if (base === null || base.username !== '' || base.password !== '' || base.search !== '' || base.hash !== '')
    throw new ViaductError(
      'ERR_USAGE',
      'http',
      'expected the address of a folder, without user, password, query and fragment',
    )
  const folder = await temporaryFolder()
  try {
    return await openInto(folder, base, options)
  } catch (error) {
    remove(folder)
    throw error
  }
}

async function openInto(folder: string, base: URL, options: RemoteOptions): Promise<WeightFolder> {
  const client = new HttpClient(options)
  const at = (name: string) => new URL(name.split('/').map(encodeURIComponent).join('/'), base).href
  const [small, spool] = [join(folder, 'files'), join(folder, 'spool')] as [string, string]
  for (const path of [small, spool])
    await mkdir(path).catch((cause: unknown) => {
      throw ioError(cause, `cannot make ${path}`)
    })
  const fetchSmall = async (name: string, most: number): Promise<boolean> => {
    const bytes = await client.retry(`all of ${at(name)}`, async () => {
      const answer = await client.open(at(name))
      if (answer.status === 200) return client.body(answer, most)
      answer.cancel()
      // Stores that do not tell what is there answer 403.
      if (answer.status === 404 || answer.status === 410 || answer.status === 403) return null
      throw httpFault(`expected ${at(name)}, got status ${answer.status}`, { status: answer.status })
    })
    if (bytes !== null) await writeFile(join(small, name), bytes)
    return bytes !== null
  }
  for (const name of knownFiles) {
    if (!(await fetchSmall(name, mostSmallBytes)) && name === 'config.json')
      throw new ViaductError('ERR_FILE_MISSING', 'http', `expected config.json at ${base.href}, found none`, {
        address: base.href,
        file: name,
      })
  }
  const map = (await fetchSmall(indexFile, mostSmallBytes)) ? await readIndex(small, indexFile) : null
  const names = map ? [...new Set(map.values())].sort() : [singleFile]
  const remotes = new Map<string, RemoteFile>()
  const files: WeightFile[] = []
  for (const name of names) {
    const opened = await RemoteFile.open(client, at(name))
    if (opened === null)
      throw new ViaductError('ERR_FILE_MISSING', 'http', `expected ${name} at ${base.href}, found none`, {
        address: base.href,
        file: name,
      })
    remotes.set(at(name), opened.file)
    files.push(await weightFile(opened.file, opened.first, name))
  }
  const weights = joinFiles(small, files, map === null ? null : { name: indexFile, map })
  return { ...weights, remote: new RemoteBytes(remotes, spool, options.spoolBytes ?? 128 << 20) }
}

async function weightFile(remote: RemoteFile, first: Buffer, name: string): Promise<WeightFile> {
  const length = 8 + headerLength(first.subarray(0, 8), remote.size, name)
  const bytes = Buffer.alloc(length)
  first.copy(bytes)
  if (length > first.length) await remote.read(first.length, length, async (chunk, offset) => bytes.set(chunk, offset))
  const header = parseHeader(bytes, remote.size, name)
  return { name, path: remote.address, header, entries: header.entries }
}

const folders = new Set<string>()
const remove = (folder: string) => rmSync(folder, { recursive: true, force: true })

async function temporaryFolder(): Promise<string> {
  await removeStale(tmpdir())
  const folder = temporaryName(join(tmpdir(), 'viaduct-http'))
  await mkdir(folder).catch((cause: unknown) => {
    throw ioError(cause, `cannot make ${folder}`)
  })
  if (folders.size === 0) process.once('exit', () => folders.forEach(remove))
  folders.add(folder)
  return folder
}

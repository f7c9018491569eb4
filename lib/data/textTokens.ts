// Text files to one stream of tokens: files found in sorted order, shuffled by seed, each ended by the end token. The shuffle
// makes the held-out part (the end of the stream) a sample of all files.
import { readdir, readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { ViaductError } from '../base/errors.js'
import { permuted } from './sampleOrder.js'
import { MemoryTokens } from './tokenDataset.js'
import type { Tokenizer } from './tokenizer.js'

/** A file's text and where it came from. */
export interface TextDocument {
  readonly path: string
  readonly text: string
}

/**
 * Reads text files; folders are walked. Hidden entries, node_modules and files with zero bytes or broken UTF-8 are left out.
 * @throws ERR_DATA when a path does not exist or nothing is found.
 */
export async function readTexts(paths: string | readonly string[]): Promise<TextDocument[]> {
  const documents: TextDocument[] = []
  const decoder = new TextDecoder('utf-8', { fatal: true })
  const visit = async (path: string, named: boolean): Promise<void> => {
    let info: Awaited<ReturnType<typeof stat>>
    try {
      info = await stat(path)
    } catch (cause) {
      if (!named) return
      throw new ViaductError(
        'ERR_DATA',
        'dataset',
        `expected a text file or folder, found nothing at ${path}`,
        { path },
        { cause },
      )
    }
    if (info.isDirectory()) {
      for (const name of (await readdir(path)).sort()) {
        if (!name.startsWith('.') && name !== 'node_modules') await visit(join(path, name), false)
      }
      return
    }
    if (!info.isFile()) return
    const bytes = await readFile(path)
    if (bytes.length === 0 || bytes.includes(0)) return
    try {
      documents.push({ path, text: decoder.decode(bytes) })
    } catch {
      if (named) throw new ViaductError('ERR_DATA', 'dataset', `expected UTF-8 text in ${path}`, { path })
    }
  }
  const list = typeof paths === 'string' ? [paths] : paths
  for (const path of list) await visit(path, true)
  if (documents.length === 0)
    throw new ViaductError('ERR_DATA', 'dataset', `expected text in ${list.join(', ')}, found none`)
  return documents
}

/** One stream of all documents, shuffled by `seed`, with the tokenizer's first end token behind each. */
export async function tokenizeTexts(
  documents: readonly TextDocument[],
  tokenizer: Tokenizer,
  seed: number,
): Promise<MemoryTokens> {
  const parts: number[][] = []
  for (let i = 0; i < documents.length; i++) {
    const document = documents[permuted(i, documents.length, seed, 0)] as TextDocument
    const ids = await tokenizer.encode(document.text, { addSpecialTokens: false })
    const end = tokenizer.eosIds[0]
    if (end !== undefined) ids.push(end)
    parts.push(ids)
  }
  const tokens = new Int32Array(parts.reduce((n, ids) => n + ids.length, 0))
  let at = 0
  for (const ids of parts) {
    tokens.set(ids, at)
    at += ids.length
  }
  return new MemoryTokens(tokens)
}

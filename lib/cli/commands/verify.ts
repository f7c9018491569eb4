// `viaduct verify`: a table for people, the certificate for programs, exit code 1 on any difference.
import { realpath } from 'node:fs/promises'
import { basename, dirname, resolve, sep } from 'node:path'
import { ViaductError } from '../../base/errors.js'
import { AutoBridge } from '../../bridge/autoBridge.js'
import type { Verification } from '../../bridge/proof/certificate.js'
import { verify } from '../../bridge/proof/verify.js'
import { withWorldRanks } from '../../bridge/worldRanks.js'
import { writeFileAtomic } from '../../io/atomic.js'
import { isFolder } from '../../io/paths.js'
import { runs } from '../../models/registry.js'
import { describeParallel, runProblems } from '../../parallel/config.js'
import { chosenLayout, type LayoutFlags } from '../layout.js'
import { compareLayouts, type LogitsComparison, logitsTolerance, mostWeightBytes } from '../layoutLogits.js'
import { isFirstRank, launchedRanks } from '../ranks.js'
import { byteProgress, formatBytes, print, say, styled, table } from '../terminal.js'

interface Flags extends LayoutFlags {
  ckpt?: string
  certificate?: string | false
  ignore?: string[]
  allowMissing?: string[]
  revision?: string
  logits?: boolean
  json?: boolean
}

/** Rows of a table that is too long to be read are told by their number. */
const mostRows = 40

function show(result: Verification, logits: LogitsComparison): void {
  const differing = result.tensors.filter((t) => t.differingBytes > 0)
  const shown = differing.length > 0 ? differing : result.tensors
  const rows = shown
    .slice(0, mostRows)
    .map((t) => [t.name, t.dtype, `[${t.shape}]`, formatBytes(t.bytes), t.differingBytes, t.sha256Before.slice(0, 12)])
  print(table(['tensor', 'dtype', 'shape', 'size', 'differing bytes', 'sha256'], rows))
  if (shown.length > mostRows) print(`... and ${shown.length - mostRows} more`)
  for (const problem of result.problems.slice(0, mostRows)) say(`${styled('red', 'differs')} ${problem}`)
  if (result.problems.length > mostRows)
    say(`... and ${result.problems.length - mostRows} more differences; all stand in the certificate`)
  const bytes = result.tensors.reduce((sum, t) => sum + t.bytes, 0)
  const words = result.ok ? styled('green', 'equal') : styled('red', 'not equal')
  const against = result.checkpoint ?? `${describeParallel(result.parallel)} and back`
  print(
    `${words}: ${result.tensors.length} tensors, ${formatBytes(bytes)}, ${result.differingBytes} differing bytes (${against})`,
  )
  if (result.partial)
    print(`partial: ${[...result.coverage.ignored, ...result.coverage.missing].join(', ')} passed by permission`)
  if ('skipped' in logits) return print(`logits: left out, ${logits.skipped}`)
  const size = `largest difference ${logits.difference.toExponential(1)} of the largest logit, at most ${logitsTolerance} may be`
  print(
    `logits ${logits.ok ? styled('green', 'agree') : styled('red', 'differ')}: 1 rank and ${logits.ranks}, [${logits.shape}], ${size}`,
  )
}

/** Whether and how logits are compared: between one rank and the layout's ranks. */
async function checkLogits(folder: string, flags: Flags, result: Verification): Promise<LogitsComparison> {
  const bytes = result.tensors.reduce((sum, t) => sum + t.bytes, 0)
  if (flags.logits === false) return { skipped: '--no-logits' }
  if (result.address !== null) return { skipped: 'the folder is not on this machine' }
  if (!result.ok) return { skipped: 'the tensors differ' }
  if (result.partial) return { skipped: 'the folder is partial' }
  if (launchedRanks() !== null) return { skipped: 'under a launcher; call it without one' }
  if (!runs(result.architecture))
    return { skipped: `${result.architecture} only converts, its forward pass is not built` }
  const [notBuilt] = runProblems(result.parallel)
  if (notBuilt !== undefined) return { skipped: notBuilt }
  if (chosenLayout(flags, null).worldSize === 1 && flags.ckpt === undefined)
    return { skipped: 'one rank on both sides; give a layout, e.g. --tp 2' }
  if (bytes > mostWeightBytes)
    return { skipped: `${formatBytes(bytes)} of weights are more than ${formatBytes(mostWeightBytes)}` }
  const { transformerConfig } = await AutoBridge.fromHfPretrained(folder)
  return compareLayouts(folder, flags.ckpt ?? folder, transformerConfig, flags)
}

/** What the certificate's default name is made of. */
function nameOf({ folder, hub, address }: Pick<Verification, 'folder' | 'hub' | 'address'>): string {
  if (hub !== null) return basename(hub.repo)
  return basename(address === null ? resolve(folder) : new URL(address).pathname)
}

/**
 * Where the certificate goes; null: nowhere.
 * @param folder - the model's, in which nothing is ever written.
 * @throws ERR_USAGE for a file in the model's folder.
 */
export async function certificateFile(folder: string, name: string, flag: string | false | undefined) {
  if (flag === false) return null
  const file = flag ?? `${name}.certificate.json`
  const [home, place] = [await realpath(folder), await realpath(dirname(resolve(file))).catch(() => '')]
  if (place !== home && !place.startsWith(home + sep)) return file
  if (flag === undefined) return null
  throw new ViaductError(
    'ERR_USAGE',
    'verify',
    `expected --certificate outside of the model's folder, got ${file}: nothing is written there`,
  )
}

export async function verifyCommand(path: string, flags: Flags): Promise<void> {
  // Bytes: one process simulates every rank of the layout, the same plans cut the shards and join them. Logits: real ranks.
  const { parallel, worldSize } = chosenLayout(flags, null)
  if (flags.certificate && (await isFolder(path))) await certificateFile(path, '', flags.certificate)
  const download = byteProgress('downloading')
  const bar = byteProgress('verifying')
  const result = await withWorldRanks((ranks) =>
    verify(path, {
      ...parallel,
      worldSize,
      ranks,
      ...(flags.revision === undefined ? {} : { revision: flags.revision }),
      ...(isFirstRank() ? { onProgress: bar.onProgress, onDownload: download.onProgress } : {}),
      ...(flags.ckpt === undefined ? {} : { ckpt: flags.ckpt }),
      ...(flags.ignore === undefined ? {} : { ignore: flags.ignore }),
      ...(flags.allowMissing === undefined ? {} : { allowMissing: flags.allowMissing }),
    }),
  ).finally(() => {
    download.stop()
    bar.stop()
  })
  const logits = await checkLogits(result.folder, flags, result)
  const ok = result.ok && ('skipped' in logits || logits.ok)
  if (!ok) process.exitCode = 1
  if (!isFirstRank()) return
  const certificate = { ...result, ok, logits }
  const file = await certificateFile(result.folder, nameOf(result), flags.certificate)
  if (file !== null) await writeFileAtomic(file, `${JSON.stringify(certificate, null, 2)}\n`)
  if (flags.json) return print(JSON.stringify({ ...certificate, certificate: file }))
  show(result, logits)
  print(file === null ? 'certificate: none written' : `certificate: ${file}`)
}

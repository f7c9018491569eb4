// `viaduct import` and `viaduct export`.
import { availableParallelism } from 'node:os'
import type { DType } from '../../base/dtype.js'
import { ViaductError } from '../../base/errors.js'
import { AutoBridge } from '../../bridge/autoBridge.js'
import { openHfModel } from '../../bridge/hfModel.js'
import type { ConversionOptions } from '../../bridge/offline/conversion.js'
import type { ConversionReport } from '../../bridge/offline/convert.js'
import { isCheckpoint } from '../../checkpoint/checkpointIndex.js'
import { isAddress } from '../../io/hub/remoteFolder.js'
import type { TransformerConfig } from '../../models/transformerConfig.js'
import { interruptible } from '../interrupt.js'
import { checkLayout, chosenLayout, type LayoutFlags } from '../layout.js'
import { fetchModel } from '../modelSource.js'
import { isFirstRank, launchedRanks, onRanks } from '../ranks.js'
import { byteProgress, formatBytes, formatSeconds, print, say, styled } from '../terminal.js'

interface ConversionFlags {
  dtype?: DType
  sha256?: boolean
  resume?: boolean
  nprocPerNode?: number
  overwrite?: boolean
  json?: boolean
}

interface ImportFlags extends LayoutFlags, ConversionFlags {
  ignore?: string[]
  allowMissing?: string[]
  revision?: string
}

interface ExportFlags extends ConversionFlags {
  maxShardSize?: string
  reference?: string
}

/** `5GB`, `500MB`, `5000000000`: decimal units, as in Transformers. */
export function parseBytes(text: string): number {
  const match = /^\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*$/i.exec(text)
  const power = ['', 'K', 'M', 'G', 'T'].indexOf((match?.[2] ?? '').toUpperCase().replace('B', ''))
  const bytes = match === null ? Number.NaN : Math.floor(Number(match[1]) * 1000 ** power)
  if (bytes >= 1) return bytes
  throw new ViaductError(
    'ERR_USAGE',
    'export',
    `expected --max-shard-size like 5GB or 500MB, got ${JSON.stringify(text)}`,
  )
}

function report(what: string, result: ConversionReport, json: boolean | undefined): void {
  const { folder, tensors, bytes, seconds, parts, resumedParts, coverage, leftOut } = result
  if (json) {
    const { bytesRead, bytesWritten } = result
    print(
      JSON.stringify({
        folder,
        tensors,
        bytes,
        bytesRead,
        bytesWritten,
        seconds,
        parts,
        resumedParts,
        partial: coverage.partial,
        ignored: coverage.ignored,
        missing: coverage.missing,
        leftOut,
      }),
    )
    return
  }
  const resumed = resumedParts > 0 ? `, ${resumedParts} of ${parts} parts were finished before` : ''
  say(`${styled('green', what)} ${tensors} tensors, ${formatBytes(bytes)} in ${formatSeconds(seconds)}${resumed}`)
  for (const name of coverage.ignored) say(`  ignored  ${name}`)
  for (const name of coverage.missing) say(`  missing  ${name}: initial values`)
  for (const name of leftOut) say(`  left out ${name}: not carried, exports write safetensors`)
  print(folder)
}

/** Runs a conversion in one process or several, with a bar; a signal ends it so that it can be gone on with. */
async function runConversion(
  words: { readonly doing: string; readonly done: string },
  flags: ConversionFlags,
  work: (options: ConversionOptions) => Promise<ConversionReport>,
  check?: () => Promise<readonly string[]>,
): Promise<void> {
  const inProcess = async (signal: AbortSignal) => {
    const bar = byteProgress(words.doing)
    const result = await work({
      signal,
      resume: flags.resume ?? true,
      sha256: flags.sha256 ?? false,
      ...(isFirstRank() ? { onProgress: bar.onProgress, onNotice: (line) => say(`  ${line}`) } : {}),
    }).finally(bar.stop)
    if (isFirstRank()) report(words.done, result, flags.json)
  }
  await onRanks(flags.nprocPerNode ?? 1, () => interruptible(inProcess), check === undefined ? {} : { check })
}

/** The model of a source as its description says, with the leave that the flags give for what is missing. */
async function describedModel(folder: string, { ignore, allowMissing }: ImportFlags): Promise<TransformerConfig> {
  if (!isAddress(folder) && (await isCheckpoint(folder)))
    return (await AutoBridge.fromCheckpoint(folder)).transformerConfig
  const policy = { ...(ignore && { ignore }), ...(allowMissing && { allowMissing }) }
  return (await openHfModel(folder, policy)).config
}

/** Local processes for the ranks of a layout: one each, up to here; more ranks than this are shared out among as many. */
const mostProcesses = Math.max(8, availableParallelism())

export async function importCommand(source: string, ckpt: string, given: ImportFlags): Promise<void> {
  const launched = launchedRanks()
  const layout = chosenLayout(given, given.nprocPerNode === undefined ? launched : null)
  const { parallel, worldSize } = layout
  const processes = given.nprocPerNode ?? (launched === null ? Math.min(worldSize, mostProcesses) : launched)
  const flags = { ...given, nprocPerNode: processes }
  const work = (options: ConversionOptions) => {
    const download = byteProgress('downloading')
    return AutoBridge.importCkpt(source, ckpt, {
      ...options,
      ...parallel,
      worldSize,
      overwrite: flags.overwrite ?? false,
      ...(flags.revision === undefined ? {} : { revision: flags.revision }),
      ...(isFirstRank() ? { onDownload: download.onProgress } : {}),
      ...(flags.dtype === undefined ? {} : { dtype: flags.dtype }),
      ...(flags.ignore === undefined ? {} : { ignore: flags.ignore }),
      ...(flags.allowMissing === undefined ? {} : { allowMissing: flags.allowMissing }),
    }).finally(download.stop)
  }
  const pin = async () => {
    const fetched = await fetchModel(source, flags)
    checkLayout(layout, await describedModel(fetched.folder, given), false)
    return [...fetched.pin, ...(processes < worldSize ? ['--nproc-per-node', String(processes)] : [])]
  }
  await runConversion({ doing: 'importing', done: 'imported' }, flags, work, processes > 1 ? pin : undefined)
}

export async function exportCommand(ckpt: string, hf: string, flags: ExportFlags): Promise<void> {
  const rebuilt = flags.reference === undefined ? null : await AutoBridge.fromAutoConfig(ckpt, flags.reference)
  await runConversion({ doing: 'exporting', done: 'exported' }, flags, (options) =>
    (rebuilt ?? AutoBridge).exportCkpt(ckpt, hf, {
      ...options,
      overwrite: flags.overwrite ?? false,
      ...(flags.dtype === undefined ? {} : { weightDtype: flags.dtype }),
      ...(flags.maxShardSize === undefined ? {} : { maxShardBytes: parseBytes(flags.maxShardSize) }),
    }),
  )
}

// `viaduct import` and `viaduct export`.
import type { DType } from '../../base/dtype.js'
import { ViaductError } from '../../base/errors.js'
import { AutoBridge } from '../../bridge/autoBridge.js'
import type { ConversionReport } from '../../bridge/convert.js'
import { interruptible } from '../interrupt.js'
import { type LayoutFlags, parallelFromFlags, worldSizeOf } from '../layout.js'
import { fetchModel } from '../modelSource.js'
import { isFirstRank, launchedRanks, onRanks } from '../ranks.js'
import { byteProgress, formatBytes, formatSeconds, print, say, styled } from '../terminal.js'

interface ImportFlags extends LayoutFlags {
  dtype?: DType
  ignore?: string[]
  allowMissing?: string[]
  revision?: string
  overwrite?: boolean
  json?: boolean
}

interface ExportFlags {
  dtype?: DType
  maxShardSize?: string
  overwrite?: boolean
  json?: boolean
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

function report(what: string, result: ConversionReport, started: number, json: boolean | undefined): void {
  const seconds = (performance.now() - started) / 1000
  if (json) {
    const { folder, tensors, bytes, coverage, leftOut } = result
    print(
      JSON.stringify({
        folder,
        tensors,
        bytes,
        seconds,
        partial: coverage.partial,
        ignored: coverage.ignored,
        missing: coverage.missing,
        leftOut,
      }),
    )
    return
  }
  say(`${styled('green', what)} ${result.tensors} tensors, ${formatBytes(result.bytes)} in ${formatSeconds(seconds)}`)
  for (const name of result.coverage.ignored) say(`  ignored  ${name}`)
  for (const name of result.coverage.missing) say(`  missing  ${name}: initial values`)
  for (const name of result.leftOut) say(`  left out ${name}: not carried, exports write safetensors`)
  print(result.folder)
}

export async function importCommand(hf: string, ckpt: string, flags: ImportFlags): Promise<void> {
  const parallel = parallelFromFlags(flags)
  const started = performance.now()
  const policy = {
    ...(flags.ignore === undefined ? {} : { ignore: flags.ignore }),
    ...(flags.allowMissing === undefined ? {} : { allowMissing: flags.allowMissing }),
  }
  const work = async (signal: AbortSignal) => {
    const download = byteProgress('downloading')
    const bar = byteProgress('importing')
    const result = await AutoBridge.importCkpt(hf, ckpt, {
      ...parallel,
      overwrite: flags.overwrite ?? false,
      signal,
      ...(flags.revision === undefined ? {} : { revision: flags.revision }),
      ...(isFirstRank() ? { onProgress: bar.onProgress, onDownload: download.onProgress } : {}),
      ...(flags.dtype === undefined ? {} : { dtype: flags.dtype }),
      ...policy,
    }).finally(() => {
      download.stop()
      bar.stop()
    })
    if (isFirstRank()) report('imported', result, started, flags.json)
  }
  const world = worldSizeOf(flags, launchedRanks())
  await onRanks(
    flags,
    () => interruptible(work),
    async () => {
      const { folder, pin } = await fetchModel(hf, flags)
      const bridge = await AutoBridge.fromHfPretrained(folder, policy)
      bridge.checkLayout(parallel, world)
      return pin
    },
  )
}

export async function exportCommand(ckpt: string, hf: string, flags: ExportFlags): Promise<void> {
  const started = performance.now()
  await interruptible(async (signal) => {
    const bar = byteProgress('exporting')
    const result = await AutoBridge.exportCkpt(ckpt, hf, {
      overwrite: flags.overwrite ?? false,
      signal,
      ...(isFirstRank() ? { onProgress: bar.onProgress } : {}),
      ...(flags.dtype === undefined ? {} : { weightDtype: flags.dtype }),
      ...(flags.maxShardSize === undefined ? {} : { maxShardBytes: parseBytes(flags.maxShardSize) }),
    }).finally(bar.stop)
    if (isFirstRank()) report('exported', result, started, flags.json)
  })
}

// `viaduct toy`.
import { makeToy } from '../../bridge/toy.js'
import { byteProgress, formatBytes, print, say, styled } from '../terminal.js'
import { parseBytes } from './convert.js'

interface Flags {
  layers: number
  maxShardSize?: string
  revision?: string
  overwrite?: boolean
  json?: boolean
}

export async function toyCommand(hf: string, out: string, flags: Flags): Promise<void> {
  const download = byteProgress('downloading')
  const report = await makeToy(hf, out, {
    layers: flags.layers,
    overwrite: flags.overwrite ?? false,
    onDownload: download.onProgress,
    ...(flags.revision === undefined ? {} : { revision: flags.revision }),
    ...(flags.maxShardSize === undefined ? {} : { maxShardBytes: parseBytes(flags.maxShardSize) }),
  }).finally(download.stop)
  if (flags.json) return print(JSON.stringify(report))
  say(
    `${styled('green', 'made')} ${report.layers} layers, ${report.tensors} tensors, ${formatBytes(report.bytes)} in ${report.files.length} ${report.files.length === 1 ? 'file' : 'files'}`,
  )
  print(report.folder)
}

// `viaduct verify`: a table for people, the certificate for programs, exit code 1 on any difference.
import { type Verification, verify } from '../../bridge/verify.js'
import { withWorldRanks } from '../../bridge/worldRanks.js'
import { writeFileAtomic } from '../../io/atomic.js'
import { type LayoutFlags, parallelFromFlags } from '../layout.js'
import { isFirstRank } from '../ranks.js'
import { formatBytes, print, say, styled, table } from '../terminal.js'

interface Flags extends LayoutFlags {
  ckpt?: string
  certificate?: string
  ignore?: string[]
  allowMissing?: string[]
  json?: boolean
}

/** Rows of a table that is too long to be read are told by their number. */
const mostRows = 40

function show(result: Verification): void {
  const differing = result.tensors.filter((t) => t.differingBytes > 0)
  const shown = differing.length > 0 ? differing : result.tensors
  const rows = shown.slice(0, mostRows).map((t) => [t.name, t.dtype, `[${t.shape}]`, formatBytes(t.bytes), t.differingBytes, t.sha256Before.slice(0, 12)])
  print(table(['tensor', 'dtype', 'shape', 'size', 'differing bytes', 'sha256'], rows))
  if (shown.length > mostRows) print(`... and ${shown.length - mostRows} more`)
  for (const problem of result.problems) say(`${styled('red', 'differs')} ${problem}`)
  const bytes = result.tensors.reduce((sum, t) => sum + t.bytes, 0)
  const words = result.ok ? styled('green', 'equal') : styled('red', 'not equal')
  const against = result.checkpoint ?? `tp ${result.tensorModelParallelSize} and back`
  print(`${words}: ${result.tensors.length} tensors, ${formatBytes(bytes)}, ${result.differingBytes} differing bytes (${against})`)
  if (result.partial) print(`partial: ${[...result.coverage.ignored, ...result.coverage.missing].join(', ')} passed by permission`)
}

export async function verifyCommand(folder: string, flags: Flags): Promise<void> {
  // One process simulates every rank of the layout: the same plans cut the shards and join them.
  const parallel = parallelFromFlags(flags)
  const result = await withWorldRanks((ranks) =>
    verify(folder, {
      tensorModelParallelSize: parallel.tensorModelParallelSize,
      ranks,
      ...(flags.ckpt === undefined ? {} : { ckpt: flags.ckpt }),
      ...(flags.ignore === undefined ? {} : { ignore: flags.ignore }),
      ...(flags.allowMissing === undefined ? {} : { allowMissing: flags.allowMissing }),
    }),
  )
  if (!result.ok) process.exitCode = 1
  if (!isFirstRank()) return
  if (flags.certificate !== undefined) await writeFileAtomic(flags.certificate, `${JSON.stringify(result, null, 2)}\n`)
  if (flags.json) print(JSON.stringify(result))
  else show(result)
}

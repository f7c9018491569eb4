// `viaduct logits`.
import type { DType } from '../../base/dtype.js'
import { AutoBridge } from '../../bridge/autoBridge.js'
import { computeLogits } from '../../inference/logits.js'
import type { DeviceKind } from '../../tensor/device.js'
import { type LayoutFlags, runnableFromFlags } from '../layout.js'
import { fetchModel } from '../modelSource.js'
import { isFirstRank, onRanks } from '../ranks.js'
import { print, say } from '../terminal.js'

interface Flags extends LayoutFlags {
  input: string
  output: string
  grads?: boolean
  dtype?: DType
  revision?: string
  device: DeviceKind
  json?: boolean
}

export async function logitsCommand(path: string, flags: Flags): Promise<void> {
  const parallel = runnableFromFlags(flags)
  await onRanks(
    flags,
    async () => {
      const { folder } = await fetchModel(path, flags)
      const report = await computeLogits(folder, flags.input, flags.output, {
        parallel,
        grads: flags.grads ?? false,
        device: flags.device,
        ...(flags.dtype === undefined ? {} : { dtype: flags.dtype }),
      })
      if (!isFirstRank()) return
      if (flags.json) return print(JSON.stringify({ output: flags.output, ...report }))
      say(
        `logits [${report.shape}], loss ${report.loss.toFixed(6)}${flags.grads ? `, ${report.gradients} gradients` : ''}`,
      )
      print(flags.output)
    },
    async () => {
      const { folder, pin } = await fetchModel(path, flags)
      const bridge = await AutoBridge.open(folder)
      bridge.checkLayout(parallel)
      return pin
    },
  )
}

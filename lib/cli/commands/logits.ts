// `viaduct logits`.
import type { DType } from '../../base/dtype.js'
import { AutoBridge } from '../../bridge/autoBridge.js'
import { computeLogits } from '../../inference/logits.js'
import type { DeviceKind } from '../../tensor/device.js'
import { checkLayout, chosenLayout, type LayoutFlags } from '../layout.js'
import { fetchModel } from '../modelSource.js'
import { isFirstRank, launchedRanks, onRanks } from '../ranks.js'
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
  const layout = chosenLayout(flags, launchedRanks())
  await onRanks(
    layout.worldSize,
    async () => {
      const { folder } = await fetchModel(path, flags)
      const report = await computeLogits(folder, flags.input, flags.output, {
        parallel: layout.parallel,
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
    {
      check: async () => {
        const { folder, pin } = await fetchModel(path, flags)
        checkLayout(layout, (await AutoBridge.open(folder)).transformerConfig, true)
        return pin
      },
    },
  )
}

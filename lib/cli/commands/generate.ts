// `viaduct generate`: streams the text to stdout, or everything as JSON.

import { join } from 'node:path'
import type { DType } from '../../base/dtype.js'
import { ViaductError } from '../../base/errors.js'
import { AutoBridge } from '../../bridge/autoBridge.js'
import { isCheckpoint, resolveCheckpoint } from '../../checkpoint/checkpointIndex.js'
import { Tokenizer } from '../../data/tokenizer.js'
import { generateText } from '../../inference/generateText.js'
import { openModel } from '../../inference/logits.js'
import type { DeviceKind } from '../../tensor/device.js'
import { checkLayout, chosenLayout, type LayoutFlags } from '../layout.js'
import { fetchModel } from '../modelSource.js'
import { isFirstRank, launchedRanks, onRanks } from '../ranks.js'
import { print, say } from '../terminal.js'

interface Flags extends LayoutFlags {
  prompt: string
  maxNewTokens: number
  temperature: number
  topK?: number
  topP?: number
  seed: number
  ignoreEos?: boolean
  dtype?: DType
  revision?: string
  device: DeviceKind
  json?: boolean
}

/** The folder with tokenizer.json: the model's own, or what a checkpoint keeps of it. */
async function tokenizerFolder(dir: string): Promise<string> {
  return (await isCheckpoint(dir)) ? join(await resolveCheckpoint(dir), 'hf') : dir
}

export async function generateCommand(path: string, flags: Flags): Promise<void> {
  const layout = chosenLayout(flags, launchedRanks())
  if (!(flags.temperature >= 0))
    throw new ViaductError('ERR_USAGE', 'generate', `expected --temperature of 0 or more, got ${flags.temperature}`)
  await onRanks(
    layout.worldSize,
    async () => {
      const { folder } = await fetchModel(path, flags)
      const { bridge, model } = await openModel(folder, {
        parallel: layout.parallel,
        device: flags.device,
        ...(flags.dtype === undefined ? {} : { dtype: flags.dtype }),
      })
      try {
        const tokenizer = await Tokenizer.fromFolder(await tokenizerFolder(bridge.hf?.folder ?? folder))
        const stream = isFirstRank() && !flags.json
        if (stream) process.stdout.write(flags.prompt)
        const tokens: number[] = []
        let text = ''
        const started = performance.now()
        const options = {
          maxNewTokens: flags.maxNewTokens,
          temperature: flags.temperature,
          seed: flags.seed,
          ...(flags.topK === undefined ? {} : { topK: flags.topK }),
          ...(flags.topP === undefined ? {} : { topP: flags.topP }),
          ...(flags.ignoreEos ? { eosIds: [] } : {}),
        }
        for await (const piece of generateText(model, tokenizer, flags.prompt, options)) {
          tokens.push(...piece.tokens)
          text += piece.text
          if (stream) process.stdout.write(piece.text)
        }
        if (!isFirstRank()) return
        const seconds = (performance.now() - started) / 1000
        if (flags.json) return print(JSON.stringify({ prompt: flags.prompt, text, tokens, seconds }))
        print()
        say(`${tokens.length} tokens, ${(tokens.length / seconds).toFixed(1)} tokens/s`)
      } finally {
        await model.dispose()
      }
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

// A small float32 Llama with a tokenizer: weights of a size at which nothing overflows, so that it can generate and train.
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { tokenizerConfigJson, tokenizerJson, trainBpe } from '../../lib/data/bpeTrainer.js'
import { type FolderOptions, llamaTensors, writeLlama } from '../hostile/llamaFolder.js'

const vocabulary = 260

/** Writes the folder; `seed` decides the weights. */
export function writeWords(folder: string, seed = 7): string {
  let state = seed
  const random = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state / 2 ** 32 - 0.5
  }
  const options: FolderOptions = { vocab: vocabulary, dtype: 'float32', config: { eos_token_id: 0 } }
  const bytes: Record<string, Uint8Array> = {}
  for (const { name, shape } of llamaTensors(options)) {
    const length = shape.reduce((n, d) => n * d, 1)
    bytes[name] = new Uint8Array(Float32Array.from({ length }, () => (name.includes('norm') ? 1 : random())).buffer)
  }
  writeLlama(folder, { ...options, bytes })
  const bpe = trainBpe(['the cat sat on the mat, the rat sat on the cat'], vocabulary)
  writeFileSync(join(folder, 'tokenizer.json'), tokenizerJson(bpe))
  writeFileSync(join(folder, 'tokenizer_config.json'), tokenizerConfigJson(bpe, 128))
  return folder
}

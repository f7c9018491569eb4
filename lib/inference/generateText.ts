// Text in, text out, piece by piece: the tokenizer around `generateSteps`. A piece ends where its bytes are whole characters.
import type { Tokenizer } from '../data/tokenizer.js'
import type { DistributedModel } from '../models/distributedModel.js'
import { type GenerateOptions, generateSteps } from './generate.js'

/** A piece of generated text. */
export interface TextPiece {
  readonly text: string
  /** New tokens since the last piece. */
  readonly tokens: readonly number[]
}

/**
 * Continues a text. The end-of-sequence ids of the tokenizer's folder stop it unless `options.eosIds` says otherwise.
 * @throws what generateSteps throws.
 */
export async function* generateText(
  model: DistributedModel,
  tokenizer: Tokenizer,
  prompt: string,
  options: GenerateOptions,
): AsyncGenerator<TextPiece, void> {
  const ids = await tokenizer.encode(prompt)
  const added: number[] = []
  let told = 0
  let shown = ''
  for await (const [token] of generateSteps(model, [ids], { eosIds: tokenizer.eosIds, ...options })) {
    if (token === null || token === undefined) continue
    added.push(token)
    const text = await tokenizer.decode(added)
    // U+FFFD at the end: the character's last bytes are still to come.
    if (text.endsWith('\uFFFD') && added.length < options.maxNewTokens) continue
    yield { text: text.slice(shown.length), tokens: added.slice(told) }
    shown = text
    told = added.length
  }
  if (told < added.length) {
    const text = await tokenizer.decode(added)
    yield { text: text.slice(shown.length), tokens: added.slice(told) }
  }
}

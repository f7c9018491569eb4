// Text to token ids and back: a folder's tokenizer.json through the Hugging Face tokenizers library. Nothing in the folder is
// executed. End-of-sequence ids come from generation_config.json, else config.json, else tokenizer_config.json.
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Tokenizer as NativeTokenizer } from 'tokenizers'
import { ViaductError } from '../base/errors.js'

export class Tokenizer {
  private constructor(
    readonly folder: string,
    readonly vocabSize: number,
    /** Ids that end a sequence; empty when the folder names none. */
    readonly eosIds: readonly number[],
    private readonly native: NativeTokenizer,
  ) {}

  /**
   * Reads tokenizer.json of a folder.
   * @throws ERR_TOKENIZER when the file is missing or broken.
   */
  static async fromFolder(folder: string): Promise<Tokenizer> {
    let text: string
    try {
      text = await readFile(join(folder, 'tokenizer.json'), 'utf8')
    } catch (cause) {
      throw new ViaductError(
        'ERR_TOKENIZER',
        'tokenizer',
        `expected tokenizer.json in ${folder}, found none that can be read: ${(cause as Error).message}`,
        { folder },
        { cause },
      )
    }
    let native: NativeTokenizer
    try {
      native = NativeTokenizer.fromString(text.replace(/^\uFEFF/, ''))
    } catch (cause) {
      throw new ViaductError(
        'ERR_TOKENIZER',
        'tokenizer',
        `tokenizer.json of ${folder}: ${(cause as Error).message}`,
        { folder },
        { cause },
      )
    }
    const ids = Object.values(native.getVocab(true))
    const vocabSize = ids.reduce((largest, id) => Math.max(largest, id), -1) + 1
    return new Tokenizer(folder, vocabSize, await endIds(folder, native), native)
  }

  /**
   * Token ids of a text.
   * @param addSpecialTokens - what the tokenizer puts around a sequence, e.g. a token for its beginning. Default true.
   */
  async encode(text: string, options: { addSpecialTokens?: boolean } = {}): Promise<number[]> {
    const encoding = await this.native.encode(text, null, { addSpecialTokens: options.addSpecialTokens ?? true })
    return encoding.getIds()
  }

  /** Text of token ids. @param skipSpecialTokens - leave special tokens out. Default true. */
  async decode(ids: readonly number[], options: { skipSpecialTokens?: boolean } = {}): Promise<string> {
    return await this.native.decode([...ids], options.skipSpecialTokens ?? true)
  }

  /** Id of a token by its text, or null. */
  tokenToId(token: string): number | null {
    return this.native.tokenToId(token)
  }
}

async function readJson(path: string): Promise<Record<string, unknown>> {
  let text: string
  try {
    text = await readFile(path, 'utf8')
  } catch {
    return {}
  }
  try {
    const value: unknown = JSON.parse(text)
    return typeof value === 'object' && value !== null ? (value as Record<string, unknown>) : {}
  } catch {
    // config.json may spell numbers in ways that JSON.parse refuses (NaN); the end token is then found elsewhere.
    return {}
  }
}

async function endIds(folder: string, native: NativeTokenizer): Promise<number[]> {
  for (const file of ['generation_config.json', 'config.json']) {
    const value = (await readJson(join(folder, file)))['eos_token_id']
    const ids = (Array.isArray(value) ? value : [value]).filter((id): id is number => Number.isInteger(id))
    if (ids.length > 0) return ids
  }
  const token = (await readJson(join(folder, 'tokenizer_config.json')))['eos_token']
  const content = typeof token === 'string' ? token : (token as { content?: unknown } | undefined)?.content
  const id = typeof content === 'string' ? native.tokenToId(content) : null
  return id === null ? [] : [id]
}

// Trains a small byte-level BPE vocabulary on given texts and writes it as tokenizer.json, in the format that the Hugging Face
// tokenizers library loads. Deterministic: the commonest pair first, ties by the smaller ids. For toys, tests and first runs.
import { ViaductError } from '../base/errors.js'

/** A byte-level BPE model. */
export interface BpeVocabulary {
  /** Token text (in the byte alphabet) to id. */
  readonly vocab: ReadonlyMap<string, number>
  /** Pairs in the order in which they are merged. */
  readonly merges: readonly (readonly [string, string])[]
  /** The end-of-text token, id 0. */
  readonly eosToken: string
}

/** How byte-level BPE cuts text into words: contractions, letters, digits, others, each with at most one leading space. */
const wordPattern = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu

/** A printable character for each byte: itself where printable in Latin-1, else one from U+0100 on. */
export function byteAlphabet(): string[] {
  const printable = (b: number) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255)
  let next = 256
  return Array.from({ length: 256 }, (_, b) => String.fromCodePoint(printable(b) ? b : next++))
}

interface Word {
  ids: number[]
  readonly count: number
}

/**
 * Learns `vocabSize` tokens: the end-of-text token, 256 bytes, and merges.
 * @throws ERR_TOKENIZER when vocabSize is below 257, or when the texts have too few different pairs.
 */
export function trainBpe(texts: Iterable<string>, vocabSize: number, eosToken = '<|endoftext|>'): BpeVocabulary {
  if (!Number.isInteger(vocabSize) || vocabSize < 257) {
    throw new ViaductError('ERR_TOKENIZER', 'trainBpe', `expected a vocabulary of at least 257, got ${vocabSize}`)
  }
  const alphabet = byteAlphabet()
  const names = [eosToken, ...alphabet]
  const words = countWords(texts)
  const pairs = new PairCounts()
  words.forEach((word, index) => {
    for (let i = 0; i + 1 < word.ids.length; i++)
      pairs.add(word.ids[i] as number, word.ids[i + 1] as number, word.count, index)
  })
  const merges: [string, string][] = []
  while (names.length < vocabSize) {
    const best = pairs.best()
    if (best === null) {
      throw new ViaductError(
        'ERR_TOKENIZER',
        'trainBpe',
        `expected text for ${vocabSize} tokens, got enough for ${names.length}: give more text or a smaller vocabulary`,
      )
    }
    const [left, right] = best
    const id = names.length
    names.push(`${names[left]}${names[right]}`)
    merges.push([names[left] as string, names[right] as string])
    for (const index of pairs.wordsWith(left, right)) {
      const word = words[index] as Word
      for (let i = 0; i + 1 < word.ids.length; i++)
        pairs.add(word.ids[i] as number, word.ids[i + 1] as number, -word.count, index)
      const merged: number[] = []
      for (let i = 0; i < word.ids.length; i++) {
        if (word.ids[i] === left && word.ids[i + 1] === right) {
          merged.push(id)
          i++
        } else merged.push(word.ids[i] as number)
      }
      word.ids = merged
      for (let i = 0; i + 1 < merged.length; i++)
        pairs.add(merged[i] as number, merged[i + 1] as number, word.count, index)
    }
  }
  return { vocab: new Map(names.map((name, id) => [name, id])), merges, eosToken }
}

function countWords(texts: Iterable<string>): Word[] {
  const counts = new Map<string, number>()
  for (const text of texts)
    for (const word of text.match(wordPattern) ?? []) counts.set(word, (counts.get(word) ?? 0) + 1)
  // Byte b has id 1 + b.
  return [...counts].map(([word, count]) => ({ ids: [...Buffer.from(word)].map((b) => 1 + b), count }))
}

/** How often each pair of neighbours occurs, and in which words. */
class PairCounts {
  readonly #count = new Map<number, number>()
  readonly #words = new Map<number, Set<number>>()

  #key = (left: number, right: number) => left * 2 ** 20 + right

  add(left: number, right: number, count: number, word: number): void {
    const key = this.#key(left, right)
    const now = (this.#count.get(key) ?? 0) + count
    if (now === 0) this.#count.delete(key)
    else this.#count.set(key, now)
    if (count < 0) return
    const words = this.#words.get(key)
    if (words === undefined) this.#words.set(key, new Set([word]))
    else words.add(word)
  }

  /** The commonest pair that occurs at least twice. */
  best(): [number, number] | null {
    let bestKey = -1
    let bestCount = 1
    for (const [key, count] of this.#count) {
      if (count > bestCount || (count === bestCount && bestKey >= 0 && key < bestKey)) {
        bestKey = key
        bestCount = count
      }
    }
    return bestKey < 0 ? null : [Math.floor(bestKey / 2 ** 20), bestKey % 2 ** 20]
  }

  /** Words that may hold the pair, in order of first sight; the pair is forgotten. */
  wordsWith(left: number, right: number): number[] {
    const key = this.#key(left, right)
    const words = [...(this.#words.get(key) ?? [])].sort((a, b) => a - b)
    this.#words.delete(key)
    return words
  }
}

/** The text of tokenizer.json. */
export function tokenizerJson(bpe: BpeVocabulary): string {
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true }
  const eos = {
    id: bpe.vocab.get(bpe.eosToken),
    content: bpe.eosToken,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special: true,
  }
  const document = {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: [eos],
    normalizer: null,
    pre_tokenizer: byteLevel,
    post_processor: null,
    decoder: byteLevel,
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: Object.fromEntries(bpe.vocab),
      merges: bpe.merges,
    },
  }
  return `${JSON.stringify(document, null, 1)}\n`
}

/** The text of tokenizer_config.json that Transformers wants beside it. */
export function tokenizerConfigJson(bpe: BpeVocabulary, modelMaxLength: number): string {
  const document = {
    tokenizer_class: 'PreTrainedTokenizerFast',
    eos_token: bpe.eosToken,
    clean_up_tokenization_spaces: false,
    model_max_length: modelMaxLength,
  }
  return `${JSON.stringify(document, null, 2)}\n`
}

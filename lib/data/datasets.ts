// From a RunConfig to training and validation data. Shares of `dataset.split` are consecutive ranges of the token stream.

import { ViaductError } from '../base/errors.js'
import type { ResolvedConfig } from '../config/resolve.js'
import { IndexedTokens } from './indexedTokens.js'
import { readTexts, tokenizeTexts } from './textTokens.js'
import { type Dataset, MockDataset, splitShares, TokenDataset, type TokenStream } from './tokenDataset.js'
import { Tokenizer } from './tokenizer.js'

/** Data of a run. */
export interface RunData {
  readonly train: Dataset
  /** Null where the split has no validation share. */
  readonly validation: Dataset | null
  /** Null for data that are token ids already. */
  readonly tokenizer: Tokenizer | null
  dispose(): void
}

/**
 * Opens the data of a configuration.
 * @throws ERR_DATA, ERR_TOKENIZER when a file is missing, broken or too short.
 */
export async function openData(resolved: ResolvedConfig): Promise<RunData> {
  const { dataset, tokenizer: options, model } = resolved.config
  const S = resolved.seqLength
  const tokenizer =
    options.tokenizerType === 'HuggingFaceTokenizer' && options.tokenizerModel !== null
      ? await Tokenizer.fromFolder(options.tokenizerModel)
      : null
  if (tokenizer !== null && tokenizer.vocabSize > model.vocabSize) {
    throw new ViaductError(
      'ERR_CONFIG',
      'data',
      `the tokenizer in ${tokenizer.folder} has ${tokenizer.vocabSize} tokens but model.vocabSize=${model.vocabSize}: raise it, or take another tokenizer`,
    )
  }
  if (dataset.kind === 'mock') {
    const vocabulary = options.vocabSize ?? model.vocabSize
    return {
      train: new MockDataset(vocabulary, S, dataset.randomSeed),
      validation: splitShares(dataset.split)[1] > 0 ? new MockDataset(vocabulary, S, dataset.randomSeed + 1) : null,
      tokenizer,
      dispose() {},
    }
  }
  let stream: TokenStream & { dispose?: () => void }
  if (dataset.kind === 'indexed') {
    if (typeof dataset.path !== 'string') {
      throw new ViaductError(
        'ERR_CONFIG',
        'data',
        'dataset.path must be one path without extension for dataset.kind=indexed',
      )
    }
    stream = new IndexedTokens(dataset.path)
  } else {
    if (tokenizer === null)
      throw new ViaductError('ERR_CONFIG', 'data', 'dataset.kind=text needs tokenizer.tokenizerModel')
    stream = await tokenizeTexts(await readTexts(dataset.path ?? []), tokenizer, dataset.randomSeed)
  }
  const [train, validation] = splitShares(dataset.split)
  const trainEnd = Math.floor(stream.length * train)
  const validationEnd = Math.floor(stream.length * (train + validation))
  return {
    train: new TokenDataset(stream, S, 0, trainEnd),
    validation: validation > 0 ? new TokenDataset(stream, S, trainEnd, validationEnd) : null,
    tokenizer,
    dispose: () => stream.dispose?.(),
  }
}

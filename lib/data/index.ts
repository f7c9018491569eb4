// What the folder gives to higher layers.
export { type BpeVocabulary, tokenizerConfigJson, tokenizerJson, trainBpe } from './bpeTrainer.js'
export { openData, type RunData } from './datasets.js'
export { IndexedTokens } from './indexedTokens.js'
export { BatchLoader, type LoaderOptions, type LoaderState } from './loader.js'
export { sampleAt } from './sampleOrder.js'
export { readTexts, type TextDocument, tokenizeTexts } from './textTokens.js'
export {
  type Dataset,
  MemoryTokens,
  MockDataset,
  TokenDataset,
  type TokenStream,
  unigramEntropy,
} from './tokenDataset.js'
export { Tokenizer } from './tokenizer.js'

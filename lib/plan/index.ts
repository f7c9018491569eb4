// What the folder gives to higher layers.
export { type MemoryUse, parameterCount, trainingFlopsPerToken, trainingMemory } from './cost.js'
export { availableMemory, checkFits, describePrice, measurePeakFlops, type Price, priceOf } from './price.js'

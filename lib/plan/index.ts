// What the folder gives to higher layers.
export { parameterCount, trainingFlopsPerToken } from './cost.js'
export { type MemoryUse, memoryByStage } from './memory.js'
export { availableMemory, checkFits, describePrice, measurePeakFlops, type Price, priceOf } from './price.js'

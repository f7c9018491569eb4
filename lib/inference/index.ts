// What the folder gives to higher layers.
export { type GeneratedStep, type GenerateOptions, generate, generateSteps } from './generate.js'
export { generateText, type TextPiece } from './generateText.js'
export type { SamplingOptions } from './sampling.js'

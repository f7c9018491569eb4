// What the folder gives to higher layers.
export {
  AdamW,
  type AdamWOptions,
  type AdamWStep,
  gradientFactor,
  type OptimizerTensor,
  type Sharing,
} from './adamw.js'
export { FlatLayout } from './flatLayout.js'
export { Gradients } from './gradients.js'
export { learningRate, type Schedule } from './schedule.js'

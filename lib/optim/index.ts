// What the folder gives to higher layers.
export { AdamW, type AdamWOptions, type AdamWStep, gradientFactor, type OptimizerTensor } from './adamw.js'
export { FlatBuffer, FlatLayout } from './flatBuffer.js'
export { Gradients } from './gradients.js'
export { learningRate, type Schedule } from './schedule.js'

// The entry point `viaduct/train`.
export { loadCheckpoint, saveCheckpoint } from './checkpoints.js'
export { type EvaluationReport, evaluate, validationBatches } from './evaluate.js'
export { type ForwardResult, type ForwardStep, forwardStep } from './forwardStep.js'
export { stepHeader, stepLine, type Throughput, throughputOf } from './log.js'
export { pretrain, type TrainCallbacks, type TrainOptions, type TrainResult } from './pretrain.js'
export { type SetupOptions, setup, type TrainState } from './state.js'
export { type StepReport, trainStep } from './step.js'

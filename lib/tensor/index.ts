// What the folder gives to higher layers.
export type { DeviceInfo, MemoryStats } from '../addon/functions.js'
export {
  type BatchCoordinates,
  Ctx,
  type CtxFields,
  type Group,
  type Groups,
  type Recorder,
  type Rng,
  soloGroups,
  type TapeRecord,
} from './ctx.js'
export { Device, type DeviceKind } from './device.js'
export { bfloat16Bits, bfloat16Value, type HostData } from './host.js'
export * from './region.js'
export { forEachTensor, Scope, withScope } from './scope.js'
export * from './shardSpec.js'
export { Event, Stream } from './stream.js'
export { Tensor } from './tensor.js'

// A model in memory and its Hugging Face tensors: each rank reads its own byte ranges into its shards and writes its own byte ranges
// into exported files. Plans are compositions of regions. Whole tensors are gathered in exportWeights.ts.
import { ViaductError } from '../../base/errors.js'
import { fillOnce } from '../../checkpoint/hostCopies.js'
import type { SavedTensor } from '../../checkpoint/saveCheckpoint.js'
import { type FileTensor, readRegion, settleAll, writeRegion } from '../../io/blocks.js'
import { readHere } from '../../io/hub/remoteBytes.js'
import type { TensorSource } from '../../io/weightFolder.js'
import type { DistributedModel } from '../../models/distributedModel.js'
import { initializeParameter } from '../../models/initialize.js'
import type { Binding, Mapping } from '../../models/mapping.js'
import type { Parameter } from '../../nn/parameter.js'
import { composeRegions, invertRegions } from '../../tensor/region.js'
import { withScope } from '../../tensor/scope.js'
import { loadRegions, ownedRegions } from '../../tensor/shardSpec.js'
import type { PlannedTensor } from '../exportPlan.js'
import { type HfModel, placeOf } from '../hfModel.js'
import { type ConversionTask, planTasks, type TaskOptions } from './conversionTasks.js'

/** A parameter with its binding. */
interface Bound {
  readonly name: string
  readonly parameter: Parameter
  readonly binding: Binding
}

/** Each parameter of the model with its binding. @throws ERR_COVERAGE, ERR_TENSOR_SHAPE naming all that do not fit. */
function bound(model: DistributedModel, mapping: Mapping): Bound[] {
  const missing: string[] = []
  const shapes: string[] = []
  const found: Bound[] = []
  for (const [name, parameter] of model.namedParameters()) {
    const binding = mapping.bindings.get(name)
    if (binding === undefined) missing.push(name)
    else if (binding.shape.join() !== parameter.shard.logicalShape.join()) {
      shapes.push(
        `${name}: the model has [${parameter.shard.logicalShape}], the folder's config gives [${binding.shape}] (${binding.parts.map((p) => p.name).join(', ')})`,
      )
    } else found.push({ name, parameter, binding })
  }
  if (missing.length + shapes.length > 0) {
    throw new ViaductError(
      missing.length > 0 ? 'ERR_COVERAGE' : 'ERR_TENSOR_SHAPE',
      'bridge',
      [...missing.map((name) => `${name} has no mapping rule`), ...shapes].slice(0, 50).join('; '),
      { missing, shapes },
    )
  }
  return found
}

/**
 * Fills this rank's shards from the folder; casts floats where the model's dtype differs. Parameters whose tensors may be
 * missing (allowMissing) get initial values.
 */
export async function loadModelWeights(model: DistributedModel, hf: HfModel, seed = 1234): Promise<void> {
  const list = bound(model, hf.mapping)
  const hasTensors = ({ binding }: Bound) => binding.parts.some((part) => hf.weights.tensors.has(part.name))
  const absent = list.filter((bound) => !hasTensors(bound))
  await withScope(model.ctx(), (ctx) => {
    for (const { parameter } of absent) initializeParameter(ctx, parameter, seed)
  })
  const present = list.filter(hasTensors)
  const shards = present.map(({ parameter: { data, shard } }) => ({ tensor: data, shard }))
  await fillOnce(shards, model, (index, blocks) => {
    const { parameter, binding } = present[index] as (typeof present)[number]
    const local = loadRegions({ ...parameter.shard, blocks })
    return settleAll(
      binding.parts.map((part) =>
        readHere(
          hf.weights.remote,
          placeOf(hf.weights.tensors.get(part.name) as TensorSource, part),
          composeRegions(part.regions, local),
          (here, region) => readRegion(here, parameter.data, region),
        ),
      ),
    )
  })
}

/** The plan of an export of this model; equal on all ranks. @throws ERR_COVERAGE, ERR_TENSOR_SHAPE where the mapping is not its own */
export function modelTasks(
  model: DistributedModel,
  mapping: Mapping,
  copies: readonly string[],
  options: TaskOptions = {},
): ConversionTask[] {
  const held = new Map(bound(model, mapping).map(({ name, parameter }) => [name, parameter.dtype]))
  const { config, mesh } = model
  const layout = { parallel: config, worldSize: mesh.get('world').size, paddedVocab: config.paddedVocabSize }
  // Parameters of other pipeline stages have the model's dtype.
  const dtype = model.chunks[0]?.config.paramsDtype ?? config.paramsDtype
  return planTasks(mapping, layout, (ours) => held.get(ours) ?? dtype, copies, options)
}

/** The model's parameters for a checkpoint. */
export function modelTensors(model: DistributedModel): SavedTensor[] {
  return [...model.namedParameters()].map(([name, parameter]) => ({
    name,
    dtype: parameter.dtype,
    shard: parameter.shard,
    data: parameter.data,
  }))
}

/** Writes what this rank owns of each planned tensor to its place; data-parallel copies share the work. */
export async function fillFromModel(
  model: DistributedModel,
  tensors: readonly (PlannedTensor & { readonly place: FileTensor })[],
): Promise<void> {
  const parameters = new Map(modelTensors(model).map((tensor) => [tensor.name, tensor]))
  await model.device.stream.sync()
  await settleAll(
    tensors.flatMap(({ origin, place }, i) => {
      const parameter = 'carried' in origin ? undefined : parameters.get(origin.binding.ours)
      if ('carried' in origin || parameter === undefined) return []
      const { rank, size } = model.mesh.get(parameter.shard.copies ?? 'dp_cp')
      if (i % size !== rank) return []
      return composeRegions(ownedRegions(parameter.shard), invertRegions(origin.part.regions)).map((region) =>
        writeRegion(parameter.data, place, region),
      )
    }),
  )
}

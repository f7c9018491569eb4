// A model in memory and its Hugging Face tensors: each rank reads its own byte ranges into its shards, writes its own byte ranges
// into exported files, or takes part in gathering whole tensors one by one. Plans are compositions of regions.
import { native } from '../addon/load.js'
import { type DType, dtypes } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import { contiguousStrides } from '../base/shape.js'
import type { Ranks } from '../checkpoint/ranks.js'
import type { SavedTensor } from '../checkpoint/saveCheckpoint.js'
import { type FileTensor, readRegion, settleAll, writeRegion } from '../io/blocks.js'
import { readHere } from '../io/hub/remoteBytes.js'
import type { DistributedModel } from '../models/distributedModel.js'
import { initializeParameter } from '../models/initialize.js'
import { shardOf } from '../models/layoutShards.js'
import type { Binding, Mapping, Part } from '../models/mapping.js'
import { type ParameterRow, parameterTable } from '../models/parameterTable.js'
import type { Parameter } from '../nn/parameter.js'
import { allGather } from '../parallel/collectives.js'
import type { Ctx } from '../tensor/ctx.js'
import { composeRegions, invertRegions, volume } from '../tensor/region.js'
import { withScope } from '../tensor/scope.js'
import { loadRegions, ownedRegions } from '../tensor/shardSpec.js'
import { Tensor } from '../tensor/tensor.js'
import type { PlannedTensor } from './exportPlan.js'
import { type HfModel, placeOf } from './hfModel.js'

/** Each parameter of the model with its binding. @throws ERR_COVERAGE, ERR_TENSOR_SHAPE naming all that do not fit. */
function bound(model: DistributedModel, mapping: Mapping): { name: string; parameter: Parameter; binding: Binding }[] {
  const missing: string[] = []
  const shapes: string[] = []
  const found: { name: string; parameter: Parameter; binding: Binding }[] = []
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
  const absent = list.filter(({ binding }) => !binding.parts.some((part) => hf.weights.tensors.has(part.name)))
  await withScope(model.ctx(), (ctx) => {
    for (const { parameter } of absent) initializeParameter(ctx, parameter, seed)
  })
  await model.device.stream.sync()
  await settleAll(
    list.map(({ parameter, binding }) => {
      const local = loadRegions(parameter.shard)
      return settleAll(
        binding.parts.flatMap((part) => {
          const source = hf.weights.tensors.get(part.name)
          if (source === undefined) return []
          const regions = composeRegions(part.regions, local)
          return [
            readHere(hf.weights.remote, placeOf(source, part), regions, (here, region) =>
              readRegion(here, parameter.data, region),
            ),
          ]
        }),
      )
    }),
  )
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
  const parameters = new Map(model.namedParameters())
  const { rank, size } = model.mesh.get('dp')
  await model.device.stream.sync()
  await settleAll(
    tensors.flatMap(({ origin, place }, i) => {
      if ('carried' in origin || i % size !== rank) return []
      const parameter = parameters.get(origin.binding.ours)
      if (parameter === undefined) return []
      return composeRegions(ownedRegions(parameter.shard), invertRegions(origin.part.regions)).map((region) =>
        writeRegion(parameter.data, place, region),
      )
    }),
  )
}

export interface ExportWeightsOptions {
  /** Who gets tensors; other ranks get null for each name. Default all. */
  readonly to?: 'all' | 'rank0' | readonly number[]
  /** Only names for which this is true; the same on every rank. */
  readonly filter?: (name: string) => boolean
  /** Casts floating tensors. Default: the parameter's dtype. */
  readonly weightDtype?: DType
  /** Tensors in host memory; on a CPU device they are. */
  readonly cpu?: boolean
  /** What of each parameter; `gradients`: its main gradient, float32, zeros where it has none. Default weights. */
  readonly what?: 'weights' | 'gradients'
  readonly signal?: AbortSignal
}

/** Which HF tensors a logical one yields: its parts, and copies of tied ones. */
interface Exported {
  readonly name: string
  readonly part: Part
}

/**
 * Whole HF tensors, one after the other, the same names in the same order on every rank. A tensor is valid until the next step
 * unless kept. A rank that leaves early, throws or aborts ends the iteration on all ranks with ERR_ABORTED.
 */
export async function* exportWeights(
  model: DistributedModel,
  mapping: Mapping,
  copies: readonly string[],
  ranks: Ranks,
  options: ExportWeightsOptions = {},
): AsyncGenerator<[string, Tensor | null]> {
  const list = bound(model, mapping)
  const rows = new Map(parameterTable(mapping.config).map((row) => [row.name, row]))
  const wanted = options.to ?? 'all'
  const mine = wanted === 'all' || (wanted === 'rank0' ? ranks.rank === 0 : wanted.includes(ranks.rank))
  const step = async (leaving: string | null): Promise<void> => {
    const why = (await ranks.gather(leaving)).findIndex((reason) => reason !== null)
    if (leaving === null && why >= 0)
      throw new ViaductError(
        'ERR_ABORTED',
        'exportHfWeights',
        `rank ${why} left the iteration early: no more tensors can be gathered`,
        { rank: why },
      )
  }
  let open = true
  try {
    for (const { parameter, binding } of list) {
      const parts: Exported[] = binding.parts.map((part) => ({ name: part.name, part }))
      for (const copy of options.what === 'gradients' ? [] : copies) {
        const part = binding.parts.find((p) => p.name === mapping.tied.get(copy))
        if (part) parts.push({ name: copy, part })
      }
      const chosen = parts.filter(({ name }) => options.filter?.(name) ?? true)
      if (chosen.length === 0) continue
      const ctx = model.ctx()
      let held: Tensor | null = null
      let all: Tensor | null = null
      try {
        for (const [i, { name, part }] of chosen.entries()) {
          if (options.signal?.aborted)
            throw new ViaductError('ERR_ABORTED', 'exportHfWeights', 'the signal was aborted')
          try {
            await step(null)
          } catch (error) {
            open = false // the others have ended as well: nobody waits for this rank
            throw error
          }
          if (i === 0) {
            held =
              options.what === 'gradients'
                ? (parameter.mainGrad ?? Tensor.zeros(ctx, parameter.shard.localShape, 'float32'))
                : parameter.data
            all = gatherShards(ctx, model, parameter, held)
          }
          const shards = { parameter, held: held as Tensor, all, row: rows.get(binding.ours) as ParameterRow }
          yield [name, mine ? await assemble(ctx, model, mapping, shards, part, options.weightDtype) : null]
        }
      } finally {
        ctx.scope.close()
      }
    }
    open = false
    await ranks.gather('done')
  } finally {
    if (open) await ranks.gather('left').catch(() => [])
  }
}

/** A parameter with the shards of all tp ranks, [tp, ...local]; null where the own one is the whole. */
interface Shards {
  readonly parameter: Parameter
  /** The parameter's data or its gradient. */
  readonly held: Tensor
  readonly all: Tensor | null
  readonly row: ParameterRow
}

function gatherShards(ctx: Ctx, model: DistributedModel, parameter: Parameter, held: Tensor): Tensor | null {
  const tp = model.mesh.get('tp')
  const replicated = parameter.shard.localShape.join() === parameter.shard.logicalShape.join()
  return tp.size > 1 && !replicated ? allGather(ctx, held, tp) : null
}

async function assemble(
  ctx: Ctx,
  model: DistributedModel,
  mapping: Mapping,
  { parameter, held, all, row }: Shards,
  part: Part,
  weightDtype: DType | undefined,
): Promise<Tensor> {
  const dtype = weightDtype && dtypes[held.dtype].isFloat ? weightDtype : held.dtype
  const out = Tensor.empty(ctx, part.shape, dtype)
  const { localShape } = parameter.shard
  const strides = contiguousStrides(localShape)
  const toTheirs = invertRegions(part.regions)
  const place = (
    tensor: Tensor,
    start: readonly number[],
    size: readonly number[],
    by: readonly number[],
    base: number,
  ) => tensor.view(ctx, size, by, base + start.reduce((sum, at, d) => sum + at * (by[d] as number), 0))
  const count = all ? model.mesh.get('tp').size : 1
  for (let rank = 0; rank < count; rank++) {
    const shard = all
      ? shardOf(row, mapping.config, { rank, size: count }, { paddedVocab: model.config.paddedVocabSize })
      : { ...parameter.shard, blocks: parameter.shard.blocks.map((b) => ({ ...b, replica: 0 })) }
    for (const { from, to, size } of composeRegions(ownedRegions(shard), toTheirs)) {
      using source = place(all ?? held, from, size, strides, rank * volume(localShape))
      using target = place(out, to, size, out.strides, 0)
      native.copy(ctx.stream.id, target.handle, source.handle)
    }
  }
  await ctx.stream.sync()
  return out
}

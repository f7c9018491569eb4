// AutoBridge: the one entry for conversion. It holds a Hugging Face model's description (folder, checkpoint or bare config) and
// leads to providers, models, exports and checkpoints. The work is done in the files beside this one.

import type { DType } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import { isCheckpoint } from '../checkpoint/checkpointIndex.js'
import { HfParcel } from '../checkpoint/hfParcel.js'
import { loadCheckpoint } from '../checkpoint/loadCheckpoint.js'
import { type Ranks, ranksOf } from '../checkpoint/ranks.js'
import { type SaveOptions, saveCheckpoint } from '../checkpoint/saveCheckpoint.js'
import { modelFolder, type SourceOptions } from '../io/hub/modelSource.js'
import { isAddress } from '../io/hub/remoteFolder.js'
import type { OnDownload } from '../io/hub/snapshot.js'
import { JsonDocument, type JsonValue } from '../io/jsonDocument.js'
import type { DistributedModel } from '../models/distributedModel.js'
import type { FamilySpec, HfConfig } from '../models/family.js'
import type { CoveragePolicy, Mapping } from '../models/mapping.js'
import { GPTModelProvider, type ProvideOptions } from '../models/provider.js'
import { listArchitectures, supports } from '../models/registry.js'
import type { TransformerConfig } from '../models/transformerConfig.js'
import type { Tensor } from '../tensor/tensor.js'
import { rebuildParcel } from './autoConfig.js'
import { type PlanOptions, planExport, sourceDtype } from './exportPlan.js'
import { type HfModel, mappingOf, openHfModel, readParcel } from './hfModel.js'
import { writeHfFolder } from './hfWriter.js'
import { openConverted } from './offline/checkpointSource.js'
import {
  type ConversionReport,
  type ExportOptions,
  exportCkpt,
  type ImportOptions,
  importCkpt,
} from './offline/convert.js'
import type { ConversionTask, TaskOptions } from './online/conversionTasks.js'
import { type ExportWeightsOptions, runTasks } from './online/exportWeights.js'
import { fillFromModel, loadModelWeights, modelTasks, modelTensors } from './online/modelWeights.js'
import { withWorldRanks } from './worldRanks.js'

export interface FromPretrainedOptions extends CoveragePolicy, Omit<SourceOptions, 'onDownload'> {
  /** Accepted for scripts that set it. No code of a model folder is ever run; that is said once. */
  readonly trustRemoteCode?: boolean
  /** Told bytes that are here and bytes in all while a hub id is fetched. */
  readonly onProgress?: OnDownload
}

export interface SaveHfOptions extends PlanOptions {
  readonly overwrite?: boolean
}

export interface LoadMegatronOptions extends ProvideOptions {
  readonly tensorModelParallelSize?: number
}

let saidNoCode = false

export class AutoBridge {
  private constructor(
    /** The HF config as it is written. */
    readonly hfConfig: JsonDocument,
    readonly family: FamilySpec,
    /** The description of the transformer that the config means. */
    readonly transformerConfig: TransformerConfig,
    readonly mapping: Mapping,
    /** The opened folder; null for a bare config or a checkpoint. */
    readonly hf: HfModel | null,
    private readonly parcel: HfParcel,
    private readonly checkpoint: string | null,
    /** The description was rebuilt: it goes before the one that the checkpoint keeps. */
    private readonly rebuilt = false,
  ) {}

  /**
   * Opens a Hugging Face model; headers are read and coverage is proved, weights are not read yet.
   * @param path - a folder, a folder of the hub's cache, a hub id, which is fetched into that cache, or the http or https
   *   address of a folder, whose tensors are fetched when they are read.
   * @throws every error of openHfModel.
   */
  static async fromHfPretrained(path: string, options: FromPretrainedOptions = {}): Promise<AutoBridge> {
    if (options.trustRemoteCode && !saidNoCode) {
      saidNoCode = true
      process.emitWarning(
        'trustRemoteCode: no remote code is ever run; files of a model folder are copied, never executed',
        'ViaductNotice',
      )
    }
    const hf = await openHfModel(path, sourceOptions(options))
    return new AutoBridge(hf.parcel.config, hf.family, hf.config, hf.mapping, hf, hf.parcel, null)
  }

  /** A bridge without weights: models get initial values, exports get new files. */
  static fromHfConfig(config: HfConfig | JsonDocument): AutoBridge {
    const document = config instanceof JsonDocument ? config : JsonDocument.from(config as JsonValue)
    const parcel = HfParcel.fromConfig(document)
    const { family, config: transformer, mapping } = readParcel(parcel)
    return new AutoBridge(document, family, transformer, mapping, null, parcel, null)
  }

  /** A bridge whose weights are in one of our checkpoints. @throws ERR_CHECKPOINT */
  static async fromCheckpoint(dir: string): Promise<AutoBridge> {
    const { checkpoint, parcel } = await openConverted(dir)
    const { family, config, mapping } = readParcel(parcel)
    return new AutoBridge(parcel.config, family, config, mapping, null, parcel, checkpoint.folder)
  }

  /**
   * A bridge whose weights are in a checkpoint of custom sizes (pruned, resized): the config is rebuilt from the model section of
   * the checkpoint's run_config.yaml, in the family and spelling of a reference, whose tokenizer and other files it takes too.
   * @throws ERR_CHECKPOINT without such a section, ERR_CONFIG where the reference's family cannot express the model.
   */
  static async fromAutoConfig(
    ckpt: string,
    hfReference: string,
    options: FromPretrainedOptions = {},
  ): Promise<AutoBridge> {
    const { checkpoint, parcel } = await rebuildParcel(ckpt, hfReference, sourceOptions(options))
    const { family, config, mapping } = readParcel(parcel)
    return new AutoBridge(parcel.config, family, config, mapping, null, parcel, checkpoint.folder, true)
  }

  /** A Hugging Face folder, a hub id or one of our checkpoints, whichever `dir` is. */
  static async open(dir: string, options: FromPretrainedOptions = {}): Promise<AutoBridge> {
    if (isAddress(dir)) return AutoBridge.fromHfPretrained(dir, options)
    const folder = await modelFolder(dir, sourceOptions(options))
    return (await isCheckpoint(folder))
      ? AutoBridge.fromCheckpoint(folder)
      : AutoBridge.fromHfPretrained(folder, options)
  }

  /** True when a family is there for this config. */
  static supports(config: HfConfig | JsonDocument): boolean {
    return supports((config instanceof JsonDocument ? config.value : config) as HfConfig)
  }

  /** Architectures that convert, sorted. */
  static listSupportedModels(): string[] {
    return listArchitectures()
  }

  /** A provider with the model's description, open for parallel sizes; it loads the weights unless told not to. */
  toMegatronProvider(options: { readonly loadWeights?: boolean } = {}): GPTModelProvider {
    const provider = new GPTModelProvider({
      ...this.transformerConfig,
      seqLength: this.transformerConfig.maxPositionEmbeddings,
    })
    if (options.loadWeights !== false && (this.hf !== null || this.checkpoint !== null)) {
      provider.weightsLoader = (model) => this.loadHfWeights(model)
    }
    return provider
  }

  /** The model on this rank, weights loaded. Collective. */
  async toMegatronModel(options: LoadMegatronOptions = {}): Promise<DistributedModel> {
    const provider = this.toMegatronProvider({ loadWeights: options.loadWeights ?? true })
    if (options.tensorModelParallelSize !== undefined)
      provider.tensorModelParallelSize = options.tensorModelParallelSize
    provider.finalize()
    return provider.provideDistributedModel(options)
  }

  /** Fills a model: every rank reads its own byte ranges, what several of a host hold once. Collective. @param path - another folder of the same model. */
  async loadHfWeights(model: DistributedModel, path?: string, policy: CoveragePolicy = {}): Promise<void> {
    if (path === undefined && this.checkpoint !== null) {
      const wanted = [...model.namedParameters()].map(([name, p]) => ({ name, tensor: p.data, shard: p.shard }))
      await loadCheckpoint(this.checkpoint, wanted, { model })
      return
    }
    const hf = path === undefined ? this.hf : await openHfModel(path, policy)
    if (hf === null)
      throw new ViaductError(
        'ERR_USAGE',
        'bridge',
        'expected a bridge with weights, got one from a bare config: pass a folder',
      )
    await loadModelWeights(model, hf)
  }

  /**
   * The plan of an export, before any data moves: every HF tensor with name, shape, dtype, bytes and how it is gathered, in the
   * order of the model, equal on all ranks. Give it, or some of its tasks, to `exportHfWeights`, as often as needed.
   * @throws ERR_COVERAGE, ERR_TENSOR_SHAPE for a model of another config
   */
  getConversionTasks(model: DistributedModel, options: TaskOptions = {}): ConversionTask[] {
    const mapping = this.mappingFor(model)
    const copies = [...(this.parcel.tensorNames ?? [])].filter((name) => mapping.tied.has(name))
    return modelTasks(model, mapping, copies, options)
  }

  /** Whole HF tensors by name, the same on every rank; see runTasks for what a step promises. @throws as runTasks */
  exportHfWeights(
    model: DistributedModel,
    options?: ExportWeightsOptions & { readonly to?: 'all' },
  ): AsyncGenerator<[string, Tensor]>
  exportHfWeights(model: DistributedModel, options: ExportWeightsOptions): AsyncGenerator<[string, Tensor | null]>
  exportHfWeights(
    model: DistributedModel,
    options: ExportWeightsOptions = {},
  ): AsyncGenerator<[string, Tensor | null]> {
    const { tasks, filter, weightDtype, what } = options
    if (tasks !== undefined && (weightDtype ?? what) !== undefined)
      throw new ViaductError(
        'ERR_USAGE',
        'exportHfWeights',
        'expected tasks, or weightDtype and what, got both: give these to getConversionTasks',
      )
    const chosen = filter === undefined ? tasks : tasks?.filter(({ name }) => filter(name))
    return runTasks(model, chosen ?? this.getConversionTasks(model, options), ranksOf(model.mesh), options)
  }

  /** Writes a Hugging Face folder: weights, config, and every other file of the source byte for byte. Collective. */
  async saveHfPretrained(model: DistributedModel, dir: string, options: SaveHfOptions = {}): Promise<void> {
    await this.save(model, dir, options, true)
  }

  /** As saveHfPretrained, weights and index only. Collective. */
  async saveHfWeights(model: DistributedModel, dir: string, options: SaveHfOptions = {}): Promise<void> {
    await this.save(model, dir, options, false)
  }

  private async save(model: DistributedModel, dir: string, options: SaveHfOptions, files: boolean): Promise<void> {
    const dtypes = new Map([...model.namedParameters()].map(([name, p]) => [name, p.dtype]))
    // Parameters of other pipeline stages have the model's dtype.
    const { paramsDtype } = transformerOf(model)
    const plan = planExport(this.mappingFor(model), this.parcel, (ours) => dtypes.get(ours) ?? paramsDtype, options)
    const described = this.parcel.with({ config: this.configFor(model, plan.mainDtype) })
    await writeHfFolder(
      dir,
      plan,
      described,
      { ranks: ranksOf(model.mesh), overwrite: options.overwrite ?? false, files },
      (tensors) => fillFromModel(model, tensors),
    )
  }

  /** Saves the model's weights as a checkpoint that any layout loads. Collective. @returns the iter_* folder. */
  async saveMegatronModel(
    model: DistributedModel,
    dir: string,
    options: SaveOptions & { readonly iteration?: number } = {},
  ): Promise<string> {
    const tensors = modelTensors(model)
    await model.device.stream.sync()
    const parcel = this.parcelFor(model)
    return saveCheckpoint(dir, options.iteration ?? 0, tensors, {
      ranks: ranksOf(model.mesh),
      extras: (folder) => parcel.writeTo(folder),
      ...options,
    })
  }

  /** The model of a checkpoint in any layout. Collective. */
  async loadMegatronModel(dir: string, options: LoadMegatronOptions = {}): Promise<DistributedModel> {
    return (await AutoBridge.fromCheckpoint(dir)).toMegatronModel(options)
  }

  /** What a checkpoint of this model keeps of its Hugging Face form; see HfParcel. */
  parcelFor(model: DistributedModel): HfParcel {
    return this.parcel.with({
      config: this.configFor(model, sourceDtype(this.parcel) ?? transformerOf(model).paramsDtype),
    })
  }

  /** Folder, or checkpoint of another layout, to checkpoint; under a launcher all ranks share the work. */
  static importCkpt(hf: string, ckpt: string, options: ImportOptions = {}): Promise<ConversionReport> {
    return withRanks(options.ranks, (ranks) => importCkpt(hf, ckpt, { ...options, ranks }))
  }

  /** Checkpoint to folder; under a launcher all ranks share the work. */
  static exportCkpt(ckpt: string, hf: string, options: ExportOptions = {}): Promise<ConversionReport> {
    return withRanks(options.ranks, (ranks) => exportCkpt(ckpt, hf, { ...options, ranks }))
  }

  /** As the static exportCkpt; a bridge of fromAutoConfig describes the folder. */
  exportCkpt(ckpt: string, hf: string, options: ExportOptions = {}): Promise<ConversionReport> {
    return AutoBridge.exportCkpt(ckpt, hf, this.rebuilt ? { parcel: this.parcel, ...options } : options)
  }

  private mappingFor(model: DistributedModel): Mapping {
    return mappingOf(this.family, transformerOf(model), this.parcel.tensorNames)
  }

  /** config.json of the model as it is now: only what changed differs from the source's text. */
  private configFor(model: DistributedModel, paramsDtype: DType): JsonDocument {
    const source = this.hfConfig.value as HfConfig
    const kept = sourceDtype(this.parcel) === paramsDtype ? this.transformerConfig.paramsDtype : paramsDtype
    return this.hfConfig.with(this.family.toHf({ ...transformerOf(model), paramsDtype: kept }, source) as JsonValue)
  }
}

function sourceOptions(options: FromPretrainedOptions): CoveragePolicy & SourceOptions {
  const { onProgress } = options
  return onProgress === undefined ? options : { ...options, onDownload: onProgress }
}

function transformerOf(model: DistributedModel): TransformerConfig {
  const [chunk] = model.chunks
  if (chunk === undefined) throw new ViaductError('ERR_ASSERT', 'bridge', 'expected a model with at least one chunk')
  return chunk.config
}

function withRanks<T>(ranks: Ranks | undefined, work: (ranks: Ranks) => Promise<T>): Promise<T> {
  return ranks ? work(ranks) : withWorldRanks(work)
}

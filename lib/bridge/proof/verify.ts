// The proof of a round trip: coverage both ways, every tensor byte for byte (verifyTensors.ts), config fields, files beside the tensors
// (verifyFiles.ts). What it gives is the certificate (certificate.ts). Logits are compared by the command.
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type OpenCheckpoint, openCheckpoint } from '../../checkpoint/checkpointIndex.js'
import { HfParcel } from '../../checkpoint/hfParcel.js'
import { type Ranks, solo, together } from '../../checkpoint/ranks.js'
import type { SourceOptions } from '../../io/hub/modelSource.js'
import type { JsonDocument, JsonValue } from '../../io/jsonDocument.js'
import { strayShards } from '../../io/otherFiles.js'
import type { HfConfig } from '../../models/family.js'
import { layoutProblems } from '../../models/layoutShards.js'
import type { CoveragePolicy } from '../../models/mapping.js'
import { parameterTable } from '../../models/parameterTable.js'
import { type ParallelConfig, parallelOf, refuseLayout } from '../../parallel/config.js'
import { type HfModel, openHfModel } from '../hfModel.js'
import type { OnProgress } from '../offline/conversion.js'
import { sharedSource } from '../sharedSource.js'
import { coverageOf, type Verification, type VerifiedTensor, verifiedConfig, versions } from './certificate.js'
import { fileProblems, verifyFiles } from './verifyFiles.js'
import { layoutCutters, proveDerived, proveParameter, type TensorProof } from './verifyTensors.js'

/** The layout is simulated: this process cuts the shards of all its ranks. */
export interface VerifyOptions extends CoveragePolicy, SourceOptions, Partial<ParallelConfig> {
  /** A checkpoint to compare the folder with, instead of the layout's shards. */
  readonly ckpt?: string
  /** Ranks of the layout. Default: its smallest world. */
  readonly worldSize?: number
  readonly ranks?: Ranks
  readonly onProgress?: OnProgress
}

/**
 * Verifies a folder. Collective: ranks share the tensors.
 * @throws what openHfModel throws: a folder that cannot be covered is an error, a difference is a result with ok = false.
 */
export async function verify(path: string, options: VerifyOptions = {}): Promise<Verification> {
  const began = new Date()
  const started = performance.now()
  const ranks = options.ranks ?? solo
  const parallel = parallelOf(options)
  const model = await openHfModel(await sharedSource(ranks, path, options), options)
  refuseLayout(layoutProblems(model.config, parallel, options.worldSize))
  const checkpoint = options.ckpt === undefined ? null : await openCheckpoint(options.ckpt)
  const kept = checkpoint && (await HfParcel.fromCheckpoint(checkpoint.folder))
  const files = ranks.rank === 0 ? await verifyFiles(model, kept) : []
  const back = translatedBack(model)
  const around = ranks.rank === 0 ? problemsAround(model, checkpoint, kept, files, back) : []
  const all = await together(ranks, () => proveTensors(model, checkpoint, kept, parallel, ranks, options.onProgress))
  const order = new Map([...model.weights.tensors.keys()].map((name, i) => [name, i]))
  const place = ({ name }: VerifiedTensor) => order.get(name.replace(/\[\d+\]$/, '')) ?? 0
  const tensors = all.flatMap((r) => r.tensors).sort((a, b) => place(a) - place(b))
  const problems = [...around, ...all.flatMap((r) => r.problems)]
  return {
    ok: problems.length === 0,
    partial: model.coverage.partial,
    folder: model.folder,
    hub: model.hub,
    address: model.address,
    architecture: model.family.architectures[0] as string,
    checkpoint: checkpoint?.folder ?? null,
    parallel,
    versions: versions(),
    time: { began: began.toISOString(), seconds: (performance.now() - started) / 1000 },
    tensors,
    differingBytes: tensors.reduce((n, t) => n + t.differingBytes, 0),
    coverage: coverageOf(model),
    config: verifiedConfig(model.parcel.config.value, (kept?.config ?? back).value),
    configKept: back.text === model.parcel.config.text,
    files,
    problems,
  }
}

/** The config after a translation there and back. */
function translatedBack({ parcel, family, config }: HfModel): JsonDocument {
  return parcel.config.with(family.toHf(config, parcel.config.value as HfConfig) as JsonValue)
}

/** What is wrong beside the tensors that the folder has. */
function problemsAround(
  model: HfModel,
  checkpoint: OpenCheckpoint | null,
  kept: HfParcel | null,
  files: Verification['files'],
  back: JsonDocument,
): string[] {
  const problems: string[] = []
  if (back.text !== model.parcel.config.text)
    problems.push('config.json does not come back byte for byte from its translation')
  for (const name of strayShards(model.parcel.leftOut))
    problems.push(`${name} looks like a part of the model, and its index does not name it`)
  if (checkpoint === null) return problems
  for (const name of checkpoint.tensors.keys()) {
    if (!name.startsWith('optimizer.') && !model.mapping.bindings.has(name))
      problems.push(`${name} is in the checkpoint, and nothing in the folder maps to it`)
  }
  if (kept === null) return [...problems, `hf/config.json is missing from ${checkpoint.folder}`]
  for (const name of kept.carried.keys())
    if (!model.coverage.derived.includes(name)) problems.push(`${name} is kept in the checkpoint but not in the folder`)
  return [...problems, ...fileProblems(model, kept, files)]
}

/** This rank's share of the parameters, one at a time through a scratch file; rank 0 has the derived tensors too. */
async function proveTensors(
  model: HfModel,
  checkpoint: OpenCheckpoint | null,
  kept: HfParcel | null,
  parallel: ParallelConfig,
  ranks: Ranks,
  onProgress: OnProgress | undefined,
): Promise<TensorProof> {
  const scratch = await mkdtemp(join(tmpdir(), 'viaduct-verify-'))
  const file = join(scratch, 'tensor')
  const proof: { tensors: VerifiedTensor[]; problems: string[] } = { tensors: [], problems: [] }
  const total = [...model.weights.tensors.values()].reduce((n, { entry }) => n + entry.end - entry.begin, 0)
  let done = 0
  const add = ({ tensors, problems }: TensorProof) => {
    proof.tensors.push(...tensors)
    proof.problems.push(...problems)
    done += tensors.reduce((n, t) => n + t.bytes, 0)
    onProgress?.(done, Math.ceil(total / ranks.size))
  }
  try {
    const cutters = layoutCutters(model.config, parallel)
    const rows = parameterTable(model.config).filter((_, i) => i % ranks.size === ranks.rank)
    for (const row of rows) add(await proveParameter(model, checkpoint, row, cutters, file))
    for (const name of ranks.rank === 0 ? model.coverage.derived : []) {
      const place = kept?.carried.get(name) ?? null
      if (checkpoint && place === null) proof.problems.push(`${name} is missing from the checkpoint`)
      else add(await proveDerived(model, name, place, file))
    }
    return proof
  } finally {
    await rm(scratch, { recursive: true, force: true })
  }
}

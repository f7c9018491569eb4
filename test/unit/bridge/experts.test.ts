// Models with experts there and back: the files that Transformers wrote come back byte for byte in either spelling, both spellings
// are the same logical model, and what is exchanged or swapped is found. The forward pass is refused by name.
import { cpSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { AutoBridge } from '../../../lib/bridge/autoBridge.js'
import { exportCkpt, importCkpt } from '../../../lib/bridge/offline/convert.js'
import { verify } from '../../../lib/bridge/proof/verify.js'
import { openCheckpoint } from '../../../lib/checkpoint/checkpointIndex.js'
import { openWeights } from '../../../lib/io/weightFolder.js'
import { digestsOf, errorOf, temporaryFolder } from '../../hostile/temporary.js'

const fixtures = join(import.meta.dirname, '../../fixtures/moe')
const folder = (name: string) => join(fixtures, name)
const cases = ['qwen3_moe', 'olmoe', 'mixtral', 'qwen2_moe']
const spelled = cases.flatMap((name) => [name, `${name}_fused`])
const home = temporaryFolder()
let count = 0
const fresh = () => join(home, String(count++))

async function imported(name: string): Promise<string> {
  const ckpt = fresh()
  await importCkpt(folder(name), ckpt)
  return ckpt
}

/** Hash of each logical tensor; imports of one rank write each in one piece. */
async function hashes(ckpt: string): Promise<Map<string, string>> {
  const { tensors } = await openCheckpoint(ckpt)
  return new Map([...tensors].sort().map(([name, { pieces }]) => [name, pieces.map((p) => p.xxh3).join()]))
}

/** A copy of a fixture in which two tensors of the same size are exchanged. */
async function exchanged(name: string, a: string, b: string): Promise<string> {
  const copy = fresh()
  cpSync(folder(name), copy, { recursive: true })
  const { tensors } = await openWeights(copy)
  const bytes = [a, b].map((key) => {
    const { path, offset, entry } = tensors.get(key) as NonNullable<ReturnType<typeof tensors.get>>
    return { path, offset, data: Buffer.from(readFileSync(path).subarray(offset, offset + entry.end - entry.begin)) }
  })
  for (const [i, { path, offset }] of bytes.entries()) {
    const file = readFileSync(path)
    bytes[1 - i]?.data.copy(file, offset)
    writeFileSync(path, file)
  }
  return copy
}

describe('conversion', () => {
  it.each(spelled)('%s comes back byte for byte', async (name) => {
    const [ckpt, out] = [await imported(name), fresh()]
    await exportCkpt(ckpt, out)
    expect(digestsOf(out)).toEqual(digestsOf(folder(name)))
    expect(await verify(folder(name), { ckpt })).toMatchObject({ ok: true, configKept: true, differingBytes: 0 })
  })
  it.each(spelled)('%s comes back from the shards of two ranks', async (name) => {
    const result = await verify(folder(name), { tensorModelParallelSize: 2 })
    expect(result).toMatchObject({ ok: true, partial: false, differingBytes: 0 })
  })
  it.each(spelled)('%s comes back from experts, stages and slices of 8 ranks', async (name) => {
    const parallel = {
      tensorModelParallelSize: 4, // more than the kv heads
      pipelineModelParallelSize: 2,
      pipelineModelParallelLayout: 'Et|t|t|L',
      expertModelParallelSize: 2,
      expertTensorParallelSize: 2,
    }
    expect(await verify(folder(name), parallel)).toMatchObject({ ok: true, differingBytes: 0, parallel })
  })
  it.each(cases)('%s is the same model in both spellings', async (name) => {
    const [hub, fused] = await Promise.all([name, `${name}_fused`].map(async (n) => hashes(await imported(n))))
    expect(hub?.size).toBeGreaterThan(20)
    expect(fused).toEqual(hub)
  })
  it.each(cases)('%s: a stack of experts is cast and cut into other files', async (name) => {
    const ckpt = await imported(`${name}_fused`)
    const [wide, back] = [fresh(), fresh()]
    await exportCkpt(ckpt, wide, { weightDtype: 'float32', maxShardBytes: 50_000 })
    await importCkpt(wide, back, { dtype: 'bfloat16' })
    expect(await hashes(back)).toEqual(await hashes(ckpt))
  })
})

describe('what is wrong is found', () => {
  const expert = (layer: number, e: number, part: string) => `model.layers.${layer}.mlp.experts.${e}.${part}.weight`
  it.each([
    ['two experts', 'qwen3_moe', expert(2, 0, 'down_proj'), expert(2, 3, 'down_proj')],
    ['gate and up', 'olmoe', expert(1, 5, 'gate_proj'), expert(1, 5, 'up_proj')],
    ['two layers', 'olmoe_fused', 'model.layers.0.mlp.experts.down_proj', 'model.layers.2.mlp.experts.down_proj'],
    [
      'two routers',
      'mixtral',
      ...([0, 1].map((i) => `model.layers.${i}.block_sparse_moe.gate.weight`) as [string, string]),
    ],
  ])('%s exchanged', async (_, name, a, b) => {
    const { ok, problems } = await verify(await exchanged(name, a, b), { ckpt: await imported(name) })
    expect(ok).toBe(false)
    for (const key of [a, b]) expect(problems.join('\n')).toContain(key)
  })
})

it('a model with experts is built, and the layouts that it does not take are named together', async () => {
  for (const name of cases) {
    const bridge = await AutoBridge.open(folder(name))
    await using model = await bridge.toMegatronModel()
    expect([...model.namedParameters()].map(([own]) => own)).toContain(
      'decoder.layers.0.mlp.experts.linear_fc1.weight0',
    )
    const provider = bridge.toMegatronProvider()
    Object.assign(provider, { tensorModelParallelSize: 2, expertModelParallelSize: 5 })
    const error = await errorOf(async () => provider.finalize())
    expect(error).toMatchObject({ code: 'ERR_LAYOUT_INVALID' })
    expect(error.message).toMatch(/expertModelParallelSize must divide the \d experts, got 5/)
    expect(error.message).toMatch(/sequenceParallel must be true where tensorModelParallelSize=2/)
  }
})

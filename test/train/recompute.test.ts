// Recompute in layouts: real ranks, and the losses and norms of the same layout without it, to the last bit, dropout on. Forms are drawn
// by a seed; VIADUCT_TEST_FULL=1 takes all of them in more layouts.
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import type { ProviderInit } from '../../lib/models/provider.js'
import { randomOf } from './drawLayout.js'
import type { PipelineTask } from './pipelineRank.js'
import { startScript, steps } from './startRanks.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-recompute-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
const isFull = process.env['VIADUCT_TEST_FULL'] === '1'

type Model = Partial<ProviderInit>

const selective = (...recomputeModules: NonNullable<ProviderInit['recomputeModules']>): Model => ({
  recomputeGranularity: 'selective',
  recomputeModules,
})
const whole = (recomputeMethod: 'uniform' | 'block', recomputeNumLayers: number): Model => ({
  recomputeGranularity: 'full',
  recomputeMethod,
  recomputeNumLayers,
})
/** Those of two layers need as many in a chunk. */
const forms: readonly (readonly [string, Model])[] = [
  ['core_attn', selective('core_attn')],
  ['layernorm', selective('layernorm')],
  ['layernorm and mlp_act', selective('layernorm', 'mlp_act')],
  ['mlp', selective('mlp')],
  ['core_attn and layernorm', selective('core_attn', 'layernorm')],
  ['all modules', selective('core_attn', 'layernorm', 'mlp')],
  ['uniform 1', whole('uniform', 1)],
  ['block 1', whole('block', 1)],
  ['uniform 2', whole('uniform', 2)],
  ['block 2', whole('block', 2)],
]

const sp = { tensorModelParallelSize: 2, sequenceParallel: true }
const stages = (pp: number): Model => ({ pipelineModelParallelSize: pp })
const chunks = { ...stages(2), virtualPipelineModelParallelSize: 2 }

interface Layout {
  readonly name: string
  readonly ranks: number
  readonly model: Model
  readonly layersOfChunk: number
}
const layouts: Layout[] = [
  { name: 'tp 2 with sp', ranks: 2, model: sp, layersOfChunk: 4 },
  { name: 'pp 2, zb-h1', ranks: 2, model: { ...stages(2), pipelineSchedule: 'zb-h1' }, layersOfChunk: 2 },
  { name: 'pp 2, vpp 2', ranks: 2, model: chunks, layersOfChunk: 1 },
]
if (isFull)
  layouts.push(
    { name: 'tp 2', ranks: 2, model: { tensorModelParallelSize: 2 }, layersOfChunk: 4 },
    { name: 'pp 2, 1f1b', ranks: 2, model: stages(2), layersOfChunk: 2 },
    { name: 'pp 2, gpipe', ranks: 2, model: { ...stages(2), pipelineSchedule: 'gpipe' }, layersOfChunk: 2 },
    { name: 'dp 2', ranks: 2, model: {}, layersOfChunk: 4 },
    {
      name: 'pp 2, tp 2, zb-h1',
      ranks: 4,
      model: { ...stages(2), ...sp, pipelineSchedule: 'zb-h1' },
      layersOfChunk: 2,
    },
    { name: 'pp 2, vpp 2, tp 2', ranks: 4, model: { ...chunks, ...sp }, layersOfChunk: 1 },
  )

const random = randomOf(20261126)

function formsOf({ layersOfChunk }: Layout): (readonly [string, Model])[] {
  const fit = forms.filter(([, model]) => (model.recomputeNumLayers ?? 1) <= layersOfChunk)
  const drawn = fit.map((form) => [random(), form] as const).sort(([a], [b]) => a - b)
  return drawn.slice(0, isFull ? fit.length : 3).map(([, form]) => form)
}

const chosen = new Map(layouts.map((layout) => [layout, [['none', {}] as const, ...formsOf(layout)]]))
const place = ({ name }: Layout, form: string) => join(folder, `${name} ${form}.jsonl`)

// All runs of so many ranks in the same processes.
beforeAll(async () => {
  for (const ranks of new Set(layouts.map((layout) => layout.ranks))) {
    const tasks = layouts
      .filter((layout) => layout.ranks === ranks)
      .flatMap((layout) =>
        (chosen.get(layout) ?? []).map(
          ([form, more]): PipelineTask => ({
            trainIters: 3,
            metrics: place(layout, form),
            model: { ...layout.model, ...more },
          }),
        ),
      )
    const started = startScript('pipelineRank.ts', [JSON.stringify(tasks)], ranks)
    const code = await started.end
    if (code !== 0) throw new Error(`${ranks} ranks ended with ${code}:\n${started.lines.join('\n')}`)
  }
}, 600_000)

describe.each(layouts.map((layout) => [layout.name, layout] as const))('%s', (_, layout) => {
  const curve = (form: string) =>
    steps(place(layout, form)).map(({ step, loss, gradNorm }) => ({ step, loss, gradNorm }))
  const [none, ...more] = (chosen.get(layout) ?? []).map(([form]) => form)
  it.each(more)('has the same bits with %s', (form) => {
    expect(curve(none as string)).toHaveLength(3)
    expect(curve(form)).toEqual(curve(none as string))
  })
})

// A rank of two that share experts, and have other micro-batches each: what a step says to it.
import { writeFileSync } from 'node:fs'
import type { ViaductError } from '../../lib/base/errors.js'
import type { TokenBatch } from '../../lib/models/batch.js'
import { allGatherObject } from '../../lib/parallel/collectives.js'
import { forwardStep, setup, trainStep } from '../../lib/train/index.js'
import { fixtureBatches, fixtureData } from './fixtureRun.js'
import { configOf, type PipelineTask } from './pipelineRank.js'

const [, , tasks = '[]', path = ''] = process.argv
const found: string[][] = []
for (const { model, shorter } of JSON.parse(tasks) as (Pick<PipelineTask, 'model'> & { shorter: boolean })[]) {
  const state = await setup(await configOf({ trainIters: 2, ...(model ? { model } : {}) }), {
    data: fixtureData,
    log: () => {},
  })
  const { rank } = state.mesh.get('dp')
  const batches = fixtureBatches(0, 1, rank, 2)
  const short = ({ seqLength, tokens, labels }: TokenBatch): TokenBatch => ({
    batchSize: 1,
    seqLength: seqLength - 1,
    tokens: tokens.slice(0, -1),
    labels: (labels as Int32Array).slice(0, -1),
  })
  const own = rank === 0 ? batches : shorter ? batches.map(short) : batches.slice(1)
  const said = await trainStep(state, own, forwardStep).then(
    () => 'done',
    (error: ViaductError) => `${error.code} ${error.message}`,
  )
  found.push(await allGatherObject(said, state.mesh.get('dp')))
  await state.dispose()
}
if (process.env['RANK'] === '0') writeFileSync(path, JSON.stringify(found))

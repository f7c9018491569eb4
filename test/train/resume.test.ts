// Checkpoints of runs: going on is bit-equal to never having stopped, after a plain end, SIGTERM, and SIGKILL at any instant.
import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { openCheckpoint } from '../../lib/checkpoint/checkpointIndex.js'
import { start, steps } from './startRanks.js'
import { work } from './worker.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-resume-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
const place = (name: string) => join(folder, name)
const quiet = () => {}
/** Numbers that must not differ in a bit. */
const curve = (list: ReturnType<typeof steps>) =>
  list.map(({ step, loss, gradNorm, lr }) => ({ step, loss, gradNorm, lr }))

describe.each(['fp32', 'bf16_mixed'] as const)('a run in two parts, %s', (mixedPrecision) => {
  it('is bit-equal to a run in one, with dropout, shuffled data and a schedule', async () => {
    const task = { hiddenDropout: 0.1, mixedPrecision, microBatchSize: 4 }
    const name = `parts-${mixedPrecision}`
    const whole = await work(
      { ...task, trainIters: 12, metrics: place(`${name}-whole.jsonl`), save: place(`${name}-whole`) },
      quiet,
    )
    const first = await work({ ...task, trainIters: 5, metrics: place(`${name}.jsonl`), save: place(name) }, quiet)
    expect(first.step).toBe(5)
    const second = await work({ ...task, trainIters: 12, metrics: place(`${name}.jsonl`), save: place(name) }, quiet)
    expect([...first.losses, ...second.losses]).toEqual(whole.losses)
    expect(curve(steps(place(`${name}.jsonl`)))).toEqual(curve(steps(place(`${name}-whole.jsonl`))))
    // Weights, moments and masters, by their hashes.
    const [a, b] = [await openCheckpoint(place(name)), await openCheckpoint(place(`${name}-whole`))]
    const hashes = (checkpoint: typeof a) =>
      Object.fromEntries([...checkpoint.tensors].map(([key, { pieces }]) => [key, pieces.map((p) => p.xxh3)]))
    expect(Object.keys(hashes(a)).filter((key) => key.startsWith('optimizer.exp_avg_sq.')).length).toBeGreaterThan(10)
    expect(hashes(a)).toEqual(hashes(b))
    expect(new Set(whole.losses).size).toBe(12)
  })
})

describe('saving', () => {
  it('keeps the newest checkpoints only, where that is asked for', async () => {
    await work({ trainIters: 7, save: place('few'), saveInterval: 2, mostRecentK: 2 }, quiet)
    expect(readdirSync(place('few')).sort()).toEqual([
      'iter_0000006',
      'iter_0000007',
      'latest_checkpointed_iteration.txt',
    ])
  })
})

describe('signals', () => {
  it('SIGTERM: the step is finished, saved, and the exit code is 143; the rest follows bit-equal', async () => {
    const task = { trainIters: 400, hiddenDropout: 0.1, metrics: place('term.jsonl'), save: place('term') }
    const started = start(task)
    await started.line(/^ +3 /)
    const asked = performance.now()
    started.child.kill('SIGTERM')
    expect(await started.end, started.lines.join('\n')).toBe(143)
    expect(performance.now() - asked).toBeLessThan(30_000)
    const stopped = steps(place('term.jsonl')).length
    expect((await openCheckpoint(place('term'))).iteration).toBe(stopped)
    const rest = await work({ ...task, trainIters: stopped + 2 }, quiet)
    const whole = await work({ trainIters: stopped + 2, hiddenDropout: 0.1 }, quiet)
    expect(rest.losses).toEqual(whole.losses.slice(stopped))
  }, 120_000)

  // A seeded few here; 20 in `npm run test:full`, or as many as VIADUCT_TEST_KILLS says.
  const kills = Number(process.env['VIADUCT_TEST_KILLS'] ?? (process.env['VIADUCT_TEST_FULL'] ? 20 : 3))
  it(
    `SIGKILL at ${kills} random instants: always a complete checkpoint, always the same losses`,
    async () => {
      const trainIters = 24
      const whole = await work(
        { trainIters, hiddenDropout: 0.1, microBatchSize: 4, metrics: place('kill-whole.jsonl') },
        quiet,
      )
      const task = {
        trainIters,
        hiddenDropout: 0.1,
        microBatchSize: 4,
        metrics: place('kill.jsonl'),
        save: place('kill'),
        saveInterval: 1,
      }
      let seed = 12345
      const random = () => {
        seed = (Math.imul(seed, 1103515245) + 12345) >>> 0
        return seed / 2 ** 32
      }
      for (let kill = 0; kill < kills; kill++) {
        if (kill > 0 && kill % 6 === 0) rmSync(place('kill'), { recursive: true, force: true })
        const started = start(task)
        await started.line(random() < 0.5 ? /^saved / : /^ +\d+ /)
        await new Promise((done) => setTimeout(done, random() * 120))
        started.child.kill('SIGKILL')
        await started.end
        const saved = await openCheckpoint(place('kill')).then(
          (checkpoint) => checkpoint.iteration,
          () => 0,
        )
        const made = steps(place('kill.jsonl'))
        // At most the step in progress is lost: each one is saved before the next begins.
        expect(saved).toBeGreaterThanOrEqual((made.at(-1)?.step ?? 0) - 1)
      }
      const end = await work(task, quiet)
      expect(end.step).toBe(trainIters)
      const expected = steps(place('kill-whole.jsonl'))
      const made = steps(place('kill.jsonl'))
      for (const { step, loss, gradNorm, lr } of made) {
        expect({ step, loss, gradNorm, lr }).toEqual(curve(expected)[step - 1])
      }
      expect(new Set(made.map(({ step }) => step)).size).toBe(trainIters)
      expect(whole.losses).toHaveLength(trainIters)
    },
    60_000 + kills * 30_000,
  )
})

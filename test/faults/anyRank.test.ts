// Training on four ranks while any one of them is killed or stopped at any instant: the job ends in time and names the rank, or
// starts again from its last checkpoint and ends with the losses of a run that nobody disturbed; no process is left.
// VIADUCT_TEST_KILLS says how often (default 3; 20 in `npm run test:full`).
import { existsSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, expect, test } from 'vitest'
import { plainEnvironment, viaductFile } from '../cli/commandLine.js'
import { temporaryFolder } from '../hostile/temporary.js'
import { type Launched, leftWith, processesWith, startCommand } from './launched.js'

const home = temporaryFolder()
const kills = Number(process.env['VIADUCT_TEST_KILLS'] ?? (process.env['VIADUCT_TEST_FULL'] ? 20 : 3))
const ranks = 4
const trainIters = 30
/** Of collectives, and of heartbeats. */
const timeoutMs = 6000
const slackMs = 5000

interface Step {
  readonly step: number
  readonly loss: number
  readonly gradNorm: number
}

/** In the environment of all processes of a job. */
const markOf = (name: string) => `JOB_UNDER_TEST=${name}`

/** @param launcher - `viaduct run` with timeouts of ours, or the one that `viaduct train` starts by itself. */
function train(name: string, maxRestarts: number, launcher: 'run' | 'train' = 'run'): Launched {
  const more = maxRestarts === 0 ? [] : ['--max-restarts', String(maxRestarts)]
  const run = ['run', '--nproc-per-node', String(ranks), '--heartbeat-timeout', String(timeoutMs / 1000), ...more]
  const work = [
    'llama_tiny_cpu_pretrain_config',
    ...['--tp', '2', '--save', join(home, name)],
    'model.num_layers=2',
    'model.seq_length=64',
    'model.vocab_size=512',
    'model.hidden_dropout=0.1',
    'train.global_batch_size=8',
    'train.micro_batch_size=2',
    `train.train_iters=${trainIters}`,
    'scheduler.lr_decay_iters=100',
    'checkpoint.save_interval=4',
    `logger.metrics_file=${join(home, `${name}.jsonl`)}`,
    `dist.distributed_timeout_minutes=${timeoutMs / 60_000}`,
  ]
  const alone = ['train', '--nproc-per-node', String(ranks), ...more]
  const command = launcher === 'run' ? [...run, viaductFile, 'train'] : alone
  const env = { ...plainEnvironment(), VIADUCT_NUM_THREADS: '1', JOB_UNDER_TEST: name }
  return startCommand(process.execPath, [viaductFile, ...command, ...work], env)
}

function stepsOf(name: string): Step[] {
  const file = join(home, `${name}.jsonl`)
  if (!existsSync(file)) return []
  const records = readFileSync(file, 'utf8').trim().split('\n')
  return records
    .map((line) => JSON.parse(line) as Step & { kind: string })
    .filter(({ kind }) => kind === 'step')
    .map(({ step, loss, gradNorm }) => ({ step, loss, gradNorm }))
}

/** Numbers from 0 to 1, always the same. */
function numbers(seed: number): () => number {
  let state = seed
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state / 2 ** 32
  }
}

/** The process of a rank, once it is there. */
function rankProcess(name: string, rank: number): number | undefined {
  const mine = processesWith(markOf(name))
  return mine.find((pid) => {
    try {
      return readFileSync(`/proc/${pid}/environ`, 'utf8').split('\0').includes(`RANK=${rank}`)
    } catch {
      return false
    }
  })
}

const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))

/** Signals the rank `ms` after the ranks began: all processes then, or null when the job was over. */
async function disturb(launched: Launched, name: string, rank: number, ms: number, signal: NodeJS.Signals) {
  let over = false
  void launched.ended.then(() => {
    over = true
  })
  let pid: number | undefined
  while (!over && pid === undefined) {
    await sleep(5)
    pid = rankProcess(name, rank)
  }
  if (pid === undefined) return null
  await sleep(ms)
  try {
    const all = processesWith(markOf(name))
    process.kill(pid, signal)
    return all
  } catch {
    return null
  }
}

let whole: Step[] = []
let wholeMs = 0
beforeAll(async () => {
  const begin = performance.now()
  const { code, err } = await train('whole', 0).ended
  wholeMs = performance.now() - begin
  expect(code, err).toBe(0)
  whole = stepsOf('whole')
  expect(whole.map(({ step }) => step)).toEqual(Array.from({ length: trainIters }, (_, i) => i + 1))
}, 120_000)

test(
  `any one of ${ranks} ranks is lost, ${kills} times`,
  async () => {
    const random = numbers(11)
    let hits = 0
    for (let i = 0; hits < kills && i < 4 * kills; i++) {
      const name = `lost-${process.pid}-${i}`
      const victim = Math.floor(random() * ranks)
      const signal = random() < 0.5 ? 'SIGKILL' : 'SIGSTOP'
      const instant = random() * wholeMs
      const maxRestarts = i % 2
      // The heartbeats of `viaduct train` have the default timeout: it gets the deaths.
      const launcher = maxRestarts === 1 && signal === 'SIGKILL' ? 'train' : 'run'
      const launched = train(name, maxRestarts, launcher)
      const hit = await disturb(launched, name, victim, instant, signal)
      const begin = performance.now()
      const { code, err } = await launched.ended
      const ms = performance.now() - begin
      const what = `viaduct ${launcher}, ${signal} of rank ${victim} after ${instant.toFixed(0)} ms: exit code ${code} after ${ms.toFixed(0)} ms\n${err}`
      expect(await leftWith(markOf(name)), what).toEqual([])
      const memory = readdirSync('/dev/shm').filter((file) => hit?.includes(Number(file.split('-')[1])))
      expect(memory, what).toEqual([])
      // What was done is right, and done in order, whatever came after.
      const made = stepsOf(name)
      for (const step of made) expect(step, what).toEqual(whole[step.step - 1])
      const noticed = err.includes('failed first')
      if (hit !== null && noticed) {
        hits++
        expect(err, what).toMatch(
          new RegExp(
            `rank ${victim} \\(local rank ${victim}, process \\d+\\) failed first: (signal SIGKILL|no heartbeat)`,
          ),
        )
        expect(err.match(/failed first/g), what).toHaveLength(1)
      }
      if (maxRestarts === 0 && noticed) {
        expect(code, what).toBe(137)
        expect(ms, what).toBeLessThan(timeoutMs + slackMs)
      } else {
        // It came too late to be noticed, or the ranks were started again.
        expect(code, what).toBe(0)
        expect(new Set(made.map(({ step }) => step)).size, what).toBe(trainIters)
        expect(ms, what).toBeLessThan(timeoutMs + slackMs + 3 * wholeMs)
      }
      rmSync(join(home, name), { recursive: true, force: true })
    }
    expect(hits).toBe(kills)
  },
  120_000 + kills * 60_000,
)

// Training on four ranks, in several layouts, while any one of them is killed or stopped at any instant or during a save: the job
// ends in time and names the rank, or starts again from its last checkpoint and ends with the losses of a run that nobody
// disturbed; no process is left. VIADUCT_TEST_KILLS says how often for each signal (20 in `npm run test:full`, which prints its
// seed; VIADUCT_TEST_SEED gives a run again); else three cases.
import { existsSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { plainEnvironment, viaductFile } from '../cli/commandLine.js'
import { temporaryFolder } from '../hostile/temporary.js'
import { type Launched, leftWith, processesWith, startCommand } from './launched.js'

const home = temporaryFolder()
const full = process.env['VIADUCT_TEST_FULL'] !== undefined
const kills = Number(process.env['VIADUCT_TEST_KILLS'] ?? (full ? 20 : 0))
const seed = Number(process.env['VIADUCT_TEST_SEED'] ?? (kills > 0 ? Math.floor(Math.random() * 1e9) : 11))
if (kills > 0) process.stdout.write(`VIADUCT_TEST_SEED=${seed}\n`)

const ranks = 4
const trainIters = 24
/** Of collectives, and of heartbeats. */
const timeoutMs = 6000
const slackMs = 5000

const layouts = {
  'dp 4': ['--dp', '4'],
  'tp 4 with sequence parallelism': ['--tp', '4'],
  'pp 4': ['--pp', '4'],
  'tp 2, pp 2': ['--tp', '2', '--pp', '2'],
  'fsdp 4': ['--fsdp'],
  'fsdp 2, tp 2': ['--fsdp', '--tp', '2'],
} as const
type Layout = keyof typeof layouts
const layoutNames = Object.keys(layouts) as Layout[]

interface Case {
  readonly signal: NodeJS.Signals
  readonly layout: Layout
  readonly maxRestarts: number
  readonly inSave: boolean
}

/** Every combination, within 48 numbers. */
function caseOf(n: number): Case {
  const several = 2 * layoutNames.length
  return {
    signal: n % 2 === 0 ? 'SIGKILL' : 'SIGSTOP',
    layout: layoutNames[Math.floor(n / 2) % layoutNames.length] as Layout,
    maxRestarts: Math.floor(n / several) % 2,
    inSave: Math.floor(n / several / 2) % 2 === 1,
  }
}
// dp 4 killed; tp 4 stopped in a save; tp 2, pp 2 stopped in a save, with a restart; fsdp 4 killed, and killed with a restart.
const cases = (kills > 0 ? Array.from({ length: 2 * kills }, (_, n) => n) : [0, 27, 43, 8, 20]).map(caseOf)

interface Step {
  readonly step: number
  readonly loss: number
  readonly gradNorm: number
}

/** In the environment of all processes of a job. */
const markOf = (name: string) => `JOB_UNDER_TEST=${name}`
const saveFolder = (name: string) => join(home, name)

/** @param launcher - `viaduct run` with timeouts of ours, or the one that `viaduct train` starts by itself. */
function train(name: string, layout: Layout, maxRestarts: number, launcher: 'run' | 'train' = 'run'): Launched {
  const more = maxRestarts === 0 ? [] : ['--max-restarts', String(maxRestarts)]
  const run = ['run', '--nproc-per-node', String(ranks), '--heartbeat-timeout', String(timeoutMs / 1000), ...more]
  const work = [
    'llama_tiny_cpu_pretrain_config',
    ...layouts[layout],
    ...['--save', saveFolder(name)],
    'model.num_layers=4',
    'model.seq_length=64',
    'model.vocab_size=512',
    'model.hidden_dropout=0.1',
    'train.global_batch_size=8',
    'train.micro_batch_size=2',
    `train.train_iters=${trainIters}`,
    'scheduler.lr_decay_iters=100',
    'checkpoint.save_interval=3',
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

/** Numbers from 0 to 1, by the seed. */
function numbers(): () => number {
  let state = seed
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state / 2 ** 32
  }
}
const random = numbers()

/** The process of a rank, once it is there. */
function rankProcess(name: string, rank: number): number | undefined {
  return processesWith(markOf(name)).find((pid) => {
    try {
      return readFileSync(`/proc/${pid}/environ`, 'utf8').split('\0').includes(`RANK=${rank}`)
    } catch {
      return false
    }
  })
}

/** Unfinished checkpoints: hidden entries of the folder. */
function unfinished(name: string): string[] {
  const folder = saveFolder(name)
  return existsSync(folder) ? readdirSync(folder).filter((entry) => entry.startsWith('.')) : []
}

/** Waits until so many saves have begun; false when the job was over before. */
async function untilSave(name: string, count: number, isOver: () => boolean): Promise<boolean> {
  const seen = new Set<string>()
  while (!isOver()) {
    for (const entry of unfinished(name)) seen.add(entry)
    if (seen.size >= count) return true
    await sleep(1)
  }
  return false
}

interface Whole {
  readonly steps: readonly Step[]
  readonly ms: number
}

/** Signals the rank at an instant from 0 to 1; all processes then, or null where that was too late. */
async function disturb(launched: Launched, name: string, rank: number, instant: number, how: Case, ms: number) {
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
  if (how.inSave) {
    // In one of the first six saves of eight, within the milliseconds that it takes.
    const [save, within] = [1 + Math.floor(instant * 6), ((instant * 6) % 1) * 10]
    if (!(await untilSave(name, save, () => over))) return null
    for (const end = performance.now() + within; performance.now() < end; );
    if (unfinished(name).length === 0) return null
  } else await sleep(instant * ms)
  try {
    const all = processesWith(markOf(name))
    process.kill(pid, how.signal)
    return all
  } catch {
    return null
  }
}

const wholes = new Map<Layout, Promise<Whole>>()

/** The run that nobody disturbs. */
function undisturbed(layout: Layout): Promise<Whole> {
  const run = async () => {
    const name = `whole-${layoutNames.indexOf(layout)}`
    const begin = performance.now()
    const { code, err } = await train(name, layout, 0).ended
    const ms = performance.now() - begin
    expect(code, err).toBe(0)
    const steps = stepsOf(name)
    expect(steps.map(({ step }) => step)).toEqual(Array.from({ length: trainIters }, (_, i) => i + 1))
    return { steps, ms }
  }
  const made = wholes.get(layout) ?? run()
  wholes.set(layout, made)
  return made
}

let runs = 0

/** One run; whether the signal came in time to be noticed. */
async function loseRank(how: Case, whole: Whole): Promise<boolean> {
  const { signal, layout, maxRestarts } = how
  const name = `lost-${process.pid}-${runs++}`
  const victim = Math.floor(random() * ranks)
  const instant = random()
  // The heartbeats of `viaduct train` have the default timeout: it gets the deaths.
  const launcher = maxRestarts === 1 && signal === 'SIGKILL' ? 'train' : 'run'
  const launched = train(name, layout, maxRestarts, launcher)
  const hit = await disturb(launched, name, victim, instant, how, whole.ms)
  const begin = performance.now()
  const { code, err } = await launched.ended
  const ms = performance.now() - begin
  const when = how.inSave ? `in save ${1 + Math.floor(instant * 6)}` : `after ${(instant * whole.ms).toFixed(0)} ms`
  const line = `${signal} of rank ${victim}, ${layout}, viaduct ${launcher}, ${when}: exit code ${code} after ${(ms / 1000).toFixed(1)} s`
  const what = `${line}\n${err}`
  const noticed = hit !== null && err.includes('failed first')
  if (kills > 0) process.stdout.write(`${line}${noticed ? '' : ', too late'}\n`)
  expect(await leftWith(markOf(name)), what).toEqual([])
  const memory = readdirSync('/dev/shm').filter((file) => hit?.includes(Number(file.split('-')[1])))
  expect(memory, what).toEqual([])
  // What was done is right, and done in order, whatever came after.
  const made = stepsOf(name)
  for (const step of made) expect(step, what).toEqual(whole.steps[step.step - 1])
  if (noticed) {
    const cause = signal === 'SIGKILL' ? 'signal SIGKILL' : 'no heartbeat for'
    expect(err, what).toMatch(
      new RegExp(`rank ${victim} \\(local rank ${victim}, process \\d+\\) failed first: ${cause}`),
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
    expect(unfinished(name), what).toEqual([])
    expect(ms, what).toBeLessThan(timeoutMs + slackMs + 3 * whole.ms)
  }
  rmSync(saveFolder(name), { recursive: true, force: true })
  return noticed
}

test.each(
  cases.map((how) => {
    const { signal, layout, maxRestarts, inSave } = how
    return [
      `${signal}, ${layout}${inSave ? ', in a save' : ''}${maxRestarts > 0 ? ', with a restart' : ''}`,
      how,
    ] as const
  }),
)('any one of the ranks is lost: %s', { timeout: 240_000 }, async (_what, how) => {
  const whole = await undisturbed(how.layout)
  for (let tries = 0; tries < 5; tries++) if (await loseRank(how, whole)) return
  throw new Error(`never came in time: ${JSON.stringify(how)}`)
})

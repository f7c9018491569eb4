// Two launchers on two hosts, which reach each other by network alone: the same losses as on one host, to the last bit, over the
// way that is asked for; a rank that is lost on one of them, or a host that is frozen or cut off, is named on both, and both start
// again.
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { plainEnvironment, viaductFile } from '../cli/commandLine.js'
import { temporaryFolder } from '../hostile/temporary.js'
import { addressOf, makeHosts, onHost, plug, removeHosts, sentBytes } from './hosts.js'
import { type Launched, leftWith, processesWith, startCommand } from './launched.js'

const home = temporaryFolder()
const full = process.env['VIADUCT_TEST_FULL'] !== undefined
const refusal = makeHosts()
afterAll(removeHosts)

interface Step {
  readonly step: number
  readonly loss: number
  readonly gradNorm: number
}

const metricsFile = (name: string) => join(home, `${name}.jsonl`)

function work(name: string, more: readonly string[]): string[] {
  return [
    viaductFile,
    'train',
    'llama_tiny_cpu_pretrain_config',
    'model.num_layers=2',
    'model.seq_length=64',
    'model.vocab_size=512',
    'model.hidden_dropout=0.1',
    'train.global_batch_size=8',
    'train.micro_batch_size=2',
    'train.train_iters=8',
    'scheduler.lr_decay_iters=100',
    `logger.metrics_file=${metricsFile(name)}`,
    'dist.distributed_timeout_minutes=0.2',
    ...more,
  ]
}

function stepsOf(name: string): Step[] {
  if (!existsSync(metricsFile(name))) return []
  return readFileSync(metricsFile(name), 'utf8')
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as Step & { kind: string })
    .filter(({ kind }) => kind === 'step')
    .map(({ step, loss, gradNorm }) => ({ step, loss, gradNorm }))
}

const environment = (more: Record<string, string> = {}) => ({
  ...plainEnvironment(),
  VIADUCT_NUM_THREADS: '1',
  ...more,
})

async function onOneHost(name: string, ranks: number, more: readonly string[]): Promise<Step[]> {
  const run = [viaductFile, 'run', '--nproc-per-node', String(ranks), ...work(name, more)]
  const { code, err } = await startCommand(process.execPath, run, environment()).ended
  expect(code, err).toBe(0)
  return stepsOf(name)
}

/** The launchers of both hosts, each with `ranks` ranks. */
function onTwoHosts(
  name: string,
  ranks: number,
  more: readonly string[],
  options: { readonly flags?: readonly string[]; readonly env?: Record<string, string> } = {},
): Launched[] {
  return ([1, 0] as const).map((host) => {
    const where = ['--nnodes', '2', '--node-rank', String(host), '--master-addr', addressOf(0, 0), '--rdzv-id', name]
    const run = ['run', '--nproc-per-node', String(ranks), ...where, ...(options.flags ?? [])]
    const [program = '', ...args] = onHost(host, [process.execPath, viaductFile, ...run, ...work(name, more)])
    return startCommand(program, args, environment({ ...options.env, HOST_UNDER_TEST: `${name}/${host}` }))
  })
}

/** Launcher, ranks and all else of a host. */
function signalHost(job: string, host: 0 | 1, signal: NodeJS.Signals): void {
  for (const pid of processesWith(`HOST_UNDER_TEST=${job}/${host}`)) process.kill(pid, signal)
}

let undisturbed: Promise<Step[]> | undefined

describe.skipIf(refusal !== null)(`two hosts${refusal === null ? '' : ` (no namespaces here: ${refusal})`}`, () => {
  let alone: Step[] = []
  beforeAll(async () => {
    alone = await onOneHost('alone', 1, [])
    expect(alone).toHaveLength(8)
  })

  test.each([
    ['tp 2', 'tp', 1, ['--tp', '2'], 0],
    ['dp 2, over the interface of GLOO_SOCKET_IFNAME', 'dp', 1, [], 1],
    ['tp 2 on each host, dp 2 across', 'both', 2, ['--tp', '2'], 0],
  ] as const)(
    'train as one does: %s',
    async (_what, name, ranks, layout, cable) => {
      const [before, other] = [sentBytes(1, cable), sentBytes(1, cable === 0 ? 1 : 0)]
      const env = cable === 1 ? { GLOO_SOCKET_IFNAME: 'eth1' } : {}
      const ends = await Promise.all(onTwoHosts(name, ranks, layout, { env }).map((launched) => launched.ended))
      for (const { code, err } of ends) expect(code, err).toBe(0)
      const steps = stepsOf(name)
      expect(steps).toEqual(await onOneHost(`${name}-one`, 2 * ranks, layout))
      for (const [i, { loss }] of steps.entries()) {
        // Other sums than one rank's: 1e-6 for ten steps.
        expect(Math.abs(loss / (alone[i] as Step).loss - 1)).toBeLessThan(1e-6)
      }
      // At least each step's sums, in float32, went over this cable; next to nothing over the other one.
      const sent = sentBytes(1, cable) - before
      expect(sent).toBeGreaterThan(8 * 100_000)
      expect(sentBytes(1, cable === 0 ? 1 : 0) - other).toBeLessThan(sent / 10)
    },
    120_000,
  )

  test.each(['SIGKILL', 'SIGSTOP'] as const)(
    '%s of a rank on the second host: both start again and end as if nothing had been',
    async (signal) => {
      const name = `again-${signal}`
      const more = ['--save', join(home, name), 'checkpoint.save_interval=2', 'train.train_iters=40']
      const flags = ['--max-restarts', '1', '--heartbeat-timeout', '4']
      const [second, first] = onTwoHosts(name, 1, more, { flags }) as [Launched, Launched]
      await first.until(/^\[rank0\] saved .*iter_0000004/m)
      const victim = processesWith(`TORCHELASTIC_RUN_ID=${name}`).find((pid) =>
        readFileSync(`/proc/${pid}/environ`, 'utf8').split('\0').includes('RANK=1'),
      )
      process.kill(victim as number, signal)
      const begin = performance.now()
      const [b, a] = await Promise.all([second.ended, first.ended])
      expect([a.code, b.code], `${a.err}${b.err}`).toEqual([0, 0])
      const cause = signal === 'SIGKILL' ? 'signal SIGKILL' : 'no heartbeat for'
      expect(b.err).toMatch(new RegExp(`rank 1 \\(local rank 0, process ${victim}\\) failed first on node 1: ${cause}`))
      expect(a.err).toMatch(/rank 1 .*failed first|node 1 ended the run: rank 1 /)
      expect(performance.now() - begin).toBeLessThan(40_000)
      await expectWhole(name)
      expect(await leftWith(`TORCHELASTIC_RUN_ID=${name}`)).toEqual([])
    },
    120_000,
  )

  /** Every step has the loss that it has when nobody disturbs the run. */
  async function expectWhole(name: string): Promise<void> {
    undisturbed ??= onOneHost('undisturbed', 2, ['train.train_iters=40'])
    const whole = await undisturbed
    const made = stepsOf(name)
    for (const step of made) expect(step).toEqual(whole[step.step - 1])
    expect(new Set(made.map(({ step }) => step)).size).toBe(40)
  }

  test.skipIf(!full).each(['frozen', 'cut off for good'] as const)(
    'a second host that is %s ends the job on both',
    async (how) => {
      const name = `lost-${how.replaceAll(' ', '-')}`
      const more = ['train.train_iters=2000', 'dist.distributed_timeout_minutes=10']
      const [second, first] = onTwoHosts(name, 1, more, { flags: ['--heartbeat-timeout', '4'] }) as [Launched, Launched]
      await first.until(/^\[rank0\] +4 /m)
      if (how === 'frozen') signalHost(name, 1, 'SIGSTOP')
      else plug(1, 0, 'down')
      const begin = performance.now()
      const a = await first.ended
      expect(performance.now() - begin).toBeLessThan(4000 + 5000)
      expect(a.code, a.err).toBe(4)
      expect(a.err).toMatch(
        /viaduct run: node 1 \(\S+ at 10\.213\.0\.2, rank 1\) failed first: its launcher gave no sign of life for/,
      )
      if (how === 'frozen') signalHost(name, 1, 'SIGCONT')
      const b = await second.ended
      plug(1, 0, 'up')
      expect(performance.now() - begin).toBeLessThan(how === 'frozen' ? 14_000 : 9000)
      expect(b.code, b.err).toBe(4)
      expect(b.err).toMatch(
        how === 'frozen'
          ? /the others ended the run without this node: node 1 /
          : /node 0 \(\S+ at 10\.213\.0\.1, rank 0\) failed first: its launcher has not answered for/,
      )
      expect(await leftWith(`TORCHELASTIC_RUN_ID=${name}`)).toEqual([])
    },
    60_000,
  )

  test.each(full ? (['SIGSTOP', 'cable'] as const) : (['cable'] as const))(
    'a second host that is lost for a while (%s): both start again when it is back and end as if nothing had been',
    async (how) => {
      const name = `back-${how}`
      const more = ['--save', join(home, name), 'checkpoint.save_interval=2', 'train.train_iters=40']
      const flags = ['--max-restarts', '1', '--heartbeat-timeout', '4']
      const [second, first] = onTwoHosts(name, 1, more, { flags }) as [Launched, Launched]
      await first.until(/^\[rank0\] saved .*iter_0000004/m)
      if (how === 'cable') plug(1, 0, 'down')
      else signalHost(name, 1, 'SIGSTOP')
      await first.until(/node 1 \(\S+ at 10\.213\.0\.2, rank 1\) failed first: [\s\S]* waiting up to 600 s for node 1 /)
      if (how === 'cable') {
        // Cut off it ends its rank by itself.
        await second.until(
          /node 0 \(\S+ at 10\.213\.0\.1, rank 0\) failed first: [\s\S]* waiting up to 600 s for node 0 /,
        )
        plug(1, 0, 'up')
      } else signalHost(name, 1, 'SIGCONT')
      const [b, a] = await Promise.all([second.ended, first.ended])
      expect([a.code, b.code], `${a.err}${b.err}`).toEqual([0, 0])
      await expectWhole(name)
      expect(await leftWith(`TORCHELASTIC_RUN_ID=${name}`)).toEqual([])
    },
    120_000,
  )
})

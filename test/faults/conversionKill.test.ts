// Conversions that are killed at any instant: run again they give the same bytes and redo what was not finished, no more.
// VIADUCT_TEST_KILLS says how often each is killed (default 2; 20 in `npm run test:full`).
import { spawn } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, test } from 'vitest'
import { writeSyntheticModel } from '../../bench/syntheticModel.js'
import { plainEnvironment, viaductFile } from '../cli/commandLine.js'
import { digestsOf, temporaryFolder } from '../hostile/temporary.js'

const home = temporaryFolder()
const kills = Number(process.env['VIADUCT_TEST_KILLS'] ?? (process.env['VIADUCT_TEST_FULL'] ? 20 : 2))

interface Ended {
  readonly code: number | null
  readonly stdout: string
  readonly stderr: string
  /** Milliseconds for which the unfinished folder was there, and parts in its journals when the process was killed. */
  readonly copying: number
  readonly parts: number
}

/** Parts that the journals of an unfinished folder tell of, whole lines only. */
function partsIn(folder: string): number {
  if (!existsSync(folder)) return 0
  const journals = readdirSync(folder).filter((name) => name.startsWith('journal-'))
  const lines = journals.flatMap((name) => readFileSync(join(folder, name), 'utf8').split('\n').slice(0, -1))
  return lines.filter((line) => line.includes('"part"')).length
}

/** Runs the command line; kills it and all its processes `after` milliseconds of copying. */
async function viaduct(args: readonly string[], folder: string, after = Number.POSITIVE_INFINITY): Promise<Ended> {
  const child = spawn(process.execPath, [viaductFile, ...args, '--json'], {
    cwd: home,
    env: plainEnvironment(),
    detached: true,
  })
  const said = { stdout: '', stderr: '' }
  child.stdout.on('data', (chunk) => (said.stdout += chunk))
  child.stderr.on('data', (chunk) => (said.stderr += chunk))
  let begun = 0
  let copying = 0
  const watch = setInterval(() => {
    if (!existsSync(folder)) return
    begun ||= performance.now()
    copying = performance.now() - begun
    if (copying >= after) process.kill(-(child.pid as number), 'SIGKILL')
  }, 1)
  const code = await new Promise<number | null>((done) => child.on('close', done))
  clearInterval(watch)
  return { code, ...said, copying, parts: partsIn(folder) }
}

/** Numbers from 0 to 1, always the same. */
function numbers(seed: number): () => number {
  let state = seed
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state / 2 ** 32
  }
}

beforeAll(async () => {
  writeSyntheticModel(join(home, 'hf'), 100e6)
  const made = await viaduct(['import', 'hf', 'ckpt', '--tp', '4', '--nproc-per-node', '1'], join(home, 'none'))
  expect(made.code, made.stderr).toBe(0)
})

describe('SIGKILL, and again', () => {
  test.each([
    ['import', ['import', 'hf', 'OUT', '--tp', '8', '--nproc-per-node', '1'], 'OUT/.iter_0000000.unfinished'],
    [
      'import by two processes',
      ['import', 'hf', 'OUT', '--tp', '8', '--nproc-per-node', '2'],
      'OUT/.iter_0000000.unfinished',
    ],
    ['export', ['export', 'ckpt', 'OUT', '--sha256'], '.OUT.unfinished'],
    ['another layout', ['import', 'ckpt', 'OUT', '--tp', '8', '--nproc-per-node', '1'], 'OUT/.iter_0000000.unfinished'],
  ])(
    '%s',
    async (what, command, hidden) => {
      const name = what.replaceAll(' ', '-')
      const into = (out: string) => command.map((word) => word.replace('OUT', out))
      const whole = await viaduct(into(name), join(home, hidden.replace('OUT', name)))
      expect(whole.code, whole.stderr).toBe(0)
      const expected = digestsOf(join(home, name))
      const random = numbers(7)
      let hits = 0
      // A process may end before its instant comes.
      for (let i = 0; hits < kills && i < 5 * kills; i++) {
        const out = `${name}-${i}`
        const folder = join(home, hidden.replace('OUT', out))
        const killed = await viaduct(into(out), folder, random() * whole.copying)
        if (killed.code !== 0) {
          hits++
          const again = await viaduct(into(out), folder)
          // Killed between its last step and its end it is complete, and refuses to be made again.
          if (again.code !== 0) expect(again.stdout).toContain('ERR_TARGET_EXISTS')
          else {
            const { parts, resumedParts, bytes, bytesWritten } = JSON.parse(again.stdout)
            expect(resumedParts, again.stderr).toBeGreaterThanOrEqual(killed.parts)
            // Nothing is written that was finished: the parts' shares, at least, are spared.
            expect(bytesWritten).toBeLessThanOrEqual(bytes * (1 - resumedParts / parts) * 1.5 + 100_000)
          }
        }
        expect(digestsOf(join(home, out))).toEqual(expected)
        expect(existsSync(folder)).toBe(false)
        rmSync(join(home, out), { recursive: true })
      }
      expect(hits).toBe(kills)
    },
    120_000 * kills,
  )
})

// `npm run bench:cuda -- --rehearse`: every step of the benchmark of GPUs, on the emulated one beside PyTorch on the CPU. The figures
// mean nothing; that each is there, and marked, is what holds.
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { realSizes, rehearsalSizes } from '../../bench/gpu/models.js'
import { dataSheet, describeGpu, loadOf } from '../../bench/gpu/nvidia.js'
import { type Ceilings, type GpuRow, gpuTable, reached } from '../../bench/gpu/rows.js'
import { opCases } from '../../bench/opCases.js'
import { findPython } from '../../bench/peers.js'
import { packageRoot } from '../../lib/base/packageRoot.js'
import { gpuSetupTimeout } from './gpu.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-bench-test-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

function python(): string | null {
  try {
    return findPython(process.env['VIADUCT_BENCH_PYTHON'] ?? process.env['VIADUCT_ORACLE_PYTHON'])
  } catch {
    return null
  }
}

function bench(args: readonly string[]) {
  const script = join(packageRoot(), 'bench/cuda.ts')
  const env = { ...process.env, VIADUCT_CUDA_PLUGIN: 'none' }
  return spawnSync(process.execPath, ['--import', 'tsx', script, ...args], { encoding: 'utf8', env })
}

it('rehearses every section', { timeout: gpuSetupTimeout }, ({ skip }) => {
  const found = python()
  if (found === null) return skip('no Python with torch: VIADUCT_BENCH_PYTHON')
  const { status, stdout, stderr } = bench(['--rehearse', '--python', found, '--results', folder])
  expect({ status, stderr }).toMatchObject({ status: 0 })
  expect(stdout).toContain('REHEARSAL, no figure of a GPU')
  const [file] = readdirSync(folder)
  const { rows } = JSON.parse(readFileSync(join(folder, file as string), 'utf8')) as { rows: GpuRow[] }
  expect(rows.filter((row) => !row.rehearsal || row.failure !== undefined)).toEqual([])
  const of = (section: string) => rows.filter((row) => row.section === section)
  expect(of('ops').map(({ work }) => work)).toEqual(Object.keys(opCases(rehearsalSizes.ops)))
  for (const { work, ours } of of('ops')) expect(ours, work).toMatchObject({ ofCeiling: expect.any(Number) })
  expect(of('train')).toHaveLength(realSizes.trainings.length)
  for (const row of of('train')) {
    expect(row.parity).toMatch(/^losses of 2 steps within/)
    expect(row.ours).toMatchObject({
      ...{ tflops: expect.any(Number), tokensPerSecond: expect.any(Number), ofCeiling: expect.any(Number) },
      ...{ peakBytes: expect.any(Number), busyByEvents: expect.any(Number) },
    })
    expect(row.theirs?.ofCeiling).toBeGreaterThan(0)
  }
  expect(of('decode')).toHaveLength(2)
  expect(of('import')[0]?.theirs?.gigabytesPerSecond).toBeGreaterThan(0)
})

it('says what is missing where there is no GPU', () => {
  const { status, stderr } = bench([])
  expect(status).toBe(1)
  expect(stderr).toMatch(/expected a GPU, got none:\n {2}no CUDA plug-in is built/)
  if (describeGpu() === null) expect(stderr).toContain('nvidia-smi tells of no GPU')
})

it('does not write a rehearsal among the results', () => {
  const { status, stderr } = bench(['--rehearse', '--results', join(packageRoot(), 'bench/results')])
  expect(status).toBe(1)
  expect(stderr).toContain('a rehearsal is no result')
})

describe('figures', () => {
  const ceilings: Ceilings = {
    products: { bfloat16: 800, float32: 50 },
    copy: 3000,
    dataSheet: dataSheet('NVIDIA H100 80GB HBM3'),
  }

  it('hold products to products and bytes to copies', () => {
    expect(reached(1e-3, { flops: 4e11, bytes: 1e9 }, ceilings)).toMatchObject({ tflops: 400, ofCeiling: 0.5 })
    expect(reached(1e-3, { flops: 4e11 }, ceilings).ofDataSheet).toBeCloseTo(400 / 989.4)
    expect(reached(1e-3, { flops: 25e9, dtype: 'float32' }, ceilings)).toEqual({
      seconds: 1e-3,
      tflops: 25,
      ofCeiling: 0.5,
    })
    expect(reached(1e-3, { bytes: 1.5e9 }, ceilings)).toMatchObject({ gigabytesPerSecond: 1500, ofCeiling: 0.5 })
  })

  it('know the data sheets', () => {
    expect(
      ['NVIDIA H200', 'NVIDIA H100 PCIe', 'NVIDIA A100-SXM4-40GB', 'NVIDIA T4'].map((name) => dataSheet(name)),
    ).toEqual([
      { tflops: 989.4, gigabytesPerSecond: 4800 },
      { tflops: 756, gigabytesPerSecond: 2000 },
      { tflops: 312, gigabytesPerSecond: 1555 },
      null,
    ])
  })

  it('are means over samples, of the memory the most', () => {
    const samples = [
      [100, 600, 1900, 5000],
      [50, 400, 1700, 7000],
    ]
    expect(loadOf(samples)).toEqual({ utilisation: 0.75, watts: 500, clockMhz: 1800, mostMemoryMib: 7000, samples: 2 })
    expect(loadOf([])).toBeNull()
  })

  it('stand in the table, failures too', () => {
    const row = { work: 'w', peer: null, theirs: null, ratio: null, ours: reached(2e-4, { bytes: 3e8 }, ceilings) }
    expect(gpuTable([row as never])).toContain('| w | 200 µs | 1500 GB/s | 50% | 45% |')
    expect(gpuTable([{ ...row, ours: null, failure: 'out of memory\nmore' } as never])).toContain(
      'FAILED: out of memory |',
    )
  })
})

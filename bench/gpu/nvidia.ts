// What nvidia-smi says of the GPU: its description, and how busy it is while something runs. Beside it the figures of data sheets.
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { createInterface } from 'node:readline'

/** The GPU of a result. */
export interface GpuFacts {
  readonly name: string
  readonly driver: string
  readonly memoryMib: number
  readonly powerLimitWatts: number
  readonly maxClockMhz: number
  /** GPUs of the machine. */
  readonly count: number
}

/** Means over the samples of a window. */
export interface Load {
  /** Share of time in which some kernel ran, by NVML's own sampling: not how full the GPU was. */
  readonly utilisation: number
  readonly watts: number
  readonly clockMhz: number
  /** The most that all processes together held. */
  readonly mostMemoryMib: number
  readonly samples: number
}

const query = (fields: string, ...more: string[]) => [`--query-gpu=${fields}`, '--format=csv,noheader,nounits', ...more]
const cells = (line: string) => line.split(',').map((cell) => cell.trim())

/** The first GPU; null where there is no nvidia-smi or no GPU. */
export function describeGpu(): GpuFacts | null {
  const { status, stdout } = spawnSync(
    'nvidia-smi',
    query('name,driver_version,memory.total,power.limit,clocks.max.sm'),
    { encoding: 'utf8' },
  )
  if (status !== 0) return null
  const lines = stdout.trim().split('\n').filter(Boolean)
  const [name, driver, memory, power, clock] = cells(lines[0] ?? '')
  if (name === undefined || driver === undefined) return null
  const facts = { memoryMib: Number(memory), powerLimitWatts: Number(power), maxClockMhz: Number(clock) }
  return { name, driver, ...facts, count: lines.length }
}

const sampleMilliseconds = 100

/** Runs `work` while nvidia-smi samples the first GPU; the load is null where there is none. */
export async function watched<T>(work: () => Promise<T>): Promise<{ result: T; load: Load | null }> {
  const samples: number[][] = []
  const fields = 'utilization.gpu,power.draw,clocks.sm,memory.used'
  const child: ChildProcess = spawn('nvidia-smi', query(fields, '-i', '0', '-lms', String(sampleMilliseconds)), {
    stdio: ['ignore', 'pipe', 'ignore'],
  })
  child.on('error', () => {}) // not here
  if (child.stdout !== null)
    createInterface({ input: child.stdout }).on('line', (line) => {
      const values = cells(line).map(Number)
      if (values.length === 4 && values.every(Number.isFinite)) samples.push(values)
    })
  try {
    const result = await work()
    return { result, load: loadOf(samples) }
  } finally {
    child.kill()
  }
}

/** Means of [utilisation in %, watts, MHz, MiB]; of the memory the most. */
export function loadOf(samples: readonly (readonly number[])[]): Load | null {
  if (samples.length === 0) return null
  const mean = (column: number) => samples.reduce((sum, row) => sum + (row[column] ?? 0), 0) / samples.length
  return {
    utilisation: mean(0) / 100,
    watts: mean(1),
    clockMhz: mean(2),
    mostMemoryMib: Math.max(...samples.map((row) => row[3] ?? 0)),
    samples: samples.length,
  }
}

/** Dense bfloat16 products and memory bandwidth as NVIDIA's data sheets give them. */
export interface DataSheet {
  readonly tflops: number
  readonly gigabytesPerSecond: number
}

const sheets: readonly (readonly [RegExp, DataSheet])[] = [
  [/B200/, { tflops: 2250, gigabytesPerSecond: 8000 }],
  [/H200/, { tflops: 989.4, gigabytesPerSecond: 4800 }],
  [/H100 NVL/, { tflops: 835, gigabytesPerSecond: 3900 }],
  [/H100 PCIe/, { tflops: 756, gigabytesPerSecond: 2000 }],
  [/H100/, { tflops: 989.4, gigabytesPerSecond: 3350 }],
  [/A100.*40GB/, { tflops: 312, gigabytesPerSecond: 1555 }],
  [/A100.*PCI/, { tflops: 312, gigabytesPerSecond: 1935 }],
  [/A100/, { tflops: 312, gigabytesPerSecond: 2039 }],
]

/** Of a GPU by its name; null where this table does not know it. */
export function dataSheet(name: string): DataSheet | null {
  return sheets.find(([pattern]) => pattern.test(name))?.[1] ?? null
}

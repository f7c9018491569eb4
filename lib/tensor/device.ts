// An open device: its compute stream, memory counters and threads. One object for each kind and thread of the program.
import { availableParallelism } from 'node:os'
import type { DeviceInfo, MemoryStats } from '../addon/functions.js'
import { native } from '../addon/load.js'
import { type DType, dtypes } from '../base/dtype.js'
import { envFlag, envInt, envText } from '../base/env.js'
import { cudaState, openCuda } from './cuda.js'
import { Stream } from './stream.js'

/** What a program asks for; `auto` takes the best that this build and machine have. */
export type DeviceKind = 'auto' | 'cpu' | 'cuda'

const opened = new Map<string, Device>()

let found: 'cpu' | 'cuda' | undefined

/** What `auto` means on this machine; looked for once. */
function best(): 'cpu' | 'cuda' {
  found ??= cudaState().devices > 0 ? 'cuda' : 'cpu'
  return found
}

export class Device {
  readonly #communication = new Map<string, Stream>()

  private constructor(
    /** The native index. */
    readonly index: number,
    /** The backend's name. */
    readonly kind: 'cpu' | 'cuda',
    /** Where ops of the model are enqueued. */
    readonly stream: Stream,
  ) {}

  /**
   * Opens a device, once a thread: later calls give the same object. `auto` is the GPU of this rank where CUDA finds one, else
   * the CPU. The first call sets the threads of the CPU's kernels (`VIADUCT_NUM_THREADS`, else `OMP_NUM_THREADS`, else cores /
   * local ranks), the limit `VIADUCT_MEMORY_LIMIT` and a GPU's engines (`VIADUCT_MATMUL_ENGINE`,
   * `VIADUCT_GROUPED_MATMUL_ENGINE`, `VIADUCT_ATTENTION_ENGINE`, `VIADUCT_ALLOW_NONDETERMINISTIC_ALGO`).
   * @throws ERR_UNSUPPORTED when this machine or build has no such device; the message says what to do.
   */
  static open(kind: DeviceKind = 'auto'): Device {
    const wanted = kind === 'auto' ? best() : kind
    const existing = opened.get(wanted)
    if (existing !== undefined) return existing
    const index = wanted === 'cuda' ? openCuda() : native.openDevice('cpu')
    const device = new Device(index, wanted, Stream.create(index, 'compute'))
    if (wanted === 'cpu') {
      const localRanks = Math.max(1, envInt('LOCAL_WORLD_SIZE') ?? 1)
      const share = Math.floor(availableParallelism() / localRanks)
      device.threads = Math.max(1, envInt('VIADUCT_NUM_THREADS') ?? envInt('OMP_NUM_THREADS') ?? share)
    }
    const matmul = envText('VIADUCT_MATMUL_ENGINE')
    if (wanted === 'cuda' && matmul !== undefined) native.setMatmulEngine(index, matmul)
    const grouped = envText('VIADUCT_GROUPED_MATMUL_ENGINE')
    if (wanted === 'cuda' && grouped !== undefined) native.setGroupedMatmulEngine(index, grouped)
    const attention = envText('VIADUCT_ATTENTION_ENGINE')
    if (wanted === 'cuda' && attention !== undefined) native.setAttentionEngine(index, attention)
    native.allowNondeterministic(index, envFlag('VIADUCT_ALLOW_NONDETERMINISTIC_ALGO'))
    const limit = envInt('VIADUCT_MEMORY_LIMIT')
    if (limit !== undefined) device.setMemoryLimit(limit)
    opened.set(wanted, device)
    return device
  }

  /**
   * The host's memory beside a device: an arena and counters of its own, streams of the same processor. Opened at the first call.
   * `native.copyBetween` on a stream of a device carries tensors over.
   */
  static host(): Device {
    const existing = opened.get('host')
    if (existing !== undefined) return existing
    const index = native.openDevice('host')
    const device = new Device(index, 'cpu', Stream.create(index, 'host'))
    opened.set('host', device)
    return device
  }

  /** Name, one line of description and threads, for `doctor` and the first line of a run. */
  get info(): DeviceInfo {
    return native.deviceInfo(this.index)
  }

  /** Bytes handed out, their peak, bytes taken from the system. */
  memory(): MemoryStats {
    return native.memoryStats(this.index)
  }

  /** The peak starts again from what is live now. */
  resetPeak(): void {
    native.resetPeak(this.index)
  }

  /** Tensors beyond this many bytes are refused with ERR_OUT_OF_MEMORY; 0: no limit. */
  setMemoryLimit(bytes: number): void {
    native.setMemoryLimit(this.index, bytes)
  }

  /** Waits for all streams and gives unused memory back to the system. Returns the bytes. */
  trim(): number {
    return native.trimMemory(this.index)
  }

  /** Threads of the kernels, process-wide. */
  get threads(): number {
    return native.deviceInfo(this.index).threads
  }

  set threads(count: number) {
    native.setNumThreads(this.index, count)
  }

  /** Null when the op runs for this dtype here, else the reason why not. */
  whyUnsupported(op: string, dtype: DType): string | null {
    const code = dtypes[dtype].code
    if (code < 0) return `${dtype} is a dtype of files only`
    return native.supports(this.index, op, code) || null
  }

  /** Another stream beside the compute stream, e.g. for communication. The caller disposes it. */
  createStream(name: string): Stream {
    return Stream.create(this.index, name)
  }

  /** A stream for what travels beside compute, made when it is first asked for: of collectives one a mesh axis, of copies to the host. */
  communication(axis: string): Stream {
    const stream = this.#communication.get(axis) ?? this.createStream(`communication ${axis}`)
    this.#communication.set(axis, stream)
    return stream
  }

  /** Live tensors of this thread; equal after step N and step N + 1. */
  liveSlots(): number {
    return native.liveSlots()
  }
}

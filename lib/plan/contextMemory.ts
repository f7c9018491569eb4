// What attention over shared sequences (lib/parallel/contextAttention.ts) has in memory while it runs, beside its inputs, outputs and
// their gradients, in bytes: one term a tensor of gatheredAttention.ts, ringAttention.ts and headExchange.ts.
import { contextSizes, type ParallelConfig } from '../parallel/config.js'

/** At the worst moment of each pass. */
export interface ContextMemory {
  readonly forward: number
  readonly backward: number
}

/** Elements of a rank's queries, and of its keys and values together; bytes of one. */
interface OwnTokens {
  readonly queries: number
  readonly keys: number
  readonly bytes: number
}

/** Keys and values of all ranks, backwards also the sums of their gradients, the other run's part, what is exchanged, what comes back. */
function gathered({ keys, bytes }: OwnTokens, cp: number): ContextMemory {
  return { forward: 1.5 * cp * keys * bytes, backward: (3.5 * cp + 1) * keys * bytes }
}

/** Two blocks of keys and values; what one run of queries got of one of keys; sums in float32. */
function ring({ queries, keys, bytes }: OwnTokens): ContextMemory {
  const sums = bytes === 4 ? 0 : 4 * queries
  return {
    forward: 2 * keys * bytes + (queries / 2) * bytes + sums,
    // Of the rank's own keys three pairs of runs are seen.
    backward: (2 + 1.5) * keys * bytes + 2 * 4 * keys + 4 * queries + (queries / 2) * bytes,
  }
}

/** What is sent and received, and attention between. */
function exchanged({ queries, keys, bytes }: OwnTokens, inside: ContextMemory): ContextMemory {
  const [y, qkv] = [queries * bytes, (queries + keys) * bytes]
  return {
    forward: Math.max(3 * qkv, qkv + 3 * y, qkv + y + inside.forward),
    backward: Math.max(4 * y, 2 * y + 3 * qkv, 2 * y + qkv + inside.backward),
  }
}

export function contextMemory(parallel: ParallelConfig, own: OwnTokens): ContextMemory {
  const none = { forward: 0, backward: 0 }
  if (parallel.contextParallelSize === 1) return none
  const sizes = contextSizes(parallel)
  if (sizes.heads * sizes.ring === 1) return gathered(own, parallel.contextParallelSize)
  const inside = sizes.ring > 1 ? ring(own) : none
  return sizes.heads > 1 ? exchanged(own, inside) : inside
}

// What runs of worker.ts left in a folder: steps and checkpoints under their names, and whether two of them are the same bits.
import { join } from 'node:path'
import { expect } from 'vitest'
import { openCheckpoint } from '../../lib/checkpoint/checkpointIndex.js'
import { loadCheckpoint } from '../../lib/checkpoint/loadCheckpoint.js'
import { Ctx, Tensor } from '../../lib/tensor/index.js'
import { replicated } from '../../lib/tensor/shardSpec.js'
import { type Step, steps } from './startRanks.js'
import type { Work } from './worker.js'

export class SavedRuns {
  constructor(readonly folder: string) {}

  place(name: string): string {
    return join(this.folder, name)
  }

  /** A run that leaves its steps and a checkpoint under its name. */
  named(name: string, work: Work): Work {
    return { metrics: this.place(`${name}.jsonl`), save: this.place(name), ...work }
  }

  /** Losses and norms as they were, to the last bit. */
  curve(name: string): Pick<Step, 'step' | 'loss' | 'gradNorm'>[] {
    return steps(this.place(`${name}.jsonl`)).map(({ step, loss, gradNorm }: Step) => ({ step, loss, gradNorm }))
  }

  /** Bytes of all tensors of a checkpoint, weights and optimizer state, however they are cut. */
  async contents(name: string): Promise<Map<string, Uint8Array>> {
    const ctx = Ctx.create({ device: 'cpu' })
    const checkpoint = await openCheckpoint(this.place(name))
    const wanted = [...checkpoint.tensors].map(([key, { shape, dtype }]) => ({
      name: key,
      tensor: Tensor.zeros(ctx, shape, dtype),
      shard: replicated(shape),
    }))
    await loadCheckpoint(checkpoint, wanted)
    const bytes = new Map<string, Uint8Array>()
    for (const { name: key, tensor } of wanted) bytes.set(key, await tensor.bytes())
    ctx.scope.close()
    return bytes
  }

  /** Checkpoints of the same tensors with the same bytes. */
  async expectSameContents(a: string, b: string): Promise<void> {
    const [left, right] = [await this.contents(a), await this.contents(b)]
    expect([...left.keys()].sort()).toEqual([...right.keys()].sort())
    expect([...left.keys()].filter((key) => key.startsWith('optimizer.exp_avg_sq.')).length).toBeGreaterThan(10)
    for (const [key, bytes] of left) expect(Buffer.compare(bytes, right.get(key) as Uint8Array), key).toBe(0)
  }

  async expectSameBits(a: string, b: string, length: number): Promise<void> {
    expect(this.curve(a).length).toBe(length)
    expect(this.curve(a)).toEqual(this.curve(b))
    await this.expectSameContents(a, b)
  }
}

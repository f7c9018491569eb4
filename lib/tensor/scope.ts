// Scopes own the tensors that ops make and free them together. See docs/runtime.md, section 2.
import type { Ctx } from './ctx.js'
import { Tensor } from './tensor.js'

/** Owner of new tensors. Closing it drops the reference that it holds on each. */
export class Scope {
  #tensors: Tensor[] = []
  #closed = false

  /** Takes ownership of a tensor's first reference. */
  track(tensor: Tensor): void {
    tensor.scope = this
    this.#tensors.push(tensor)
    if (this.#closed) this.close()
  }

  /** Tensors that this scope still owns. */
  get size(): number {
    let count = 0
    for (const tensor of this.#tensors) if (tensor.scope === this) count++
    return count
  }

  /** Drops what the scope owns. Idempotent; a tensor tracked later is dropped at once. */
  close(): void {
    this.#closed = true
    this.drain()
  }

  /** Drops what the scope owns now; it stays open. */
  drain(): void {
    if (this.#tensors.length === 0) return
    const tensors = this.#tensors
    this.#tensors = []
    for (const tensor of tensors) if (tensor.scope === this) tensor.dispose()
  }

  [Symbol.dispose](): void {
    this.close()
  }
}

/** Calls `f` for each tensor in a tensor, or in arrays and plain records of tensors. */
export function forEachTensor(value: unknown, f: (tensor: Tensor) => void): void {
  if (value instanceof Tensor) {
    f(value)
  } else if (Array.isArray(value)) {
    for (const item of value) forEachTensor(item, f)
  } else if (typeof value === 'object' && value !== null) {
    const prototype: unknown = Object.getPrototypeOf(value)
    if (prototype === Object.prototype || prototype === null) {
      for (const item of Object.values(value)) forEachTensor(item, f)
    }
  }
}

/**
 * Runs `body` with a scope of its own. Tensors in its result (a tensor, or arrays and plain records of tensors) move to
 * `ctx.scope`; all others that it made are freed when it ends, also when it throws.
 */
export async function withScope<T>(ctx: Ctx, body: (inner: Ctx) => T | Promise<T>): Promise<T> {
  const scope = new Scope()
  try {
    const result = await body(ctx.with({ scope }))
    forEachTensor(result, (tensor) => {
      if (tensor.scope === scope) ctx.scope.track(tensor)
    })
    return result
  } finally {
    scope.close()
  }
}

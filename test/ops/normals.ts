// Normal numbers that depend on a name alone, for tests.

/** A generator of standard normal numbers, seeded by `name`. */
export function normals(name: string): () => number {
  let state = 2166136261
  for (const c of name) state = Math.imul(state ^ c.charCodeAt(0), 16777619)
  const uniform = () => {
    // mulberry32
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), 1 | state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296
  }
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform())
}

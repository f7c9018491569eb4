// Reads fields of a Hugging Face config with checks and collects every problem, so that one error lists them all. null means
// absent, as in Python; {"__float__": "Infinity"} means the number.
import { ViaductError } from '../base/errors.js'
import type { HfConfig, HfValue } from './family.js'

export class ConfigReader {
  readonly #problems: string[] = []

  constructor(
    readonly config: HfConfig,
    readonly family: string,
    /** Put before names in messages, e.g. `rope_scaling.`. */
    readonly prefix = '',
    problems?: string[],
  ) {
    if (problems) this.#problems = problems
  }

  /** Adds a problem to the list. */
  problem(text: string): void {
    this.#problems.push(text)
  }

  /** True when the field is there and not null. */
  has(key: string): boolean {
    return this.get(key) !== undefined
  }

  /** The field, or undefined when it is absent or null. */
  get(key: string): HfValue | undefined {
    const value = Object.hasOwn(this.config, key) ? this.config[key] : undefined
    return value === null ? undefined : value
  }

  /** A reader of a nested object, or null when it is absent. Problems go to the same list. */
  nested(key: string): ConfigReader | null {
    const value = this.get(key)
    if (value === undefined) return null
    if (typeof value === 'object' && !Array.isArray(value))
      return new ConfigReader(value as HfConfig, this.family, `${this.prefix}${key}.`, this.#problems)
    this.problem(`${this.prefix}${key} must be an object, got ${JSON.stringify(value)}`)
    return null
  }

  /** A whole number from 1 (or min) to `max`. A broken value gives 1, after the problem was noted. */
  count(key: string, limits: { readonly min?: number; readonly max: number; readonly fallback?: number }): number {
    const { min = 1, max, fallback } = limits
    const value = this.get(key) ?? fallback
    if (value === undefined) this.problem(`${this.prefix}${key} is missing`)
    else if (typeof value !== 'number' || !Number.isInteger(value))
      this.problem(`${this.prefix}${key} must be a whole number, got ${JSON.stringify(value)}`)
    else if (value < min || value > max)
      this.problem(`${this.prefix}${key} must be from ${min} to ${max}, got ${value}`)
    else return value
    return min
  }

  /** A finite number within limits. */
  real(key: string, limits: { readonly min?: number; readonly max?: number; readonly fallback?: number } = {}): number {
    const { min = -Number.MAX_VALUE, max = Number.MAX_VALUE, fallback } = limits
    const value = floatOf(this.get(key)) ?? fallback
    if (value === undefined) this.problem(`${this.prefix}${key} is missing`)
    else if (typeof value !== 'number')
      this.problem(`${this.prefix}${key} must be a number, got ${JSON.stringify(value)}`)
    else if (!(value >= min && value <= max))
      this.problem(
        `${this.prefix}${key} must be a finite number${limits.min === undefined ? '' : ` of at least ${min}`}${limits.max === undefined ? '' : ` and at most ${max}`}, got ${value}`,
      )
    else return value
    return fallback ?? 1
  }

  /** As `real`, or undefined when the field is absent. */
  optionalReal(key: string, limits: { readonly min?: number; readonly max?: number } = {}): number | undefined {
    return this.has(key) ? this.real(key, limits) : undefined
  }

  flag(key: string, fallback: boolean): boolean {
    const value = this.get(key) ?? fallback
    if (typeof value === 'boolean') return value
    this.problem(`${this.prefix}${key} must be true or false, got ${JSON.stringify(value)}`)
    return fallback
  }

  text(key: string, fallback: string): string {
    const value = this.get(key) ?? fallback
    if (typeof value === 'string') return value
    this.problem(`${this.prefix}${key} must be a string, got ${JSON.stringify(value)}`)
    return fallback
  }

  /** @throws ERR_HF_CONFIG when there are problems, listing all. */
  finish(): void {
    if (this.#problems.length === 0) return
    throw new ViaductError('ERR_HF_CONFIG', `${this.family} config`, this.#problems.join('; '), {
      problems: [...this.#problems],
    })
  }
}

/** Transformers 5 writes non-finite floats as {"__float__": "Infinity"}. */
function floatOf(value: HfValue | undefined): HfValue | undefined {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return value
  const spelled = (value as HfConfig)['__float__']
  return typeof spelled === 'string' ? Number(spelled) : value
}

// Text on top of a RunConfig: `section.key=value` from a command line, and YAML files. Here, and only here, snake_case keys are
// accepted, so that lines of Megatron-Bridge's documentation work when they are pasted.
import { parse, stringify } from 'yaml'
import { ViaductError } from '../base/errors.js'
import { keyMeant, unknownKey } from '../base/sealed.js'
import { type RunConfig, sectionNames } from './runConfig.js'

type Plain = { [key: string]: unknown }

const topKeys = ['model', ...sectionNames, 'mixedPrecision']
/** The model's functions and runtime objects are no text. */
function isData(key: string, value: unknown): boolean {
  if (key === 'weightsLoader') return false
  return (
    value === null || ['string', 'number', 'boolean'].includes(typeof value) || Array.isArray(value) || isPlain(value)
  )
}

function isPlain(value: unknown): value is Plain {
  if (typeof value !== 'object' || value === null) return false
  const prototype: unknown = Object.getPrototypeOf(value)
  return prototype === Object.prototype || prototype === null
}

/** camelCase, snake_case and other spellings of the same letters are accepted; anything else is not. */
function exactKey(where: string, key: string, known: readonly string[]): string {
  const meant = known.includes(key) ? key : keyMeant(key, known)
  const letters = (text: string) => text.replaceAll('_', '').toLowerCase()
  if (meant === undefined || letters(meant) !== letters(key)) throw unknownKey(where, key, known)
  return meant
}

/**
 * Applies `section.key=value` lines, e.g. `train.train_iters=10`, `model.tensorModelParallelSize=2`, `mixed_precision=fp32`.
 * Values are YAML: `null`, `true`, `1e-4`, `[a, b]`, text.
 * @throws ERR_CONFIG for unknown keys (naming the nearest) and lines without `=`.
 */
export function applyOverrides(config: RunConfig, overrides: readonly string[]): void {
  for (const line of overrides) {
    const equals = line.indexOf('=')
    if (equals < 1) {
      throw new ViaductError('ERR_CONFIG', 'overrides', `expected section.key=value, got ${JSON.stringify(line)}`)
    }
    const path = line.slice(0, equals).trim().replace(/^\++/, '').split('.')
    const text = line.slice(equals + 1)
    let value: unknown
    try {
      value = parse(text)
    } catch (cause) {
      throw new ViaductError(
        'ERR_CONFIG',
        'overrides',
        `the value of ${line} is no YAML: ${(cause as Error).message}`,
        {},
        { cause },
      )
    }
    assign(config, path, value, line)
  }
}

function assign(config: RunConfig, path: readonly string[], value: unknown, line: string): void {
  const [first, second, ...rest] = path
  const top = exactKey('overrides', first ?? '', topKeys)
  const tree = config as unknown as Plain
  if (top === 'mixedPrecision' && second === undefined) {
    tree[top] = value
    return
  }
  if (second === undefined || top === 'mixedPrecision' || rest.length > 0) {
    throw new ViaductError(
      'ERR_CONFIG',
      'overrides',
      `expected section.key=value with one section, got ${JSON.stringify(line)}`,
    )
  }
  const section = tree[top] as Plain
  section[exactKey(`overrides: ${top}`, second, Object.keys(section))] = numeric(top, second, section, value)
}

/** YAML 1.2 reads `1e-4` as a number but `1_000` as text; numbers in fields of text stay text. */
function numeric(top: string, key: string, section: Plain, value: unknown): unknown {
  const before = section[exactKey(top, key, Object.keys(section))]
  if (typeof before === 'number' && typeof value === 'string' && value.trim() !== '') {
    const number = Number(value.replaceAll('_', ''))
    if (!Number.isNaN(number)) return number
  }
  if (typeof before === 'string' && typeof value === 'number') return String(value)
  return value
}

/**
 * Applies a YAML document of the tree's form; missing keys stay as they are.
 * @throws ERR_CONFIG for unknown keys and for what is no mapping.
 */
export function applyYaml(config: RunConfig, text: string): void {
  let document: unknown
  try {
    document = parse(text)
  } catch (cause) {
    throw new ViaductError('ERR_CONFIG', 'yaml', (cause as Error).message, {}, { cause })
  }
  if (document === null) return
  if (!isPlain(document))
    throw new ViaductError('ERR_CONFIG', 'yaml', 'expected sections with keys, got a single value')
  for (const [name, value] of Object.entries(document)) {
    const top = exactKey('yaml', name, topKeys)
    if (top === 'mixedPrecision') {
      ;(config as unknown as Plain)[top] = value
      continue
    }
    if (!isPlain(value))
      throw new ViaductError('ERR_CONFIG', 'yaml', `expected keys below ${name}, got ${JSON.stringify(value)}`)
    const section = (config as unknown as Plain)[top] as Plain
    for (const [key, entry] of Object.entries(value)) {
      section[exactKey(`yaml: ${top}`, key, Object.keys(section))] = entry
    }
  }
}

/** The tree as plain data, functions left out. */
export function toPlain(config: RunConfig): Plain {
  const plain: Plain = {}
  for (const key of topKeys) {
    const value = (config as unknown as Plain)[key]
    plain[key] =
      typeof value === 'object' && value !== null
        ? Object.fromEntries(
            Object.keys(value).flatMap((k) => (isData(k, (value as Plain)[k]) ? [[k, (value as Plain)[k]]] : [])),
          )
        : value
  }
  return plain
}

/** The tree as YAML: what `applyYaml` reads back. Written beside each checkpoint as run_config.yaml. */
export function toYaml(config: RunConfig): string {
  return stringify(toPlain(config))
}

/**
 * Lays a YAML document over a configuration and returns it.
 * @throws ERR_CONFIG for unknown keys, naming the nearest.
 */
export function fromYaml(text: string, base: RunConfig): RunConfig {
  applyYaml(base, text)
  return base
}

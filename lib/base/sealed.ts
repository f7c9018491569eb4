// Sealed objects: configs and providers whose unknown keys throw at the assignment and name the key that was meant.
// Convention: keys are camelCase; snake_case is only converted where text comes in (command line, YAML), never here.
import { nearest, ViaductError } from './errors.js'

/** `train_iters` to `trainIters`; what has no underscore stays. */
export function camelCase(key: string): string {
  return key.replace(/(?<=[A-Za-z0-9])_+([A-Za-z0-9])/g, (_, letter: string) => letter.toUpperCase())
}

/** `trainIters` to `train_iters`. */
export function snakeCase(key: string): string {
  return key.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`)
}

/** The known key that `key` means: its camelCase form, the same letters, or the nearest in spelling. */
export function keyMeant(key: string, known: Iterable<string>): string | undefined {
  const list = [...known]
  const camel = camelCase(key)
  if (list.includes(camel)) return camel
  const letters = (text: string) => text.replaceAll('_', '').toLowerCase()
  return list.find((name) => letters(name) === letters(key)) ?? nearest(camel, list)
}

/** The error for a key that an object does not have. */
export function unknownKey(where: string, key: string, known: Iterable<string>): ViaductError {
  const list = [...known]
  const meant = keyMeant(key, list)
  const advice = meant === undefined ? `the keys are ${list.join(', ')}` : `write ${meant}`
  return new ViaductError('ERR_CONFIG', where, `expected a known key, got ${JSON.stringify(key)}: ${advice}`, {
    key,
    ...(meant === undefined ? {} : { meant }),
  })
}

export interface SealOptions {
  /** Sees each assignment before it is made and returns what is stored; may throw. */
  readonly check?: (key: string, value: unknown) => unknown
  /** True once the object may not change any more. */
  readonly frozen?: () => boolean
}

/**
 * A view of `target` that refuses unknown keys. Reading a key that is a misspelling of a known one throws as well, so that
 * `cfg.tarin.trainIters = 1` names `train`.
 * @param where - begins the error, e.g. `config.train`.
 */
export function sealed<T extends object>(target: T, where: string, options: SealOptions = {}): T {
  const change = (object: T, key: string | symbol, value: unknown): boolean => {
    if (options.frozen?.()) {
      throw new ViaductError(
        'ERR_CONFIG',
        where,
        `${String(key)} cannot change: the configuration is final, set it before`,
      )
    }
    if (typeof key === 'symbol') return Reflect.set(object, key, value)
    if (!(key in object)) throw unknownKey(where, key, Object.keys(object))
    if (value === undefined) {
      throw new ViaductError('ERR_CONFIG', where, `expected a value for ${key}, got undefined: null means none`)
    }
    return Reflect.set(object, key, options.check ? options.check(key, value) : value)
  }
  return new Proxy(target, {
    get(object, key) {
      if (typeof key === 'string' && !(key in object)) {
        const meant = keyMeant(key, Object.keys(object))
        if (meant !== undefined) throw unknownKey(where, key, Object.keys(object))
      }
      const value: unknown = Reflect.get(object, key, object)
      return value
    },
    set: (object, key, value) => change(object, key, value),
    defineProperty(object, key, descriptor) {
      if (!('value' in descriptor)) throw unknownKey(where, String(key), Object.keys(object))
      return change(object, key, descriptor.value)
    },
    deleteProperty(_, key) {
      throw new ViaductError('ERR_CONFIG', where, `${String(key)} cannot be removed: set it to null`)
    },
  })
}

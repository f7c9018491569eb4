// Rotary tables on the host: inverse frequencies of each scaling, and cos and sin by position. Computed in float32, step by
// step as Transformers 5 does (modeling_rope_utils), so that logits agree; `f` marks each rounding to float32.
import { assert } from '../base/errors.js'

const f = Math.fround

/** How a scaling changes the frequencies; fields as in Transformers, in camelCase. `default` takes none of them. */
export interface RopeParameters {
  readonly type: 'default' | 'linear' | 'dynamic' | 'llama3' | 'yarn'
  readonly factor?: number
  /** llama3 */
  readonly lowFreqFactor?: number
  readonly highFreqFactor?: number
  /** llama3, yarn, dynamic */
  readonly originalMaxPositionEmbeddings?: number
  /** yarn, as all below */
  readonly attentionFactor?: number
  readonly betaFast?: number
  readonly betaSlow?: number
  readonly mscale?: number
  readonly mscaleAllDim?: number
  readonly truncate?: boolean
}

/** What the tables depend on, besides the length of the sequence. */
export interface RopeConfig {
  /** Rotated channels of a head (R), even. */
  readonly channels: number
  readonly base: number
  readonly maxPositionEmbeddings: number
  readonly scaling: RopeParameters
}

export interface RopeFrequencies {
  /** float32 [R/2]: radians a position. */
  readonly inverse: Float32Array
  /** Factor of cos and sin. */
  readonly attentionScaling: number
}

/** 1 / base^(2i/R), all in float32. */
function plainFrequencies(base: number, channels: number): Float32Array {
  const inverse = new Float32Array(channels / 2)
  for (let i = 0; i < inverse.length; i++) inverse[i] = f(1 / f(f(base) ** f((2 * i) / channels)))
  return inverse
}

function required(value: number | undefined, field: string, type: string): number {
  assert(value !== undefined, `rope scaling ${type} needs ${field}`)
  return value
}

/**
 * Inverse frequencies and the factor of the tables.
 * @param seqLength - largest position + 1; only `dynamic` depends on it, and only past maxPositionEmbeddings.
 */
export function ropeFrequencies(config: RopeConfig, seqLength: number): RopeFrequencies {
  const { channels, base, scaling } = config
  assert(channels > 0 && channels % 2 === 0, `rotary channels must be even and positive, got ${channels}`)
  switch (scaling.type) {
    case 'default':
      return { inverse: plainFrequencies(base, channels), attentionScaling: 1 }
    case 'linear': {
      const factor = required(scaling.factor, 'factor', 'linear')
      return { inverse: plainFrequencies(base, channels).map((w) => f(w / f(factor))), attentionScaling: 1 }
    }
    case 'dynamic':
      return { inverse: plainFrequencies(dynamicBase(config, seqLength), channels), attentionScaling: 1 }
    case 'llama3':
      return { inverse: llama3Frequencies(config), attentionScaling: 1 }
    case 'yarn':
      return yarnFrequencies(config)
  }
}

function dynamicBase(config: RopeConfig, seqLength: number): number {
  const { base, channels, maxPositionEmbeddings: max, scaling } = config
  if (seqLength <= max) return base
  const factor = required(scaling.factor, 'factor', 'dynamic')
  // The length is a tensor there, so each step rounds to float32.
  const stretch = f(f(f(f(factor) * seqLength) / max) - f(factor - 1))
  return f(f(base) * f(stretch ** f(channels / (channels - 2))))
}

function llama3Frequencies(config: RopeConfig): Float32Array {
  const { scaling } = config
  const factor = required(scaling.factor, 'factor', 'llama3')
  const low = required(scaling.lowFreqFactor, 'lowFreqFactor', 'llama3')
  const high = required(scaling.highFreqFactor, 'highFreqFactor', 'llama3')
  const original = required(scaling.originalMaxPositionEmbeddings, 'originalMaxPositionEmbeddings', 'llama3')
  const lowWavelength = f(original / low)
  const highWavelength = f(original / high)
  return plainFrequencies(config.base, config.channels).map((w) => {
    const wavelength = f(f(2 * Math.PI) / w)
    if (wavelength > lowWavelength) return f(w / f(factor))
    if (wavelength < highWavelength) return w
    const smooth = f(f(f(original / wavelength) - f(low)) / f(high - low))
    return f(f(f(f(1 - smooth) * w) / f(factor)) + f(smooth * w))
  })
}

function yarnFrequencies(config: RopeConfig): RopeFrequencies {
  const { channels, base, scaling } = config
  const original = required(scaling.originalMaxPositionEmbeddings, 'originalMaxPositionEmbeddings', 'yarn')
  const factor = scaling.factor ?? config.maxPositionEmbeddings / original
  const magnitude = (scale: number, m = 1) => (scale <= 1 ? 1 : 0.1 * m * Math.log(scale) + 1)
  const attentionScaling =
    scaling.attentionFactor ??
    (scaling.mscale && scaling.mscaleAllDim
      ? magnitude(factor, scaling.mscale) / magnitude(factor, scaling.mscaleAllDim)
      : magnitude(factor))

  const correction = (rotations: number) =>
    (channels * Math.log(original / (rotations * 2 * Math.PI))) / (2 * Math.log(base))
  let low = correction(scaling.betaFast || 32)
  let high = correction(scaling.betaSlow || 1)
  if (scaling.truncate ?? true) {
    low = Math.floor(low)
    high = Math.ceil(high)
  }
  low = Math.max(low, 0)
  high = Math.min(high, channels - 1)
  if (low === high) high += 0.001

  const inverse = new Float32Array(channels / 2)
  for (let i = 0; i < inverse.length; i++) {
    const wavelength = f(f(base) ** f((2 * i) / channels))
    const extrapolated = f(1 / wavelength)
    const interpolated = f(1 / f(f(factor) * wavelength))
    const ramp = Math.min(1, Math.max(0, f(f(i - f(low)) / f(high - low))))
    const keep = f(1 - ramp)
    inverse[i] = f(f(interpolated * f(1 - keep)) + f(extrapolated * keep))
  }
  return { inverse, attentionScaling }
}

/**
 * Tables of positions 0 to `positions` - 1.
 * @returns cos and sin, float32 [positions, R/2], already times the attention factor.
 */
export function ropeTables(frequencies: RopeFrequencies, positions: number): { cos: Float32Array; sin: Float32Array } {
  const { inverse } = frequencies
  const scaling = f(frequencies.attentionScaling)
  const half = inverse.length
  const cos = new Float32Array(positions * half)
  const sin = new Float32Array(positions * half)
  for (let p = 0, at = 0; p < positions; p++) {
    for (let i = 0; i < half; i++, at++) {
      const angle = f(p * (inverse[i] as number))
      cos[at] = f(Math.cos(angle)) * scaling
      sin[at] = f(Math.sin(angle)) * scaling
    }
  }
  return { cos, sin }
}

// The logits part of `viaduct verify`: the same tokens through one rank and through the ranks of a layout, in float32.
// The ranks are real processes that run `viaduct logits`.
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { ViaductError } from '../base/errors.js'
import { seededTokens } from '../inference/activations.js'
import { computeLogits } from '../inference/logits.js'
import { type HostTensor, readHostTensors, writeHostTensors } from '../io/hostTensors.js'
import { launch } from '../launch/launcher.js'
import type { TransformerConfig } from '../models/transformerConfig.js'
import { defaultParallel } from '../parallel/config.js'
import { chosenLayout, type LayoutFlags, layoutArguments } from './layout.js'
import { commandFile } from './ranks.js'

/** What was compared: the largest difference over the largest logit, or why nothing was. */
export type LogitsComparison =
  | {
      readonly ranks: number
      readonly shape: readonly number[]
      readonly largestLogit: number
      /** Largest difference over the largest logit. */
      readonly difference: number
      readonly ok: boolean
    }
  | { readonly skipped: string }

/** Two correct float32 sums in another order differ by some 1e-6 of the largest logit; ten times that is a fault. */
export const logitsTolerance = 1e-5

/** Larger models are left out: the computation in float32 would take the memory and time of a run. */
export const mostWeightBytes = 2e9

/**
 * Compares logits of a small fixed input.
 * @param folder - computed on one rank, here.
 * @param other - folder or checkpoint that is computed in the layout.
 * @throws ERR_RANK_FAILED when the ranks of the layout did not come to an end.
 */
export async function compareLayouts(
  folder: string,
  other: string,
  config: Pick<TransformerConfig, 'vocabSize' | 'maxPositionEmbeddings'>,
  flags: LayoutFlags,
): Promise<LogitsComparison> {
  const scratch = await mkdtemp(join(tmpdir(), 'viaduct-logits-'))
  try {
    const [input, one, many] = ['input', 'one', 'many'].map((name) => join(scratch, `${name}.safetensors`)) as [
      string,
      string,
      string,
    ]
    await writeHostTensors(input, new Map([['input_ids', seededTokens(config)]]))
    await computeLogits(folder, input, one, { parallel: defaultParallel, dtype: 'float32', device: 'cpu' })
    const a = floats(await readHostTensors(one))
    if (!a.every(Number.isFinite))
      return { skipped: 'those of one rank are not all finite: this model has nothing to compare' }
    const ranks = chosenLayout(flags, null).worldSize
    const code = await launch({
      script: commandFile(),
      args: [
        'logits',
        other,
        '--input',
        input,
        '--output',
        many,
        '--dtype',
        'float32',
        '--device',
        'cpu',
        ...layoutArguments(flags),
      ],
      nprocPerNode: ranks,
      standalone: true,
      logDir: join(scratch, 'log'),
      redirects: '3',
    })
    if (code !== 0)
      throw new ViaductError(
        'ERR_RANK_FAILED',
        'verify',
        `expected the ${ranks} ranks of the layout to compute logits, got exit code ${code}: --no-logits leaves them out`,
      )
    return {
      ranks,
      ...compareLogits(a, floats(await readHostTensors(many))),
      shape: [...seededTokens(config).shape, config.vocabSize],
    }
  } finally {
    await rm(scratch, { recursive: true, force: true })
  }
}

function floats(tensors: ReadonlyMap<string, HostTensor>): Float32Array {
  const { bytes } = tensors.get('logits') as HostTensor
  return new Float32Array(new Uint8Array(bytes).buffer)
}

/** Largest difference of b from a over the largest of a. */
export function compareLogits(
  a: Float32Array,
  b: Float32Array,
): { largestLogit: number; difference: number; ok: boolean } {
  let largestLogit = 0
  let difference = a.length === b.length ? 0 : Number.POSITIVE_INFINITY
  for (let i = 0; i < a.length; i++) {
    largestLogit = Math.max(largestLogit, Math.abs(a[i] as number))
    difference = Math.max(difference, Math.abs((a[i] as number) - (b[i] as number)))
  }
  // Not a number on both sides is no proof of anything.
  const finite = a.every(Number.isFinite) && b.every(Number.isFinite)
  const relative = difference / Math.max(largestLogit, Number.MIN_VALUE)
  return { largestLogit, difference: relative, ok: finite && relative <= logitsTolerance }
}

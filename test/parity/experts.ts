// Logits, loss and gradients of the tiny mixtures of experts of test/fixtures/moe_parity (test/oracle/draw_moe.py), against Transformers.
import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { generate } from '../../lib/inference/generate.js'
import { computeLogits } from '../../lib/inference/logits.js'
import { defaultParallel } from '../../lib/parallel/config.js'
import { readSafetensorsFile } from '../fixtures/safetensorsFile.js'
import { type Agreement, agreement } from './resultFile.js'

export const expertFixtures = join(dirname(fileURLToPath(import.meta.url)), '../fixtures/moe_parity')

/** qwen3_moe0, qwen3_moe1, olmoe0, … */
export const expertModels = readdirSync(expertFixtures).sort()

/** Our greedy continuation of the first 8 tokens, and Transformers', on one rank. */
export async function continueExperts(
  name: string,
  device: 'cpu' | 'cuda',
): Promise<[ours: number[], theirs: number[]]> {
  const folder = join(expertFixtures, name)
  const model = await (await AutoBridge.fromHfPretrained(folder)).toMegatronModel({ device })
  try {
    const ids = readSafetensorsFile(join(folder, 'in.safetensors')).get('input_ids')?.data as Float32Array
    const theirs = readSafetensorsFile(join(folder, 'expected.safetensors')).get('greedy')?.data as Float32Array
    const [ours = []] = await generate(model, [Array.from((ids as Float32Array).subarray(0, 8))], {
      maxNewTokens: theirs.length,
    })
    return [ours, Array.from(theirs)]
  } finally {
    await model.dispose()
  }
}

/** One rank in this process. */
export async function computeExperts(name: string, device: 'cpu' | 'cuda'): Promise<Agreement> {
  const folder = mkdtempSync(join(tmpdir(), 'viaduct-experts-'))
  try {
    const output = join(folder, 'out.safetensors')
    const model = join(expertFixtures, name)
    await computeLogits(model, join(model, 'in.safetensors'), output, {
      grads: true,
      dtype: 'float32',
      device,
      parallel: defaultParallel,
    })
    return agreement(readSafetensorsFile(output), readSafetensorsFile(join(model, 'expected.safetensors')))
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

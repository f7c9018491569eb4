// Logits, loss and gradients of the tiny mixtures of experts of test/fixtures/moe_parity (test/oracle/draw_moe.py), against Transformers.
import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { computeLogits } from '../../lib/inference/logits.js'
import { defaultParallel } from '../../lib/parallel/config.js'
import { readSafetensorsFile } from '../fixtures/safetensorsFile.js'
import { type Agreement, agreement } from './resultFile.js'

export const expertFixtures = join(dirname(fileURLToPath(import.meta.url)), '../fixtures/moe_parity')

/** qwen3_moe0, qwen3_moe1, olmoe0, … */
export const expertModels = readdirSync(expertFixtures).sort()

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

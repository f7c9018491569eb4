// Small Llama folders for tests: random bytes as weights (every bit pattern is welcome to a conversion), in one file or shards.
// A test spoils a good folder in one place and looks at what comes.
import { mkdirSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type { DType } from '../../lib/base/dtype.js'
import { encodeHeader, type TensorPlan } from '../../lib/io/safetensorsHeader.js'

/** A deterministic stream of bytes. */
export function randomBytes(count: number, seed = 1): Buffer {
  const bytes = Buffer.alloc(count)
  let state = seed >>> 0 || 1
  for (let i = 0; i < count; i++) {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    bytes[i] = state & 255
  }
  return bytes
}

export interface FolderOptions {
  readonly layers?: number
  readonly hidden?: number
  readonly ffn?: number
  readonly heads?: number
  readonly kvHeads?: number
  readonly headDim?: number
  readonly vocab?: number
  readonly tied?: boolean
  readonly attentionBias?: boolean
  readonly mlpBias?: boolean
  readonly dtype?: DType
  readonly shards?: number
  readonly seed?: number
  /** Changes to config.json. */
  readonly config?: Record<string, unknown>
  /** Changes the tensors before they are written; null removes one. */
  readonly change?: Record<string, TensorPlan | null>
  /** Bytes of tensors, by name, instead of random ones. */
  readonly bytes?: Record<string, Uint8Array>
}

const names: Record<string, string> = { bfloat16: 'bfloat16', float32: 'float32', float16: 'float16' }

/** Tensors of a Llama with these sizes. */
export function llamaTensors(o: FolderOptions = {}): TensorPlan[] {
  const { layers = 2, hidden = 32, ffn = 48, heads = 4, kvHeads = 2, vocab = 37, dtype = 'bfloat16' } = o
  const headDim = o.headDim ?? hidden / heads
  const list: TensorPlan[] = []
  const add = (name: string, ...shape: number[]) => list.push({ name, dtype, shape })
  add('model.embed_tokens.weight', vocab, hidden)
  for (let i = 0; i < layers; i++) {
    const p = `model.layers.${i}`
    add(`${p}.input_layernorm.weight`, hidden)
    add(`${p}.mlp.down_proj.weight`, hidden, ffn)
    add(`${p}.mlp.gate_proj.weight`, ffn, hidden)
    add(`${p}.mlp.up_proj.weight`, ffn, hidden)
    add(`${p}.post_attention_layernorm.weight`, hidden)
    for (const [which, count] of [
      ['k', kvHeads],
      ['q', heads],
      ['v', kvHeads],
    ] as const) {
      add(`${p}.self_attn.${which}_proj.weight`, count * headDim, hidden)
      if (o.attentionBias) add(`${p}.self_attn.${which}_proj.bias`, count * headDim)
    }
    add(`${p}.self_attn.o_proj.weight`, hidden, heads * headDim)
    if (o.attentionBias) add(`${p}.self_attn.o_proj.bias`, hidden)
    if (o.mlpBias) {
      add(`${p}.mlp.gate_proj.bias`, ffn)
      add(`${p}.mlp.up_proj.bias`, ffn)
      add(`${p}.mlp.down_proj.bias`, hidden)
    }
  }
  add('model.norm.weight', hidden)
  if (!o.tied) add('lm_head.weight', vocab, hidden)
  return list
}

/** Writes one safetensors file with random bytes, or those given. */
export function writeSafetensors(
  path: string,
  plans: readonly TensorPlan[],
  seed = 1,
  bytes: Record<string, Uint8Array> = {},
): void {
  const header = encodeHeader(plans, new Map([['format', 'pt']]))
  const data = randomBytes(header.fileBytes - header.bytes.length, seed)
  for (const [name, value] of Object.entries(bytes)) {
    const entry = header.entries.get(name)
    if (entry) data.set(value, entry.begin)
  }
  writeFileSync(path, Buffer.concat([header.bytes, data]))
}

/** Writes a folder: config.json, weights, tokenizer.json, a licence and a Python file that must never run. */
export function writeLlama(folder: string, o: FolderOptions = {}): string {
  mkdirSync(folder, { recursive: true })
  const { layers = 2, hidden = 32, ffn = 48, heads = 4, kvHeads = 2, vocab = 37, dtype = 'bfloat16', shards = 1 } = o
  const config: Record<string, unknown> = {
    architectures: ['LlamaForCausalLM'],
    attention_bias: o.attentionBias ?? false,
    ...(o.headDim === undefined ? {} : { head_dim: o.headDim }),
    hidden_act: 'silu',
    hidden_size: hidden,
    intermediate_size: ffn,
    max_position_embeddings: 128,
    mlp_bias: o.mlpBias ?? false,
    model_type: 'llama',
    num_attention_heads: heads,
    num_hidden_layers: layers,
    num_key_value_heads: kvHeads,
    rms_norm_eps: 1e-5,
    rope_theta: 500000.0,
    tie_word_embeddings: o.tied ?? false,
    torch_dtype: names[dtype] ?? 'float32',
    vocab_size: vocab,
    ...o.config,
  }
  writeFileSync(join(folder, 'config.json'), `${JSON.stringify(config, null, 2)}\n`)
  writeFileSync(join(folder, 'tokenizer.json'), '{"version": "1.0"}\n')
  writeFileSync(join(folder, 'LICENSE.txt'), 'Licence of the model.\r\n')
  writeFileSync(join(folder, 'modeling_custom.py'), 'import os\nos.system("touch ran")\n')
  const plans = llamaTensors(o).flatMap((plan) => {
    const changed = o.change?.[plan.name]
    return changed === undefined ? [plan] : changed === null ? [] : [changed]
  })
  const known = new Set(plans.map((p) => p.name))
  for (const [name, plan] of Object.entries(o.change ?? {})) if (plan && !known.has(name)) plans.push(plan)
  const seed = o.seed ?? 1
  if (shards === 1) {
    writeSafetensors(join(folder, 'model.safetensors'), plans, seed, o.bytes)
    return folder
  }
  const map: Record<string, string> = {}
  const size = Math.ceil(plans.length / shards)
  for (let i = 0; i < shards; i++) {
    const file = `model-${String(i + 1).padStart(5, '0')}-of-${String(shards).padStart(5, '0')}.safetensors`
    const part = plans.slice(i * size, (i + 1) * size)
    writeSafetensors(join(folder, file), part, seed + i, o.bytes)
    for (const { name } of part) map[name] = file
  }
  writeFileSync(
    join(folder, 'model.safetensors.index.json'),
    JSON.stringify({ metadata: { total_size: 0 }, weight_map: map }, null, 2),
  )
  return folder
}

/** As writeLlama, with weights that are zeros and take no space on the disk: for models that are large. */
export function writeHollow(folder: string, o: FolderOptions): void {
  const { hidden, ffn, heads, kvHeads, layers, vocab } = o
  const config = {
    hidden_size: hidden,
    intermediate_size: ffn,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    num_hidden_layers: layers,
    vocab_size: vocab,
  }
  writeLlama(folder, { layers: 0, vocab: 1, config })
  const file = join(folder, 'model.safetensors')
  const header = encodeHeader(llamaTensors(o))
  writeFileSync(file, header.bytes)
  truncateSync(file, header.fileBytes)
}

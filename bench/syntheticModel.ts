// A Llama folder of a wanted size with pseudo-random bytes as weights: input for conversions. The same seed gives the same
// bytes, and no two places hold the same ones. Not a model that says anything.
import { createCipheriv } from 'node:crypto'
import { closeSync, mkdirSync, openSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { encodeHeader, type TensorPlan, tensorBytes } from '../lib/io/safetensorsHeader.js'

const sizes = {
  small: { hidden: 1024, ffn: 3584, heads: 16, kvHeads: 4, vocab: 8192 },
  large: { hidden: 4096, ffn: 14_336, heads: 32, kvHeads: 8, vocab: 32_000 },
}

type Sizes = (typeof sizes)['small']

function layerTensors(o: Sizes, layer: number): TensorPlan[] {
  const head = o.hidden / o.heads
  const shapes: [string, number[]][] = [
    ['input_layernorm', [o.hidden]],
    ['mlp.down_proj', [o.hidden, o.ffn]],
    ['mlp.gate_proj', [o.ffn, o.hidden]],
    ['mlp.up_proj', [o.ffn, o.hidden]],
    ['post_attention_layernorm', [o.hidden]],
    ['self_attn.k_proj', [o.kvHeads * head, o.hidden]],
    ['self_attn.o_proj', [o.hidden, o.heads * head]],
    ['self_attn.q_proj', [o.heads * head, o.hidden]],
    ['self_attn.v_proj', [o.kvHeads * head, o.hidden]],
  ]
  return shapes.map(([name, shape]) => ({ name: `model.layers.${layer}.${name}.weight`, dtype: 'bfloat16', shape }))
}

const bytesOf = (plans: readonly TensorPlan[]) => plans.reduce((n, p) => n + tensorBytes(p.dtype, p.shape), 0)

/**
 * Writes the folder.
 * @param bytes - about the size of all weights; below 1 GB the layers are narrow.
 * @param shardBytes - most bytes of a file, about.
 * @returns the exact bytes of all weights.
 */
export function writeSyntheticModel(folder: string, bytes: number, shardBytes = 1e9, seed = 1): number {
  const o = bytes < 1e9 ? sizes.small : sizes.large
  const table = (name: string): TensorPlan => ({ name, dtype: 'bfloat16', shape: [o.vocab, o.hidden] })
  const ends: TensorPlan[] = [
    table('model.embed_tokens.weight'),
    { name: 'model.norm.weight', dtype: 'bfloat16', shape: [o.hidden] },
    table('lm_head.weight'),
  ]
  const layers = Math.max(1, Math.round((bytes - bytesOf(ends)) / bytesOf(layerTensors(o, 0))))
  const plans = [...ends, ...Array.from({ length: layers }, (_, i) => layerTensors(o, i)).flat()]
  mkdirSync(folder, { recursive: true })
  const config = {
    architectures: ['LlamaForCausalLM'],
    attention_bias: false,
    hidden_act: 'silu',
    hidden_size: o.hidden,
    intermediate_size: o.ffn,
    max_position_embeddings: 4096,
    mlp_bias: false,
    model_type: 'llama',
    num_attention_heads: o.heads,
    num_hidden_layers: layers,
    num_key_value_heads: o.kvHeads,
    rms_norm_eps: 1e-5,
    rope_theta: 500000.0,
    tie_word_embeddings: false,
    torch_dtype: 'bfloat16',
    vocab_size: o.vocab,
  }
  writeFileSync(join(folder, 'config.json'), `${JSON.stringify(config, null, 2)}\n`)

  const shards: TensorPlan[][] = [[]]
  for (const plan of plans) {
    if (bytesOf([...(shards.at(-1) as TensorPlan[]), plan]) > shardBytes && shards.at(-1)?.length) shards.push([])
    shards.at(-1)?.push(plan)
  }
  const cipher = createCipheriv('aes-128-ctr', Buffer.alloc(16, seed), Buffer.alloc(16))
  const zeros = Buffer.alloc(4 << 20)
  const digits = (n: number) => String(n).padStart(5, '0')
  const map: Record<string, string> = {}
  shards.forEach((shard, i) => {
    const name = `model-${digits(i + 1)}-of-${digits(shards.length)}.safetensors`
    for (const plan of shard) map[plan.name] = name
    const header = encodeHeader(shard, new Map([['format', 'pt']]))
    const file = openSync(join(folder, name), 'w')
    writeSync(file, header.bytes)
    for (let left = header.fileBytes - header.bytes.length; left > 0; left -= zeros.length)
      writeSync(file, cipher.update(zeros.subarray(0, Math.min(left, zeros.length))))
    closeSync(file)
  })
  writeFileSync(
    join(folder, 'model.safetensors.index.json'),
    `${JSON.stringify({ metadata: { total_size: bytesOf(plans) }, weight_map: map }, null, 2)}\n`,
  )
  return bytesOf(plans)
}

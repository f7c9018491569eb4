// What an export costs before its first tensor, planned anew and with a plan used again; and binding and proving the mapping rules of
// a very large model. Commands of ours.ts.
import { AutoBridge } from '../lib/bridge/autoBridge.js'
import type { ConversionTask } from '../lib/bridge/online/conversionTasks.js'
import type { DistributedModel } from '../lib/models/distributedModel.js'

interface Tiny {
  readonly bridge: AutoBridge
  readonly model: DistributedModel
  readonly tasks: readonly ConversionTask[]
}
let tiny: Tiny | null = null

const config = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  hidden_size: 8,
  intermediate_size: 8,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  num_hidden_layers: 1000,
  vocab_size: 128,
  max_position_embeddings: 16,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  hidden_act: 'silu',
  torch_dtype: 'float32',
  tie_word_embeddings: false,
}

const huge = {
  ...config,
  architectures: ['MixtralForCausalLM'],
  model_type: 'mixtral',
  num_hidden_layers: 61,
  num_local_experts: 384,
  num_experts_per_tok: 8,
  hidden_size: 7168,
  intermediate_size: 2048,
  num_attention_heads: 56,
  num_key_value_heads: 8,
  vocab_size: 163840,
}

async function tinyModel(): Promise<Tiny> {
  const bridge = AutoBridge.fromHfConfig(config)
  const model = await bridge.toMegatronProvider().provideDistributedModel({ wrapWithDdp: false, device: 'cpu' })
  return { bridge, model, tasks: bridge.getConversionTasks(model) }
}

/** Time to the first of thousands of tiny tensors. */
export async function exportFirst({ reuse }: { reuse: boolean }) {
  tiny ??= await tinyModel()
  const { bridge, model, tasks } = tiny
  const from = performance.now()
  const tensors = bridge.exportHfWeights(model, { bucketBytes: 1, ...(reuse ? { tasks } : {}) })
  await tensors.next()
  const seconds = (performance.now() - from) / 1000
  await tensors.return(undefined)
  return { seconds, tensors: tasks.length }
}

/** Rules of 61 layers with 384 experts resolved to names and regions, and proved to tile. */
export async function bindHuge() {
  const from = performance.now()
  const { mapping } = AutoBridge.fromHfConfig(huge)
  return { seconds: (performance.now() - from) / 1000, tensors: mapping.byTheirs.size }
}

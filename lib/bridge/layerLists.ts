// Lists in a Hugging Face config that speak of layers, cut to fewer layers. They are told by their names: another list may have as many
// entries by chance.
import type { HfConfig, HfValue } from '../models/family.js'

/** With an entry for each layer. */
const perLayer = ['layer_types', 'layers_block_type', 'no_rope_layers', 'mlp_layer_types', 'attention_types']
/** Of layers' indices. */
const indices = ['mlp_only_layers', 'moe_layers', 'full_attention_layers']

/** The config of the first `layers` of `before` layers. */
export function cutLayerLists(config: HfConfig, before: number, layers: number): HfConfig {
  const hf: Record<string, HfValue> = Object.assign(Object.create(null), config)
  hf['num_hidden_layers'] = layers
  for (const key of perLayer) {
    const list = hf[key]
    if (Array.isArray(list) && list.length === before) hf[key] = list.slice(0, layers)
  }
  for (const key of indices) {
    const list = hf[key]
    if (Array.isArray(list)) hf[key] = list.filter((index) => typeof index !== 'number' || index < layers)
  }
  return hf
}

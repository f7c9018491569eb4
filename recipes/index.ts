// All recipes, for `viaduct recipes` and `viaduct train`. A new family is a file and its rows here.
import type { RunConfig } from '../lib/config/runConfig.js'
import {
  mixtral_8x7b_pretrain_config,
  mixtral_8x22b_pretrain_config,
  olmoe_7b_pretrain_config,
  qwen3_30b_a3b_pretrain_config,
  qwen3_moe_tiny_cpu_pretrain_config,
  qwen15_moe_a2_7b_pretrain_config,
} from './experts.js'
import { llama_tiny_cpu_pretrain_config, llama32_1b_pretrain_config } from './llama.js'

export interface Recipe {
  readonly name: string
  readonly family: string
  readonly description: string
  readonly config: () => RunConfig
}

export const recipes: readonly Recipe[] = [
  {
    name: 'llama32_1b_pretrain_config',
    family: 'llama',
    description: 'Llama 3.2 1B from scratch, bfloat16, sequences of 8192, 512 a step',
    config: llama32_1b_pretrain_config,
  },
  {
    name: 'llama_tiny_cpu_pretrain_config',
    family: 'llama',
    description: 'A Llama of 0.7 million parameters for a CPU, float32, about a minute',
    config: llama_tiny_cpu_pretrain_config,
  },
  {
    name: 'qwen3_30b_a3b_pretrain_config',
    family: 'qwen3_moe',
    description: 'Qwen3 30B-A3B from scratch, bfloat16, sequences of 4096; TP 4, PP 2, EP 4',
    config: qwen3_30b_a3b_pretrain_config,
  },
  {
    name: 'qwen15_moe_a2_7b_pretrain_config',
    family: 'qwen2_moe',
    description: 'Qwen1.5 MoE A2.7B from scratch, bfloat16, sequences of 4096; EP 4',
    config: qwen15_moe_a2_7b_pretrain_config,
  },
  {
    name: 'olmoe_7b_pretrain_config',
    family: 'olmoe',
    description: 'OLMoE 1B-7B from scratch, bfloat16, sequences of 4096, 2048 a step; EP 8',
    config: olmoe_7b_pretrain_config,
  },
  {
    name: 'mixtral_8x7b_pretrain_config',
    family: 'mixtral',
    description: 'Mixtral 8x7B from scratch, bfloat16, sequences of 4096, 256 a step; PP 4, EP 8',
    config: mixtral_8x7b_pretrain_config,
  },
  {
    name: 'mixtral_8x22b_pretrain_config',
    family: 'mixtral',
    description: 'Mixtral 8x22B from scratch, bfloat16, sequences of 4096, 256 a step; TP 2, PP 8, EP 8',
    config: mixtral_8x22b_pretrain_config,
  },
  {
    name: 'qwen3_moe_tiny_cpu_pretrain_config',
    family: 'qwen3_moe',
    description: 'A Qwen3-MoE of 1.4 million parameters for a CPU, float32, about a minute',
    config: qwen3_moe_tiny_cpu_pretrain_config,
  },
]

// Pretrains Llama 3.2 1B as its recipe says, with a smaller vocabulary, for ten steps on mock data.
// Run: viaduct run --nproc-per-node RANKS examples/pretrain.ts [section.key=value ...]
import { applyOverrides } from 'viaduct'
import { llama32_1b_pretrain_config } from 'viaduct/recipes/llama'
import { forwardStep, pretrain } from 'viaduct/train'

const cfg = llama32_1b_pretrain_config()

// Training parameters over the recipe's.
cfg.train.trainIters = 10
cfg.scheduler.lrDecayIters = 10000
cfg.model.vocabSize = 8192
cfg.tokenizer.vocabSize = cfg.model.vocabSize

applyOverrides(cfg, process.argv.slice(2))
await pretrain(cfg, forwardStep)

// Carries a Hugging Face model to the parallel layout and back. Run: npx tsx examples/convert.ts
// The model is a folder below the current one, else a model of the hub, which is fetched.
import { AutoBridge } from 'viaduct'

// 1) A bridge from a Hugging Face folder.
const bridge = await AutoBridge.fromHfPretrained('meta-llama/Llama-3.2-1B', { trustRemoteCode: true })

// 2) A provider, its parallelism set before the model is made.
const provider = bridge.toMegatronProvider()
provider.tensorModelParallelSize = 1
provider.pipelineModelParallelSize = 1
provider.finalize()

// 3) The model, with its weights.
const model = await provider.provideDistributedModel({ wrapWithDdp: false })

// 4a) To a Hugging Face folder: config, tokenizer, weights.
await bridge.saveHfPretrained(model, './hf_exports/llama32_1b')

// 4b) Or weights alone, one after the other.
for await (const [name, weight] of bridge.exportHfWeights(model, { cpu: true })) {
  console.log(name, weight.shape)
}
await model.dispose()

// The main job from end to end, on this machine's CPU: a Hugging Face Llama in, trained on two ranks, and out again, each step
// proved. Run: npm run quickstart. Files stay in .viaduct/quickstart for a look.
import { spawn } from 'node:child_process'
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import {
  AutoBridge,
  openData,
  readTexts,
  resolve,
  tokenizerConfigJson,
  tokenizerJson,
  toYaml,
  trainBpe,
  unigramEntropy,
} from 'viaduct'
import { llama_tiny_cpu_pretrain_config } from 'viaduct/recipes/llama'
import { StepList } from './stepList.js'

const ranks = 2
const manifest = createRequire(import.meta.url).resolve('viaduct/package.json')
const root = dirname(manifest)
const viaduct = join(root, (JSON.parse(readFileSync(manifest, 'utf8')) as { bin: { viaduct: string } }).bin.viaduct)
const place = join(root, '.viaduct/quickstart')
const [llama, imported, trained, exported] = ['llama', 'imported', 'trained', 'exported'].map((name) =>
  join(place, name),
) as [string, string, string, string]
const texts = ['README.md', 'CONTRIBUTING.md', 'docs', 'lib', 'native', 'recipes', 'test/unit', 'test/house'].map(
  (name) => join(root, name),
)
const list = new StepList(5)

/** Runs the command line and returns its standard output. */
function command(args: readonly string[], onLine: (line: string) => void = () => {}): Promise<string> {
  return new Promise((done, fail) => {
    const child = spawn(process.execPath, [viaduct, ...args], { cwd: root, stdio: ['ignore', 'pipe', 'pipe'] })
    let output = ''
    let errors = ''
    let rest = ''
    child.stdout.on('data', (chunk: Buffer) => {
      output += chunk.toString()
      const lines = (rest + chunk.toString()).split('\n')
      rest = lines.pop() ?? ''
      for (const line of lines) onLine(line)
    })
    child.stderr.on('data', (chunk: Buffer) => {
      errors += chunk.toString()
    })
    child.on('error', fail)
    child.on('close', (code) => {
      if (code === 0) done(output)
      else fail(new Error(`viaduct ${args.join(' ')}\nended with exit code ${code}:\n${errors}${output}`))
    })
  })
}

rmSync(place, { recursive: true, force: true })
mkdirSync(llama, { recursive: true })
const begin = performance.now()
const cfg = llama_tiny_cpu_pretrain_config()
process.stdout.write(`Viaduct quickstart: a Llama in, trained on ${ranks} ranks, and out again\n`)

await list.step('Write a small Llama in Hugging Face format', async () => {
  const documents = await readTexts(texts)
  const bpe = trainBpe(
    documents.map(({ text }) => text),
    cfg.model.vocabSize,
  )
  const { hiddenSize, ffnHiddenSize, numLayers, numAttentionHeads, numQueryGroups, kvChannels, maxPositionEmbeddings } =
    cfg.model
  const bridge = AutoBridge.fromHfConfig({
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    hidden_size: hiddenSize,
    intermediate_size: ffnHiddenSize,
    num_hidden_layers: numLayers,
    num_attention_heads: numAttentionHeads,
    num_key_value_heads: numQueryGroups,
    head_dim: kvChannels,
    vocab_size: cfg.model.vocabSize,
    max_position_embeddings: maxPositionEmbeddings,
    rms_norm_eps: 1e-5,
    rope_theta: 10000,
    hidden_act: 'silu',
    tie_word_embeddings: true,
    bos_token_id: 0,
    eos_token_id: 0,
    initializer_range: cfg.model.initMethodStd,
    torch_dtype: 'float32',
  })
  const model = await bridge.toMegatronModel()
  // Files of at most 60% of the weights: two shards and an index.
  let bytes = 0
  for (const [, parameter] of model.namedParameters()) bytes += parameter.data.byteLength
  await bridge.saveHfPretrained(model, llama, { maxShardBytes: Math.ceil(bytes * 0.6), overwrite: true })
  await model.dispose()
  writeFileSync(join(llama, 'tokenizer.json'), tokenizerJson(bpe))
  writeFileSync(join(llama, 'tokenizer_config.json'), tokenizerConfigJson(bpe, maxPositionEmbeddings))
  const index = JSON.parse(readFileSync(join(llama, 'model.safetensors.index.json'), 'utf8')) as {
    weight_map: Record<string, string>
  }
  const shards = new Set(Object.values(index.weight_map)).size
  return `${(bytes / 4e6).toFixed(2)} M parameters, ${shards} safetensors shards with an index, a byte-level BPE of ${bpe.vocab.size} tokens`
})

await list.step(`Import it at TP=${ranks}: ${ranks} processes over Gloo, each reads its own part`, async () => {
  await command(['import', llama, imported, '--tp', String(ranks)])
  const result = JSON.parse(
    await command([
      'verify',
      llama,
      '--ckpt',
      imported,
      '--tp',
      String(ranks),
      '--json',
      '--certificate',
      `${imported}.certificate.json`,
    ]),
  ) as {
    differingBytes: number
    tensors: unknown[]
  }
  return `${result.tensors.length} tensors, ${result.differingBytes} differing bytes`
})

cfg.dataset.kind = 'text'
cfg.dataset.path = texts
cfg.tokenizer.tokenizerType = 'HuggingFaceTokenizer'
cfg.tokenizer.tokenizerModel = llama
cfg.model.tensorModelParallelSize = ranks
cfg.checkpoint.load = imported
cfg.checkpoint.save = trained
const yaml = join(place, 'run.yaml')
writeFileSync(yaml, `recipe: llama_tiny_cpu_pretrain_config\n${toYaml(cfg)}`)
const evalIters = cfg.validation.evalIters

await list.step(
  `Pretrain it on this repository's documents and source, ${cfg.train.trainIters} steps at TP=${ranks}`,
  async (progress) => {
    const losses: number[] = []
    let speed = ''
    await command(['train', yaml], (line) => {
      const cells = line.trim().split(/\s+/)
      if (/^ +\d+ +\d/.test(line)) {
        speed = `${cells[5]} tokens/s`
        progress(Number(cells[0]) / cfg.train.trainIters, `loss ${cells[1]}, ${speed}`)
      }
      const validation = /^validation +step \d+, loss ([\d.]+)/.exec(line)
      if (validation) losses.push(Number(validation[1]))
    })
    const resolved = resolve(cfg, ranks)
    const data = await openData(resolved)
    const labels: number[] = []
    const count = Math.min(evalIters * cfg.train.globalBatchSize, data.validation?.length ?? 0)
    for (let i = 0; i < count; i++) labels.push(...(data.validation?.sample(i).subarray(1) ?? []))
    data.dispose()
    const entropy = unigramEntropy(labels)
    const last = losses.at(-1) ?? Number.NaN
    const share = last / entropy
    if (!(share <= 0.85))
      throw new Error(
        `the validation loss ${last} is ${share.toFixed(3)} of the unigram entropy ${entropy.toFixed(3)}: expected 0.85 or less`,
      )
    return `validation loss ${losses.map((loss) => loss.toFixed(3)).join(' → ')}: ${share.toFixed(2)} of the unigram entropy (${entropy.toFixed(3)}), ${speed}`
  },
)

await list.step('Export it to a Hugging Face folder and prove the round trip', async () => {
  await command(['export', trained, exported])
  const result = JSON.parse(
    await command([
      'verify',
      exported,
      '--ckpt',
      trained,
      '--tp',
      String(ranks),
      '--json',
      '--certificate',
      `${exported}.certificate.json`,
    ]),
  ) as {
    differingBytes: number
    tensors: unknown[]
  }
  if (result.differingBytes !== 0) throw new Error(`${result.differingBytes} bytes differ`)
  return `${result.tensors.length} tensors, ${result.differingBytes} differing bytes: ${exported}`
})

await list.step(`Generate from the exported folder at TP=1 and TP=${ranks}, float32, greedy`, async () => {
  const prompt = '// A tensor is'
  const texts: { text: string; tokens: number[] }[] = []
  for (const tp of [1, ranks]) {
    const output = await command([
      'generate',
      exported,
      '--prompt',
      prompt,
      '--max-new-tokens',
      '48',
      '--tp',
      String(tp),
      '--dtype',
      'float32',
      '--json',
    ])
    texts.push(JSON.parse(output) as { text: string; tokens: number[] })
  }
  const [one, two] = texts
  if (JSON.stringify(one?.tokens) !== JSON.stringify(two?.tokens))
    throw new Error(`TP=1 and TP=${ranks} gave other tokens:\n${JSON.stringify(texts)}`)
  return `the same ${one?.tokens.length} tokens\n${JSON.stringify(`${prompt}${one?.text}`)}`
})

process.stdout.write(
  `Done in ${((performance.now() - begin) / 1000).toFixed(0)} s. Next: npx viaduct --help, README.md\n`,
)

// Seeded corruptions of a folder and a checkpoint that belong together: each is found and named, by the proof against the checkpoint and
// by the comparison of both. One spoils one place; `names` says what the message must hold.
import { cpSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, truncateSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import { ViaductError } from '../../lib/base/errors.js'
import { importCkpt } from '../../lib/bridge/offline/convert.js'
import { compare } from '../../lib/bridge/proof/compare.js'
import { verify } from '../../lib/bridge/proof/verify.js'
import { openWeights } from '../../lib/io/weightFolder.js'
import { randomBytes, writeLlama } from './llamaFolder.js'
import {
  edit,
  editHeader,
  editIndex,
  editText,
  flip,
  type Header,
  type Index,
  layer,
  type Pair,
  rotate,
  swap,
  transpose,
} from './spoiling.js'
import { temporaryFolder } from './temporary.js'

const home = temporaryFolder()
const moe = join(import.meta.dirname, '../fixtures/moe')
const bases = ['llama', 'tied', 'derived', 'qwen3_moe', 'qwen3_moe_fused'] as const
type Base = (typeof bases)[number]

const embedding = randomBytes(37 * 32 * 2, 5)
const frequencies = 'model.layers.0.self_attn.rotary_emb.inv_freq'

beforeAll(async () => {
  const folder = (base: Base) => join(home, base)
  writeLlama(folder('llama'), { kvHeads: 4, shards: 3 })
  writeLlama(folder('tied'), {
    tied: true,
    change: { 'lm_head.weight': { name: 'lm_head.weight', dtype: 'bfloat16', shape: [37, 32] } },
    bytes: { 'lm_head.weight': embedding, 'model.embed_tokens.weight': embedding },
  })
  writeLlama(folder('derived'), {
    change: { [frequencies]: { name: frequencies, dtype: 'float32', shape: [4] } },
    bytes: { [frequencies]: new Uint8Array(new Float32Array([0, 1, 2, 3].map((i) => 5e5 ** (-i / 4))).buffer) },
  })
  for (const name of ['qwen3_moe', 'qwen3_moe_fused'] as const)
    cpSync(join(moe, name), folder(name), { recursive: true })
  for (const base of bases) await importCkpt(folder(base), join(home, `${base}-ckpt`))
})

let count = 0
function pairOf(base: Base): Pair {
  const [hf, root] = [join(home, `hf${count}`), join(home, `ckpt${count++}`)]
  cpSync(join(home, base), hf, { recursive: true })
  cpSync(join(home, `${base}-ckpt`), root, { recursive: true })
  return { hf, root, iter: join(root, 'iter_0000000') }
}

/** Exit code and words of a check: what the command would end with and print. */
async function outcome(check: () => Promise<{ ok: boolean; words: readonly string[] }>) {
  try {
    const { ok, words } = await check()
    return { exit: ok ? 0 : 1, text: words.join('\n') }
  } catch (error) {
    if (!(error instanceof ViaductError)) throw error
    return { exit: error.exitCode, text: `${error.code} ${error.message}` }
  }
}

const proved = ({ hf, root }: Pair) =>
  outcome(async () => {
    const { ok, problems } = await verify(hf, { ckpt: root })
    return { ok, words: problems }
  })
const compared = ({ hf, root }: Pair) =>
  outcome(async () => {
    const { equal, differences } = await compare(hf, root)
    return { ok: equal, words: differences }
  })

const shard = (i: number) => `model-0000${i}-of-00003.safetensors`
const piece = 'model-00000-of-00001.safetensors'
const fc2 = (i: number) => `decoder.layers.${i}.mlp.linear_fc2.weight`
const up = layer(1, 'mlp.up_proj')

/** What is spoiled, in which base, how; what the proof says: exit code and words; what the comparison says, where it differs. */
type Row = [
  what: string,
  base: Base,
  spoil: (pair: Pair) => void | Promise<void>,
  exit: number,
  names: readonly string[],
  comparison?: { exit: number; names: readonly string[] },
]

/** The comparison looks at models: how weights are cut into files is not its business, and hashes of pieces are the proof's. */
const unseen = { exit: 0, names: [] }

const rows: Row[] = [
  // bits
  [
    'a bit of a shard',
    'llama',
    ({ hf }) => flip(join(hf, shard(2)), -77),
    1,
    [shard(2), '1 of'],
    { exit: 1, names: ['model.', '1 of'] },
  ],
  [
    'a bit of a piece',
    'llama',
    ({ iter }) => flip(join(iter, piece), -5),
    1,
    ['XXH3', piece, '1 of'],
    { exit: 1, names: ['1 of'] },
  ],
  [
    'a bit in a stack of experts',
    'qwen3_moe_fused',
    edit('model.layers.0.mlp.experts.down_proj', (old) => {
      old[old.length - 1] = (old[old.length - 1] as number) ^ 1
      return old
    }),
    1,
    ['model.layers.0.mlp.experts.down_proj['],
  ],
  [
    'a digit of a hash',
    'llama',
    (pair) =>
      editIndex(pair, (t) => {
        const [p] = t[fc2(0)]?.pieces ?? []
        if (p) p.xxh3 = `0${p.xxh3.slice(1)}`.replace(/^00/, '01')
      }),
    1,
    [fc2(0), 'XXH3'],
    unseen,
  ],
  ['a bit of a header', 'llama', ({ hf }) => flip(join(hf, shard(1)), 20), 3, ['ERR_SAFETENSORS_HEADER', shard(1)]],
  // tensors in each other's place, or turned
  ['two layers', 'llama', swap(layer(0, 'mlp.up_proj'), up), 1, [layer(0, 'mlp.up_proj'), up]],
  [
    'query and key',
    'llama',
    swap(layer(0, 'self_attn.q_proj'), layer(0, 'self_attn.k_proj')),
    1,
    ['layers.0.self_attn.q_proj', 'layers.0.self_attn.k_proj'],
  ],
  [
    'two experts',
    'qwen3_moe',
    swap(layer(2, 'mlp.experts.0.down_proj'), layer(2, 'mlp.experts.1.down_proj')),
    1,
    ['experts.0.down_proj', 'experts.1.down_proj'],
  ],
  [
    'gate and up',
    'llama',
    swap(layer(0, 'mlp.gate_proj'), layer(0, 'mlp.up_proj')),
    1,
    [layer(0, 'mlp.gate_proj'), layer(0, 'mlp.up_proj')],
  ],
  [
    'the two norms of a layer',
    'llama',
    swap(layer(1, 'input_layernorm'), layer(1, 'post_attention_layernorm')),
    1,
    [layer(1, 'input_layernorm')],
  ],
  [
    'a square matrix transposed',
    'llama',
    edit(layer(1, 'self_attn.o_proj'), transpose),
    1,
    [layer(1, 'self_attn.o_proj')],
  ],
  [
    'heads of a key in another order',
    'llama',
    edit(layer(0, 'self_attn.k_proj'), (old) => rotate(old, old.length / 4)),
    1,
    [layer(0, 'self_attn.k_proj')],
  ],
  [
    'rows of the embedding moved by one',
    'llama',
    edit('model.embed_tokens.weight', (old) => rotate(old, 64)),
    1,
    ['model.embed_tokens.weight'],
  ],
  ['a tensor of zeros', 'llama', edit('model.norm.weight', (old) => old.fill(0)), 1, ['model.norm.weight']],
  // shards and index
  ['a missing shard', 'llama', ({ hf }) => rmSync(join(hf, shard(2))), 3, ['ERR_FILE_MISSING', shard(2)]],
  [
    'a stray shard',
    'llama',
    ({ hf }) => cpSync(join(hf, shard(1)), join(hf, 'model-00004-of-00004.safetensors')),
    1,
    ['model-00004-of-00004.safetensors'],
  ],
  [
    'a ghost in the index',
    'llama',
    ({ hf }) =>
      editText(join(hf, 'model.safetensors.index.json'), (t) =>
        t.replace('"weight_map": {', `"weight_map": {"model.ghost.weight": "${shard(1)}",`),
      ),
    3,
    ['ERR_INDEX', 'model.ghost.weight'],
  ],
  [
    'a tensor that the index lacks',
    'llama',
    ({ hf }) =>
      editText(join(hf, 'model.safetensors.index.json'), (t) => t.replace(new RegExp(`\\s*"${up}": "[^"]*",`), '')),
    3,
    ['ERR_INDEX', up],
  ],
  [
    'another total in the index',
    'llama',
    ({ hf }) =>
      editText(join(hf, 'model.safetensors.index.json'), (t) => t.replace('"total_size": 0', '"total_size": 1')),
    1,
    ['index'],
    unseen,
  ],
  [
    "two shards under each other's name",
    'llama',
    ({ hf }) => {
      renameSync(join(hf, shard(1)), join(hf, 'x'))
      renameSync(join(hf, shard(2)), join(hf, shard(1)))
      renameSync(join(hf, 'x'), join(hf, shard(2)))
    },
    3,
    ['ERR_INDEX', shard(1), shard(2)],
  ],
  // files cut short, headers that lie
  [
    'a truncated shard',
    'llama',
    ({ hf }) => truncateSync(join(hf, shard(3)), readFileSync(join(hf, shard(3))).length - 10),
    3,
    ['ERR_SAFETENSORS_', shard(3)],
  ],
  [
    'a truncated file of pieces',
    'llama',
    ({ iter }) => truncateSync(join(iter, piece), 5000),
    3,
    ['ERR_SAFETENSORS_', piece],
  ],
  [
    'another dtype',
    'llama',
    async ({ hf }) =>
      editHeader(join(hf, (await openWeights(hf)).tensors.get('model.norm.weight')?.file ?? ''), (h) => {
        ;(h['model.norm.weight'] as Header[string]).dtype = 'F16'
      }),
    1,
    ['model.norm.weight', 'float16', 'bfloat16'],
  ],
  [
    'another dtype within a parameter',
    'llama',
    async ({ hf }) =>
      editHeader(join(hf, (await openWeights(hf)).tensors.get(up)?.file ?? ''), (h) => {
        ;(h[up] as Header[string]).dtype = 'F16'
      }),
    3,
    ['ERR_TENSOR_DTYPE', up],
    { exit: 1, names: [up, 'float16'] },
  ],
  [
    'offsets of another save',
    'llama',
    ({ hf }) =>
      editHeader(join(hf, shard(1)), (h) => {
        ;(Object.values(h).find((e) => e.data_offsets) as Header[string]).data_offsets[1] -= 2
      }),
    3,
    ['ERR_SAFETENSORS_', shard(1)],
  ],
  [
    'offsets of two tensors exchanged',
    'llama',
    ({ hf }) =>
      editHeader(join(hf, shard(1)), (h) => {
        const [a, b] = [h[layer(0, 'mlp.gate_proj')], h[layer(0, 'mlp.up_proj')]] as [Header[string], Header[string]]
        ;[a.data_offsets, b.data_offsets] = [b.data_offsets, a.data_offsets]
      }),
    1,
    [layer(0, 'mlp.gate_proj'), layer(0, 'mlp.up_proj')],
  ],
  // what stands beside the weights
  [
    'a changed base of rotation',
    'llama',
    ({ hf }) => editText(join(hf, 'config.json'), (t) => t.replace('"rope_theta": 500000', '"rope_theta": 10000')),
    1,
    ['config.json', 'rope_theta'],
  ],
  [
    'fewer kv heads',
    'llama',
    ({ hf }) =>
      editText(join(hf, 'config.json'), (t) => t.replace('"num_key_value_heads": 4', '"num_key_value_heads": 2')),
    3,
    ['ERR_TENSOR_SHAPE', 'k_proj'],
    { exit: 1, names: ['num_key_value_heads'] },
  ],
  [
    'a config that the checkpoint has otherwise',
    'llama',
    ({ iter }) =>
      editText(join(iter, 'hf/config.json'), (t) => t.replace('1e-5', '1e-6').replace('0.00001', '0.000001')),
    1,
    ['config.json', 'rms_norm_eps'],
  ],
  [
    'another tokenizer',
    'llama',
    ({ hf }) => editText(join(hf, 'tokenizer.json'), (t) => t.replace('1.0', '1.1')),
    1,
    ['tokenizer.json'],
  ],
  ['a file lost from the checkpoint', 'llama', ({ iter }) => rmSync(join(iter, 'hf/LICENSE.txt')), 1, ['LICENSE.txt']],
  [
    'an output layer that is tied no more',
    'tied',
    edit('lm_head.weight', (old) => {
      old[9] = (old[9] as number) ^ 1
      return old
    }),
    3,
    ['ERR_TIED', 'lm_head.weight'],
    { exit: 1, names: ['lm_head.weight'] },
  ],
  [
    'frequencies of another base',
    'derived',
    edit(frequencies, (old) => {
      old.writeFloatLE(0.5, 4)
      return old
    }),
    3,
    ['ERR_COVERAGE', frequencies],
    { exit: 1, names: [frequencies] },
  ],
  // the checkpoint's index and files
  [
    'a piece that starts elsewhere',
    'llama',
    (pair) =>
      editIndex(pair, (t) => {
        const [p] = t[fc2(1)]?.pieces ?? []
        if (p) p.start[0] = 1
      }),
    3,
    ['ERR_CHECKPOINT', fc2(1)],
  ],
  [
    'pieces of two layers exchanged, hashes too',
    'llama',
    (pair) =>
      editIndex(pair, (t) => {
        const [a, b] = [t[fc2(0)], t[fc2(1)]] as [Index['tensors'][string], Index['tensors'][string]]
        ;[a.pieces, b.pieces] = [b.pieces, a.pieces]
      }),
    1,
    [layer(0, 'mlp.down_proj'), layer(1, 'mlp.down_proj')],
  ],
  [
    'a tensor lost from the index',
    'llama',
    (pair) => editIndex(pair, (t) => void delete t[fc2(0)]),
    1,
    [layer(0, 'mlp.down_proj')],
  ],
  [
    'a tensor that no model has',
    'llama',
    (pair) => editIndex(pair, (t) => void (t['decoder.layers.7.ghost'] = t[fc2(0)] as Index['tensors'][string])),
    1,
    ['decoder.layers.7.ghost'],
  ],
  ['a file of pieces lost', 'llama', ({ iter }) => rmSync(join(iter, piece)), 3, ['ERR_FILE_MISSING', piece]],
  [
    'shards that the checkpoint never saw',
    'llama',
    ({ iter }) =>
      editText(join(iter, 'hf_layout.json'), (t) => t.replaceAll(shard(3), 'model-00003-of-00009.safetensors')),
    1,
    ['model-00003-of-00009.safetensors'],
    unseen,
  ],
  [
    'pieces of two ranks exchanged, hashes too',
    'llama',
    async (pair) => {
      await importCkpt(pair.hf, pair.root, { tensorModelParallelSize: 2, overwrite: true })
      editIndex(pair, (t) => {
        const [a, b] = t[fc2(1)]?.pieces ?? []
        if (a === undefined || b === undefined) throw new Error('expected two pieces')
        ;[a.start, b.start] = [b.start, a.start]
      })
    },
    1,
    [layer(1, 'mlp.down_proj')],
  ],
  [
    'what a killed conversion left in the place of a checkpoint',
    'llama',
    ({ root, iter }) => {
      mkdirSync(join(root, '.iter_0000000.unfinished'))
      renameSync(iter, join(root, '.iter_0000000.unfinished', 'output'))
    },
    3,
    ['ERR_CHECKPOINT'],
  ],
  [
    'an unfinished save in the place of a complete one',
    'llama',
    ({ root, iter }) => renameSync(iter, join(root, '.iter_0000000.tmp-elsewhere-1-0123abcd')),
    3,
    ['ERR_CHECKPOINT'],
  ],
]

describe('a folder and its checkpoint', () => {
  it('are equal before they are spoiled', async () => {
    for (const base of bases) {
      const pair = pairOf(base)
      expect([base, await proved(pair), await compared(pair)]).toEqual([
        base,
        { exit: 0, text: '' },
        { exit: 0, text: '' },
      ])
    }
  })
  it('there are at least 25 ways to spoil them', () => expect(rows.length).toBeGreaterThanOrEqual(25))

  it.each(rows)('%s', async (_, base, spoil, exit, names, comparison) => {
    const pair = pairOf(base)
    await spoil(pair)
    const proof = await proved(pair)
    expect(proof.exit, proof.text).toBe(exit)
    for (const name of names) expect(proof.text).toContain(name)
    // An unfinished checkpoint is none: the comparison takes it for a folder, and refuses it as that.
    const found = await compared(pair)
    const expected = comparison ?? { exit, names }
    expect(found.exit, found.text).toBe(expected.exit)
    const isRefused = readdirSync(pair.root).every((name) => name !== 'iter_0000000')
    if (!isRefused) for (const name of expected.names) expect(found.text).toContain(name)
  })
})

// The gates can turn red: mapping rules with a mistake that a careless author makes. A mistake is the same in both directions, so a
// round trip through it is still exact: what finds it is a checkpoint made by the right rules, and the logits of Transformers.
import { cpSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import { importCkpt } from '../../../lib/bridge/offline/convert.js'
import { verify } from '../../../lib/bridge/proof/verify.js'
import { computeLogits } from '../../../lib/inference/logits.js'
import { readHostTensors } from '../../../lib/io/hostTensors.js'
import { llama } from '../../../lib/models/families/llama.js'
import type { MappingRule, Part } from '../../../lib/models/mapping.js'
import { registerFamily } from '../../../lib/models/registry.js'
import type { TransformerConfig } from '../../../lib/models/transformerConfig.js'
import { defaultParallel } from '../../../lib/parallel/config.js'
import { writeInputs } from '../../cli/commandLine.js'
import { llamaFixtures, readSafetensorsFile } from '../../fixtures/safetensorsFile.js'
import { temporaryFolder } from '../../hostile/temporary.js'

const home = temporaryFolder()
const source = join(llamaFixtures, 'plain')
const expected = readSafetensorsFile(join(source, 'expected.safetensors'))

type Places = Pick<Part, 'shape' | 'regions'>[]
/** Moves rows of the logical tensor: the row that a rule puts at `row` goes to `to(row)`. */
function movedRows(places: Places, rows: number, to: (row: number) => number): Places {
  const targets = new Set(Array.from({ length: rows }, (_, row) => to(row)))
  expect(targets.size).toBe(rows)
  return places.map(({ shape, regions }) => ({
    shape,
    regions: regions.flatMap(({ from, to: start, size }) =>
      Array.from({ length: size[0] as number }, (_, i) => ({
        from: [(from[0] as number) + i, ...from.slice(1)],
        to: [to((start[0] as number) + i), ...start.slice(1)],
        size: [1, ...size.slice(1)],
      })),
    ),
  }))
}

const heads = (config: TransformerConfig) => config.numAttentionHeads / config.numQueryGroups
/** Rows of a query group, and within it those of the queries. */
const groupOf = (config: TransformerConfig) => {
  const queries = heads(config) * config.kvChannels
  return { queries, group: queries + 2 * config.kvChannels }
}

interface Mutation {
  readonly kind: MappingRule['kind']
  /** Where the row goes that belongs at `row`. */
  move(row: number, rows: number, config: TransformerConfig): number
}

const mutations: Record<string, Mutation> = {
  'none: the rules as they are': { kind: 'qkv', move: (row) => row },
  'heads transposed: channels outermost': {
    kind: 'qkv',
    move(row, _, config) {
      const { queries, group } = groupOf(config)
      const [g, r] = [Math.floor(row / group), row % group]
      if (r >= queries) return row
      const [h, d] = [Math.floor(r / config.kvChannels), r % config.kvChannels]
      return g * group + d * heads(config) + h
    },
  },
  'key and value of a group exchanged': {
    kind: 'qkv',
    move(row, _, config) {
      const { queries, group } = groupOf(config)
      const r = row % group
      if (r < queries) return row
      return r < queries + config.kvChannels ? row + config.kvChannels : row - config.kvChannels
    },
  },
  'groups of kv heads in reverse, queries in place': {
    kind: 'qkv',
    move(row, rows, config) {
      const { queries, group } = groupOf(config)
      const [g, r] = [Math.floor(row / group), row % group]
      return r < queries ? row : (rows / group - 1 - g) * group + r
    },
  },
  'all queries first, then keys, then values': {
    kind: 'qkv',
    move(row, rows, config) {
      const { queries, group } = groupOf(config)
      const [groups, D] = [rows / group, config.kvChannels]
      const [g, r] = [Math.floor(row / group), row % group]
      if (r < queries) return g * queries + r
      const after = r - queries
      return groups * queries + Math.floor(after / D) * groups * D + g * D + (after % D)
    },
  },
  'gate and up exchanged': { kind: 'gated', move: (row, rows) => (row + rows / 2) % rows },
  'gate and up row by row': { kind: 'gated', move: (row, rows) => (row < rows / 2 ? 2 * row : 2 * row - rows + 1) },
}

let ckpt = ''
beforeAll(async () => {
  ckpt = join(home, 'ckpt')
  await importCkpt(source, ckpt)
  const ids = expected.get('input_ids')
  writeInputs(join(home, 'in.safetensors'), new Map([['input_ids', ids as NonNullable<typeof ids>]]))
})

describe('a mapping table with a mistake', () => {
  it.each(Object.entries(mutations))('%s', async (name, { kind, move }) => {
    const architecture = `Mutated${Object.keys(mutations).indexOf(name)}ForCausalLM`
    registerFamily({
      ...llama,
      architectures: [architecture],
      rules: (config) =>
        llama.rules(config).map((rule) =>
          rule.kind === kind && 'place' in rule
            ? {
                ...rule,
                place: (shape, c) =>
                  movedRows(rule.place(shape, c), shape[0] as number, (row) => move(row, shape[0] as number, c)),
              }
            : rule,
        ),
    })
    const folder = join(home, architecture)
    cpSync(source, folder, { recursive: true })
    const config = join(folder, 'config.json')
    writeFileSync(config, readFileSync(config, 'utf8').replace('LlamaForCausalLM', architecture))

    // The same mistake there and back cancels out.
    expect(await verify(folder, { tensorModelParallelSize: 2 })).toMatchObject({ ok: true, differingBytes: 0 })
    const against = await verify(folder, { ckpt })
    const output = join(home, `${architecture}.safetensors`)
    await computeLogits(folder, join(home, 'in.safetensors'), output, {
      parallel: defaultParallel,
      dtype: 'float32',
      device: 'cpu',
    })
    const bytes = (await readHostTensors(output)).get('logits')?.bytes as Uint8Array
    const got = new Float32Array(new Uint8Array(bytes).buffer)
    const wanted = expected.get('logits')?.data as Float32Array
    const largest = wanted.reduce((m, v) => Math.max(m, Math.abs(v)), 0)
    const difference = wanted.reduce((m, v, i) => Math.max(m, Math.abs(v - (got[i] as number))), 0) / largest

    const differing = against.tensors.filter((tensor) => tensor.differingBytes > 0)
    if (name.startsWith('none')) {
      expect(differing).toEqual([])
      expect(difference).toBeLessThan(1e-5)
      return
    }
    expect(new Set(differing.map((tensor) => tensor.rule.kind))).toEqual(new Set([kind]))
    expect(against.problems.join('\n')).toContain(kind === 'qkv' ? 'self_attn.' : 'mlp.gate_proj.weight')
    // A thousand times what two correct computations differ by.
    expect(difference).toBeGreaterThan(1e-2)
  })
})

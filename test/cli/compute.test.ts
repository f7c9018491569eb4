// `viaduct logits` and `viaduct generate` on one rank and on real ranks, from a folder and from a checkpoint.
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, test } from 'vitest'
import { type HostTensor, readSafetensorsFile } from '../fixtures/safetensorsFile.js'
import { temporaryFolder } from '../hostile/temporary.js'
import { bf16Expected, expectBf16Error } from '../parity/bf16Error.js'
import { agreement } from '../parity/resultFile.js'
import { copyFixture, viaduct, viaductJson, writeInputs } from './commandLine.js'
import { writeWords } from './wordsFolder.js'

const folder = temporaryFolder()
const inside = (...names: string[]) => join(folder, ...names)
const inputs = ['input_ids', 'attention_mask', 'position_ids', 'labels']

describe('logits', () => {
  // tied_bias has 27 tokens, plain 22: where tp does not divide them, sequence parallelism fills them up.
  test.each([
    ['plain', '1', []],
    ['plain', '2', []],
    ['plain', '2', ['--no-sp']],
    ['plain', '4', []],
    ['tied_bias', '2', []],
    ['padded_left', '2', []],
    ['padded_right', '4', []],
    ['positions', '1', []],
    ['positions', '4', []],
  ])('and gradients of %s at tp %s %s are those of Transformers', async (name, tp, flags) => {
    const own = [name, tp, ...flags].join('')
    const expected = copyFixture(name, inside(own))
    writeInputs(inside(own, 'in.safetensors'), new Map([...expected].filter(([key]) => inputs.includes(key))))
    const args = [
      'logits',
      own,
      '--input',
      join(own, 'in.safetensors'),
      '--output',
      `${own}.safetensors`,
      '--grads',
      '--tp',
      tp,
      ...flags,
    ]
    const report = await viaductJson<{ shape: number[]; loss: number; gradients: number }>(folder, args)
    const got = readSafetensorsFile(inside(`${own}.safetensors`))
    expect(agreement(got, expected).red).toEqual([])
    expect(report.loss).toBeCloseTo(got.get('loss')?.data[0] as number, 6)
  })

  test.each([
    ['plain', '--pp 2'],
    ['tied_bias', '--pp 2 --tp 2'],
    ['tied_bias', '--pp 2 --vpp 2 --pipeline-layout E|t|t|L'],
    ['plain', '--cp 2'],
    ['padded_left', '--cp 2'],
    ['padded_left', '--cp 4 --cp-comm-type all_gather'],
    ['padded_right', '--cp 2 --tp 2'],
    ['padded_right', '--cp 2 --cp-comm-type a2a'],
    ['full_heads', '--cp 4 --cp-comm-type a2a'],
    ['full_heads', '--cp 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2,2'],
    ['positions', '--cp 4'],
    ['yarn_scaled', '--cp 2 --pp 2'],
  ])('and gradients of %s with %s are those of Transformers', async (name, layout) => {
    const own = `${name}${layout.replace(/[^a-z0-9]/gi, '')}`
    const expected = copyFixture(name, inside(own))
    writeInputs(inside(own, 'in.safetensors'), new Map([...expected].filter(([key]) => inputs.includes(key))))
    const files = ['--input', join(own, 'in.safetensors'), '--output', `${own}.safetensors`]
    const args = ['logits', own, ...files, '--grads', ...layout.split(' ')]
    const report = await viaductJson<{ loss: number }>(folder, args)
    const got = readSafetensorsFile(inside(`${own}.safetensors`))
    expect(agreement(got, expected).red).toEqual([])
    expect(report.loss).toBeCloseTo(got.get('loss')?.data[0] as number, 6)
  })

  test('in bfloat16, at tp 2 with sequence parallelism, pp 2, are as near to float32 as those of Transformers', async () => {
    copyFixture('plain', inside('half'))
    const ids = bf16Expected.get('input_ids') as HostTensor
    writeInputs(inside('half.in.safetensors'), new Map([['input_ids', ids]]))
    const files = ['--input', 'half.in.safetensors', '--output', 'half.out.safetensors']
    await viaductJson(folder, ['logits', 'half', ...files, '--dtype', 'bfloat16', '--tp', '2', '--pp', '2'])
    const { data, shape } = readSafetensorsFile(inside('half.out.safetensors')).get('logits') as HostTensor
    expectBf16Error(data, shape.at(-1) as number)
  })

  test('of a checkpoint are those of its folder', async () => {
    const expected = copyFixture('plain', inside('folder'))
    writeInputs(inside('in.safetensors'), new Map([['input_ids', expected.get('input_ids') as HostTensor]]))
    expect((await viaduct(folder, 'import', 'folder', 'ckpt', '--tp', '2')).code).toBe(0)
    for (const dir of ['folder', 'ckpt']) {
      const { code, stdout } = await viaduct(
        folder,
        'logits',
        dir,
        '--input',
        'in.safetensors',
        '--output',
        `${dir}.out`,
      )
      expect([code, stdout]).toEqual([0, `${dir}.out\n`])
    }
    expect(readFileSync(inside('ckpt.out')).equals(readFileSync(inside('folder.out')))).toBe(true)
  })

  test('do not drop out what a config would in training', async () => {
    const expected = copyFixture('plain', inside('dropping'))
    const config = JSON.parse(readFileSync(inside('dropping', 'config.json'), 'utf8')) as object
    writeFileSync(inside('dropping', 'config.json'), JSON.stringify({ ...config, attention_dropout: 0.5 }))
    writeInputs(inside('drop.safetensors'), new Map([...expected].filter(([key]) => inputs.includes(key))))
    const args = ['logits', 'dropping', '--input', 'drop.safetensors', '--output', 'dropping.safetensors', '--grads']
    await viaductJson(folder, args)
    expect(agreement(readSafetensorsFile(inside('dropping.safetensors')), expected).red).toEqual([])
    const trained = await viaduct(folder, 'train', 'llama_tiny_cpu_pretrain_config', 'model.attention_dropout=0.5')
    expect([trained.code, trained.stderr]).toEqual([2, expect.stringContaining('attentionDropout must be 0')])
  })

  test('of wrong inputs are refused, on every rank, and nothing is written', async () => {
    const ids = (values: number[]) =>
      new Map([['input_ids', { shape: [1, values.length], data: Float32Array.from(values) }]])
    copyFixture('plain', inside('model'))
    writeInputs(inside('large.safetensors'), ids([1, 2, 97]))
    writeInputs(inside('other.safetensors'), new Map([['tokens', { shape: [1, 1], data: Float32Array.of(1) }]]))
    writeFileSync(inside('broken.safetensors'), 'no header')
    for (const [input, code, tp] of [
      ['large', 'ERR_TOKEN_ID', '2'],
      ['other', 'ERR_DATA', '1'],
      ['broken', 'ERR_SAFETENSORS', '1'],
      ['absent', 'ERR_FILE_MISSING', '1'],
    ] as const) {
      const ended = await viaduct(
        folder,
        'logits',
        'model',
        '--input',
        `${input}.safetensors`,
        '--output',
        'none.safetensors',
        '--tp',
        tp,
      )
      expect([input, ended.code]).toEqual([input, 3])
      expect(ended.stderr).toContain(code)
      expect(existsSync(inside('none.safetensors'))).toBe(false)
    }
    const layout = await viaduct(
      folder,
      'logits',
      'model',
      '--input',
      'large.safetensors',
      '--output',
      'none.safetensors',
      '--tp',
      '3',
    )
    expect(layout.code).toBe(2)
    expect(layout.stderr).toContain('numAttentionHeads=4')
  })
})

describe('generate', () => {
  beforeAll(() => {
    writeWords(inside('words'))
  })

  const greedy = ['generate', 'words', '--prompt', 'the cat', '--max-new-tokens', '24', '--ignore-eos']

  test('gives the same greedy tokens on one rank, at tp 2, pp 2 and cp 2, streamed and as JSON', async () => {
    const one = await viaductJson<{ tokens: number[]; text: string }>(folder, greedy)
    expect(one.tokens).toHaveLength(24)
    expect(new Set(one.tokens).size).toBeGreaterThan(2)
    for (const axis of ['--tp', '--pp', '--cp']) {
      const two = await viaductJson<{ tokens: number[]; text: string }>(folder, [...greedy, axis, '2'])
      expect([axis, two.tokens, two.text]).toEqual([axis, one.tokens, one.text])
    }
    const streamed = await viaduct(folder, ...greedy, '--tp', '2')
    expect(streamed.stdout).toBe(`the cat${one.text}\n`)
    expect(streamed.stderr).toContain('24 tokens')
  })

  test('samples by seed', async () => {
    const sampled = (seed: string) =>
      viaductJson<{ tokens: number[] }>(folder, [
        ...greedy,
        '--temperature',
        '1',
        '--top-k',
        '50',
        '--top-p',
        '0.95',
        '--seed',
        seed,
      ])
    const [a, again, b] = [await sampled('1'), await sampled('1'), await sampled('2')]
    expect(again.tokens).toEqual(a.tokens)
    expect(b.tokens).not.toEqual(a.tokens)
  })

  test('names what is wrong', async () => {
    copyFixture('plain', inside('mute'))
    const mute = await viaduct(folder, 'generate', 'mute', '--prompt', 'x')
    expect([mute.code, mute.stderr]).toEqual([3, expect.stringContaining('tokenizer.json')])
    const cold = await viaduct(folder, ...greedy, '--temperature', '-1')
    expect([cold.code, cold.stderr]).toEqual([2, expect.stringContaining('--temperature')])
  })
})

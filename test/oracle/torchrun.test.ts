// The example of training under the real torchrun: one node, two agents that stand for two nodes, and a restart. The losses are
// those of `viaduct run`, bit for bit.
import { copyFileSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { beforeAll, describe, expect, test } from 'vitest'
import { type Ended, root, start, viaductFile } from '../cli/commandLine.js'
import { temporaryFolder } from '../hostile/temporary.js'
import { torchrun } from './python.js'

const folder = temporaryFolder()
// pretrain.ts as it stands, smaller by its own arguments; 2 ranks, tp 2.
const smaller = [
  ...['num_layers=1', 'hidden_size=32', 'ffn_hidden_size=64', 'num_attention_heads=4', 'num_query_groups=2'].map(
    (text) => `model.${text}`,
  ),
  ...['model.kv_channels=8', 'model.seq_length=16', 'model.tensor_model_parallel_size=2', 'train.train_iters=3'],
  ...[
    'train.global_batch_size=2',
    'validation.eval_interval=null',
    'logger.log_interval=1',
    'checkpoint.save=null',
    'checkpoint.save_interval=null',
    'checkpoint.load=null',
  ],
]

const metrics = (name: string) => join(folder, `${name}.jsonl`)
const losses = (name: string) =>
  readFileSync(metrics(name), 'utf8')
    .trim()
    .split('\n')
    .map((line) => (JSON.parse(line) as { loss: number }).loss)

function expectDone({ code, stdout, stderr }: Ended): string {
  expect(code, `${stdout}\n${stderr}`).toBe(0)
  return stdout + stderr
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await new Promise((done) => server.once('listening', done))
  const { port } = server.address() as { port: number }
  await new Promise((done) => server.close(done))
  return port
}

const program = (name: string, script = 'pretrain.ts') => [
  '--no-python',
  process.execPath,
  '--import',
  'tsx',
  join(folder, script),
  ...smaller,
  `logger.metrics_file=${metrics(name)}`,
]

describe.skipIf(torchrun === null)('torchrun --no-python', () => {
  beforeAll(async () => {
    mkdirSync(join(folder, 'node_modules'))
    writeFileSync(join(folder, 'package.json'), '{ "type": "module" }')
    symlinkSync(root, join(folder, 'node_modules/viaduct'))
    symlinkSync(join(root, 'node_modules/tsx'), join(folder, 'node_modules/tsx'))
    copyFileSync(join(root, 'examples/pretrain.ts'), join(folder, 'pretrain.ts'))
    copyFileSync(join(import.meta.dirname, 'crashOnce.ts'), join(folder, 'crashOnce.ts'))
    const own = ['run', '--nproc-per-node', '2', 'pretrain.ts', ...smaller, `logger.metrics_file=${metrics('own')}`]
    expectDone(await start(process.execPath, [viaductFile, ...own], folder).ended)
    expect(losses('own')).toHaveLength(3)
  })

  test('runs the example on one node', async () => {
    expectDone(
      await start(torchrun as string, ['--standalone', '--nproc-per-node', '2', ...program('one')], folder).ended,
    )
    expect(losses('one')).toEqual(losses('own'))
  })

  test('runs it on two nodes of one rank', async () => {
    const where = [
      '--nnodes',
      '2',
      '--nproc-per-node',
      '1',
      '--master-addr',
      '127.0.0.1',
      '--master-port',
      String(await freePort()),
    ]
    const agents = ['0', '1'].map(
      (rank) => start(torchrun as string, [...where, '--node-rank', rank, ...program('two')], folder).ended,
    )
    for (const ended of await Promise.all(agents)) expectDone(ended)
    expect(losses('two')).toEqual(losses('own'))
  })

  test('runs it again after a failed attempt', async () => {
    const args = ['--standalone', '--nproc-per-node', '2', '--max-restarts', '1', ...program('again', 'crashOnce.ts')]
    const output = expectDone(await start(torchrun as string, args, folder).ended)
    expect(output).toContain('first attempt, rank 1 of 2')
    expect(losses('again')).toEqual(losses('own'))
  })
})

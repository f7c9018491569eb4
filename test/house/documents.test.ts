// README, CONTRIBUTING and docs against what exists, package.json's entry points, and bad samples for each rule.
// README's TypeScript is compiled against the sources: each `ts` block is a module of its own.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Command } from 'commander'
import { afterAll, describe, expect, it } from 'vitest'
import { createProgram } from '../../lib/cli/program.js'
import {
  commandProblems,
  type Facts,
  type Flags,
  manifestProblems,
  pathProblems,
  typescriptBlocks,
} from './documentRules.js'
import { repositoryFiles, root, type SourceFile, shown } from './sources.js'

const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
const exists = (path: string) => existsSync(join(root, path))

function flagsOf(command: Command): Flags {
  const options = [...(command.parent?.options ?? []), ...command.options]
  return new Map(
    options.flatMap((option) =>
      [option.long, option.short]
        .filter((name): name is string => typeof name === 'string')
        .map((name) => [name, { takesValue: option.required }] as const),
    ),
  )
}

const facts: Facts = {
  scripts: Object.keys(manifest.scripts),
  commands: new Map(createProgram('0').commands.map((command) => [command.name(), flagsOf(command)])),
  exists,
}

const files = repositoryFiles().filter((file) => file.path.endsWith('.md') && !file.path.startsWith('test/fixtures/'))
const read = (path: string): SourceFile => ({ path, text: readFileSync(join(root, path), 'utf8') })
const sample = (text: string): SourceFile => ({ path: 'README.md', text })

describe('documents', () => {
  it('name commands, flags and files that exist', () => {
    expect(shown(files.flatMap((file) => commandProblems(file, facts)))).toEqual([])
  })
  it('link to files that exist', () => {
    expect(shown(files.flatMap((file) => pathProblems(file, facts, !file.path.startsWith('docs/'))))).toEqual([])
  })
  it('README shows the two commands', () => {
    expect(read('README.md').text).toContain('npm run quickstart')
    expect(read('README.md').text).toContain('npm test')
  })
})

describe('package.json', () => {
  it('exports what has a source', () => expect(shown(manifestProblems(manifest, exists))).toEqual([]))
  it('is found out when it does not', () => {
    const bad = {
      exports: { '.': { types: './dist/lib/none.d.ts', default: './dist/lib/none.js' } },
      bin: { x: 'dist/x.js' },
    }
    expect(manifestProblems(bad, exists)).toHaveLength(3)
  })
})

describe('TypeScript of README', () => {
  const folders: string[] = []
  afterAll(() => {
    for (const folder of folders) rmSync(folder, { recursive: true, force: true })
  })

  function compile(blocks: readonly { text: string; line: number }[]): string {
    mkdirSync(join(root, '.viaduct'), { recursive: true })
    const folder = mkdtempSync(join(root, '.viaduct/readme-'))
    folders.push(folder)
    const config = {
      extends: '../../test/tsconfig.json',
      compilerOptions: { noUnusedLocals: false },
      include: ['./*.ts'],
    }
    writeFileSync(join(folder, 'tsconfig.json'), JSON.stringify(config))
    for (const { text, line } of blocks) writeFileSync(join(folder, `line${line}.ts`), `${text}\nexport {}\n`)
    const tsc = join(root, 'node_modules/typescript/bin/tsc')
    const result = spawnSync(process.execPath, [tsc, '-p', folder, '--noEmit', '--pretty', 'false'], {
      encoding: 'utf8',
    })
    return result.status === 0 ? '' : result.stdout + result.stderr
  }

  it('compiles', () => {
    const blocks = typescriptBlocks(read('README.md').text)
    expect(blocks.length).toBeGreaterThan(0)
    expect(compile(blocks)).toBe('')
  })
  it('is found out when it does not', () => {
    const blocks = typescriptBlocks("# a\n```ts\nimport { NoSuchThing } from 'viaduct'\n```\n")
    expect(compile(blocks)).toMatch(/has no exported member '?NoSuchThing/)
  })
})

describe('each rule can fail', () => {
  const block = (line: string) => sample(`text\n\n\`\`\`bash\n${line}\n\`\`\`\n`)
  it.each([
    'npm run no-such-script',
    '$ git clone x && npm run no-such-script',
    'viaduct frobnicate ./a ./b',
    'npx viaduct import ./a ./b --no-such-flag',
    'node dist/lib/cli/main.js frobnicate',
    'node deploy/none.mjs',
    'HF_HOME=x npx tsx examples/none.ts',
    './deploy/none.sh',
    'viaduct run --no-such-flag examples/a.ts',
    'viaduct import \\\n  --no-such-flag',
  ])('command: %s', (line) => {
    expect(commandProblems(block(line), facts)).toHaveLength(1)
  })
  it.each([
    'npm test # all of it',
    'npm ci',
    'viaduct --help',
    'npx viaduct import ./hf ./ckpt --tp 2',
    'viaduct run --nproc-per-node 2 convert.ts --no-such-flag',
    'node deploy/setup.mjs --force',
    'cat out.txt | sort',
  ])('lets pass: %s', (line) => {
    expect(shown(commandProblems(block(line), facts))).toEqual([])
  })
  it('inline commands', () => {
    expect(commandProblems(sample('Run `npm run no-such-script` or `viaduct frobnicate`.'), facts)).toHaveLength(2)
  })
  it('links and paths', () => {
    expect(pathProblems(sample('See [x](docs/none.md) and `lib/none/`.'), facts)).toHaveLength(2)
    expect(pathProblems(sample('See [x](docs/runtime.md#a), [y](https://e.org/z) and `lib/base`.'), facts)).toEqual([])
  })
})

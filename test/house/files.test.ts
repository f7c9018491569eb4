// The rules that hold for each file by itself, over the repository; and a bad sample for each, to show that it can fail.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { dtypes } from '../../lib/base/dtype.js'
import {
  awaitProblems,
  environmentProblems,
  folderProblems,
  kernelProblems,
  nameProblems,
  nativeDtypes,
  openingProblems,
  sizeProblems,
  wordProblems,
} from './fileRules.js'
import { repositoryFiles, root, type SourceFile, shown } from './sources.js'

const files = repositoryFiles()
const sample = (path: string, text: string): SourceFile[] => [{ path, text }]
const lines = (n: number) => `${Array.from({ length: n }, (_, i) => `// ${i}`).join('\n')}\n`

describe('the repository', () => {
  it('is seen by these tests', () => {
    expect(files.map((f) => f.path)).toEqual(
      expect.arrayContaining(['package.json', 'native/tensor.h', 'lib/base/errors.ts']),
    )
  })
  it('has no file over 500 lines', () => expect(shown(sizeProblems(files))).toEqual([]))
  it('has no folder named after nothing', () => expect(shown(folderProblems(files))).toEqual([]))
  it('has camelCase.ts and snake_case.cc', () => expect(shown(nameProblems(files))).toEqual([]))
  it('opens each file with a comment', () => expect(shown(openingProblems(files))).toEqual([]))
  it('holds no unfinished work and no foreign path', () => expect(shown(wordProblems(files))).toEqual([]))
  it('has kernels that the emulation can run', () => expect(shown(kernelProblems(files))).toEqual([]))
  it('can be required', () => expect(shown(awaitProblems(files))).toEqual([]))
  it('reads the environment in one file', () => expect(shown(environmentProblems(files))).toEqual([]))
})

describe('dtype codes', () => {
  const ours = () =>
    Object.values(dtypes)
      .filter((d) => d.code >= 0)
      .map((d) => [d.safetensors, d.code])
  it('are the same in TypeScript and C++', () => {
    const native = nativeDtypes(readFileSync(join(root, 'native/tensor.h'), 'utf8'))
    expect(Object.keys(native).length).toBeGreaterThan(10)
    expect(Object.fromEntries(ours())).toEqual(native)
  })
  it('are found to differ when they do', () => {
    expect(Object.fromEntries(ours())).not.toEqual(
      nativeDtypes('enum class DType : uint8_t {\n  F32 = 0,\n  BF16 = 2,\n};'),
    )
  })
})

describe('each rule can fail', () => {
  it('size', () => {
    expect(sizeProblems(sample('lib/a.ts', lines(501)))).toHaveLength(1)
    expect(sizeProblems(sample('lib/a.ts', lines(500)))).toHaveLength(0)
  })
  it.each(['const a = await b()', 'export const a: B = await c', 'await x', 'for await (const a of b) {'])(
    'top-level await: %s',
    (text) => {
      expect(awaitProblems(sample('lib/a.ts', `// one\n${text}\n`))).toHaveLength(1)
      expect(awaitProblems(sample('lib/a.ts', `async function f() {\n  ${text}\n}\n`))).toEqual([])
    },
  )
  it('folder', () => {
    expect(folderProblems(sample('lib/io/utils/a.ts', ''))).toHaveLength(1)
    expect(folderProblems(sample('lib/io/utils.ts', ''))).toHaveLength(0)
  })
  it('name', () => {
    expect(nameProblems(sample('lib/io/safe_tensors.ts', ''))).toHaveLength(1)
    expect(nameProblems(sample('native/cpu/crossEntropy.cc', ''))).toHaveLength(1)
    expect(nameProblems(sample('native/cpu/cross_entropy.cc', ''))).toHaveLength(0)
  })
  it('opening comment', () => {
    expect(openingProblems(sample('lib/a.ts', 'export {}\n'))).toHaveLength(1)
    expect(openingProblems(sample('lib/a.ts', lines(7)))).toHaveLength(1)
    expect(openingProblems(sample('lib/a.ts', '#!/usr/bin/env node\n// What lives here.\nexport {}\n'))).toHaveLength(0)
    expect(openingProblems(sample('deploy/a.sh', '#!/bin/bash\nexit\n'))).toHaveLength(1)
  })
  it.each([
    'TO' + 'DO later',
    'throw "not ' + 'implemented"',
    'a place' + 'holder',
    `see /wo${'rk'}/main`,
    `DESIGN${'.md'}`,
  ])('word: %s', (text) => {
    expect(wordProblems(sample('lib/a.ts', `// one\n${text}\n`))).toHaveLength(1)
  })
  it.each([
    ['lib/cli/a.ts', 'process.env.HOME'],
    ['lib/cli/a.ts', "process['env']"],
    ['lib/cli/a.ts', "import { env } from 'node:process'"],
    ['native/a.cc', 'std::getenv("HOME")'],
  ])('environment: %s %s', (path, text) => {
    expect(environmentProblems(sample(path, text))).toHaveLength(1)
    expect(environmentProblems(sample('lib/base/env.ts', text))).toHaveLength(0)
  })
  it.each(['kernel<<<1, 2>>>(x);', 'asm volatile("bar.sync 0;");', '#include <cub/cub.cuh>'])('kernels: %s', (text) => {
    expect(kernelProblems(sample('native/cuda/ops/a.cu', `// one\n${text}\n`))).toHaveLength(1)
    expect(kernelProblems(sample('native/cuda/ops/a.cu', `// one ${text}\n`))).toHaveLength(0)
  })
})

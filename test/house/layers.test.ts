// The order of layers over the repository, the document that shows it, and bad samples that the rules must catch.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { dependencyProblems, documentedLayers, importsOf, layerProblems, layers } from './layerRules.js'
import { repositoryFiles, root, type SourceFile, shown } from './sources.js'

const files = repositoryFiles()
const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
const sample = (path: string, text: string): SourceFile[] => [{ path, text }]

describe('the repository', () => {
  it('imports downwards only', () => expect(shown(layerProblems(files))).toEqual([]))
  it('runs on its dependencies alone', () => {
    expect(shown(dependencyProblems(files, Object.keys(manifest.dependencies)))).toEqual([])
  })
  it('shows the same order in docs/architecture.md', () => {
    expect(documentedLayers(readFileSync(join(root, 'docs/architecture.md'), 'utf8'))).toEqual(layers)
  })
})

describe('each rule can fail', () => {
  it('finds every form of import', () => {
    const text = [
      "import { a } from './a.js'",
      "import type { B } from './b.js'",
      "import {\n  c,\n  d as e,\n} from './c.js'",
      "export * from './d.js'",
      "export { f } from './f.js'",
      "import './g.js'",
      "const h = await import('./h.js')",
      "let i: import('./i.js').I",
      "import * as j from './j.js'",
      "// import './no.js'",
      "/* import './no.js' */",
      "import { type K, l } from './k.js'",
    ].join('\n')
    const found = importsOf({ path: 'lib/x.ts', text }).map((i) => i.specifier)
    expect(found).toEqual('abcdfghijk'.split('').map((c) => `./${c}.js`))
  })
  it.each([
    ['lib/nn/a.ts', "import { x } from '../parallel/mesh.js'"],
    ['lib/nn/a.ts', "import type { X } from '../parallel/mesh.js'"],
    ['lib/nn/a.ts', "const x = await import('../cli/main.js')"],
    ['lib/nn/deep/a.ts', "export * from '../../train/step.js'"],
    ['lib/nn/a.ts', "import { x } from '../index.js'"],
    ['lib/train/a.ts', "import { x } from '../../recipes/llama.js'"],
    ['lib/train/a.ts', "import { x } from '../../test/a.js'"],
    ['lib/train/a.ts', "import { x } from 'viaduct'"],
    ['lib/extra/a.ts', ''],
    ['recipes/a.ts', "import { x } from '../lib/train/loop.js'"],
    ['recipes/a.ts', "import { x } from '../lib/index.js'"],
    ['examples/a.ts', "import { x } from '../lib/index.js'"],
    ['examples/a.ts', "import { x } from 'zod'"],
  ])('layers: %s with %s', (path, text) => {
    expect(layerProblems(sample(path, text))).toHaveLength(1)
  })
  it.each([
    ['lib/nn/a.ts', "import { x } from '../ops/tape.js'\nimport { y } from './linear.js'"],
    ['lib/cli/commands/a.ts', "import { x } from '../../../recipes/llama.js'"],
    ['lib/index.ts', "export * from './bridge/autoBridge.js'"],
    ['recipes/a.ts', "import { x } from '../lib/config/runConfig.js'"],
    ['examples/a.ts', "import { x } from 'viaduct/train'\nimport { y } from 'node:fs'\nimport { z } from './b.js'"],
  ])('lets pass: %s with %s', (path, text) => {
    expect(layerProblems(sample(path, text))).toEqual([])
  })
  it('dependencies', () => {
    expect(dependencyProblems(sample('lib/cli/a.ts', "import { a } from 'vitest'"), ['zod'])).toHaveLength(1)
    expect(
      dependencyProblems(sample('lib/cli/a.ts', "import { a } from 'zod/v4'\nimport b from '@s/p/q'"), ['zod', '@s/p']),
    ).toEqual([])
  })
  it('documented order', () => {
    expect(documentedLayers('| `lib/base` | a | |\n| `lib/ops` | b | |\n')).toEqual(['base', 'ops'])
  })
})

// Interchange with the Python packages: Transformers makes folders, we import and export them, Transformers and safetensors load
// what came out and find the same names, bytes, config and logits.
import { mkdirSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { viaduct } from '../cli/commandLine.js'
import { temporaryFolder } from '../hostile/temporary.js'
import { python, runPython } from './python.js'

const home = temporaryFolder()

test.skipIf(python === null)('Transformers and safetensors load what we export', async () => {
  const [made, exported, checkpoints, fresh] = ['made', 'exported', 'checkpoints', 'new'].map((name) =>
    join(home, name),
  ) as [string, string, string, string]
  for (const folder of [made, exported, checkpoints]) mkdirSync(folder)
  runPython('interchange.py', 'make', made)
  const names = readdirSync(made)
  expect(names.length).toBeGreaterThan(3)
  for (const name of names) {
    const imported = await viaduct(home, 'import', join('made', name), join('checkpoints', name), '--tp', '2')
    expect(imported.code, imported.stderr).toBe(0)
    const back = await viaduct(home, 'export', join('checkpoints', name), join('exported', name))
    expect(back.code, back.stderr).toBe(0)
  }
  const bridge = AutoBridge.fromHfConfig((await AutoBridge.fromHfPretrained(join(made, 'tied_biases'))).hfConfig)
  const model = await bridge.toMegatronModel({ wrapWithDdp: false })
  await bridge.saveHfPretrained(model, fresh)
  await model.dispose()
  expect(runPython('interchange.py', 'check', made, exported, checkpoints, fresh)).toContain(
    `equal: ${names.length} folders`,
  )
})

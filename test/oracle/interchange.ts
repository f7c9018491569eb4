// Interchange with the Python packages: Transformers makes folders, we import and export them, Transformers and safetensors load
// what came out and find the same bytes, config and logits. Run by `npm run test:oracle`; ORACLE_PYTHON names the interpreter.
import { execFileSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'

const interpreter = process.env['ORACLE_PYTHON'] ?? 'python3'
const script = resolve(import.meta.dirname, 'interchange.py')
const python = (...args: string[]) =>
  execFileSync(interpreter, [script, ...args], { stdio: ['ignore', 'inherit', 'inherit'] })

const home = mkdtempSync(join(tmpdir(), 'viaduct-oracle-'))
try {
  const [made, exported, checkpoints, fresh] = ['made', 'exported', 'checkpoints', 'new'].map((name) =>
    join(home, name),
  ) as [string, string, string, string]
  for (const folder of [made, exported, checkpoints]) mkdirSync(folder)
  python('make', made)
  for (const name of readdirSync(made)) {
    await AutoBridge.importCkpt(join(made, name), join(checkpoints, name))
    await AutoBridge.exportCkpt(join(checkpoints, name), join(exported, name))
  }
  const bridge = AutoBridge.fromHfConfig((await AutoBridge.fromHfPretrained(join(made, 'tied_biases'))).hfConfig)
  const model = await bridge.toMegatronModel({ wrapWithDdp: false })
  await bridge.saveHfPretrained(model, fresh)
  await model.dispose()
  python('check', made, exported, checkpoints, fresh)
} finally {
  rmSync(home, { recursive: true, force: true })
}

// Every op against its float64 oracle: values, and gradients against finite differences of the oracle.
import { describe, test } from 'vitest'
import { cases } from './cases.js'
import { checkCase } from './checkCase.js'

describe.each(['float32', 'bfloat16'] as const)('ops in %s', (dtype) => {
  for (const op of cases) {
    if (dtype === 'bfloat16' && op.float32Only) continue
    test(op.name, () => checkCase(op, dtype, 'cpu'))
  }
})

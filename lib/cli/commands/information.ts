// `viaduct models` and `viaduct recipes`: what there is to convert and to train.

import { recipes } from '../../../recipes/index.js'
import { describeArchitectures } from '../../models/registry.js'
import { print, table } from '../terminal.js'

interface Flags {
  json?: boolean
}

export function modelsCommand(flags: Flags): void {
  const models = describeArchitectures()
  if (flags.json) return print(JSON.stringify({ models }))
  print(
    table(
      ['architecture', 'model_type', 'converts', 'trains and generates'],
      models.map((m) => [m.architecture, m.modelType, 'yes', m.runs ? 'yes' : 'not yet']),
    ),
  )
}

export function recipesCommand(flags: Flags): void {
  const rows = recipes.map(({ name, family, description }) => ({ name, family, description }))
  if (flags.json) return print(JSON.stringify({ recipes: rows }))
  print(
    table(
      ['recipe', 'family', 'what it is'],
      rows.map((r) => [r.name, r.family, r.description]),
    ),
  )
}

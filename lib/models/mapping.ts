// Two-way mapping rules between Hugging Face tensors and logical Megatron tensors. A rule yields regions (HF tensor -> logical
// tensor); import, export, the coverage proof and byte-range plans all read the same regions. Knows names and shapes, no files.
import { type DType, dtypes } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import { identityRegion, type Region, tilingFault, volume } from '../tensor/region.js'
import type { ParameterRow } from './parameterTable.js'
import type { TransformerConfig } from './transformerConfig.js'

/** One HF tensor's part of a logical tensor. */
export interface Part {
  readonly name: string
  readonly shape: readonly number[]
  /** HF tensor -> logical tensor. */
  readonly regions: readonly Region[]
}

/** A rule: which HF tensors make up one logical tensor. `*` in names stands for the layer's index. */
export interface MappingRule {
  readonly kind: 'rename' | 'qkv' | 'gated'
  /** Megatron's name. */
  readonly ours: string
  /** HF names, in the order in which `place` answers. */
  readonly theirs: readonly string[]
  /** For a logical shape: each HF tensor's shape and regions. */
  place(shape: readonly number[], config: TransformerConfig): Omit<Part, 'name'>[]
}

/** A HF tensor that may be there and repeats another one: the output layer of tied embeddings. Compared, then written again. */
export interface TiedRule {
  readonly kind: 'tied'
  readonly copy: string
  readonly of: string
}

/** A HF tensor that may be there and follows from the config: checked against its formula, kept byte for byte. */
export interface DerivedRule {
  readonly kind: 'derived'
  readonly theirs: string
  shape(config: TransformerConfig): number[]
  /** The exact values, row-major. */
  values(config: TransformerConfig): Float64Array
}

export type Rule = MappingRule | TiedRule | DerivedRule

/** Same tensor, another name. */
export function rename(ours: string, theirs: string): MappingRule {
  return { kind: 'rename', ours, theirs: [theirs], place: (shape) => [{ shape, regions: [identityRegion(shape)] }] }
}

/** Rows `from` to `from + count` of one tensor onto rows from `to` of another; all other dims whole. */
function rowRegion(rest: readonly number[], from: number, to: number, count: number): Region {
  const zeros = rest.map(() => 0)
  return { from: [from, ...zeros], to: [to, ...zeros], size: [count, ...rest] }
}

/** Query, key and value into one tensor, interleaved per query group: [q .. q, k, v]. Weights and biases. */
export function qkv(ours: string, theirs: { q: string; k: string; v: string }): MappingRule {
  return {
    kind: 'qkv',
    ours,
    theirs: [theirs.q, theirs.k, theirs.v],
    place([, ...rest], config) {
      const { numQueryGroups: groups, kvChannels: D } = config
      const heads = config.numAttentionHeads / groups
      const group = (heads + 2) * D
      const part = (rows: number, offset: number) => ({
        shape: [groups * rows, ...rest],
        regions: Array.from({ length: groups }, (_, g) => rowRegion(rest, g * rows, g * group + offset, rows)),
      })
      return [part(heads * D, 0), part(D, heads * D), part(D, (heads + 1) * D)]
    },
  }
}

/** Gate and up into one tensor, gate first. Weights and biases. */
export function gated(ours: string, theirs: { gate: string; up: string }): MappingRule {
  return {
    kind: 'gated',
    ours,
    theirs: [theirs.gate, theirs.up],
    place([rows, ...rest]) {
      const half = (rows as number) / 2
      const part = (offset: number) => ({ shape: [half, ...rest], regions: [rowRegion(rest, 0, offset, half)] })
      return [part(0), part(half)]
    },
  }
}

/** A copy that the source may carry though config ties it. */
export function tied(copy: string, of: string): TiedRule {
  return { kind: 'tied', copy, of }
}

/** A tensor that the source may carry though it follows from the config. */
export function derived(theirs: string, shape: DerivedRule['shape'], values: DerivedRule['values']): DerivedRule {
  return { kind: 'derived', theirs, shape, values }
}

/** A logical tensor and the HF tensors that it is made of. */
export interface Binding {
  readonly ours: string
  readonly shape: readonly number[]
  readonly parts: readonly Part[]
}

/** All rules of one model, resolved to names and shapes, and proved: both sides of each binding tile. */
export interface Mapping {
  readonly config: TransformerConfig
  readonly bindings: ReadonlyMap<string, Binding>
  /** HF name -> its binding and part. */
  readonly byTheirs: ReadonlyMap<string, { readonly binding: Binding; readonly part: Part }>
  readonly tied: ReadonlyMap<string, string>
  readonly derived: ReadonlyMap<string, DerivedRule>
}

/**
 * Resolves rules for a model's parameters.
 * @throws ERR_COVERAGE when a parameter has no rule or two, or a rule's regions do not tile: a fault of the family's table.
 */
export function bindRules(
  rules: readonly Rule[],
  parameters: readonly ParameterRow[],
  config: TransformerConfig,
): Mapping {
  const bindings = new Map<string, Binding>()
  const byTheirs = new Map<string, { binding: Binding; part: Part }>()
  const ties = new Map<string, string>()
  const formulas = new Map<string, DerivedRule>()
  const problems: string[] = []
  const shapes = new Map(parameters.map((p) => [p.name, p.shape]))
  for (const rule of rules) {
    if (rule.kind === 'tied') ties.set(rule.copy, rule.of)
    else if (rule.kind === 'derived')
      for (const [name] of expand([rule.theirs], config)) formulas.set(name as string, rule)
    else {
      for (const [ours, ...theirs] of expand([rule.ours, ...rule.theirs], config)) {
        const shape = shapes.get(ours as string)
        if (shape === undefined) continue // the rule is for another variant (a bias that this config lacks)
        if (bindings.has(ours as string)) problems.push(`${ours} has two rules`)
        const parts = rule.place(shape, config).map((part, i) => ({ name: theirs[i] as string, ...part }))
        const binding = { ours: ours as string, shape, parts }
        problems.push(...bindingProblems(binding))
        bindings.set(binding.ours, binding)
        for (const part of parts) {
          if (byTheirs.has(part.name)) problems.push(`${part.name} is read by two rules`)
          byTheirs.set(part.name, { binding, part })
        }
      }
    }
  }
  for (const { name } of parameters) if (!bindings.has(name)) problems.push(`${name} has no rule`)
  if (problems.length > 0)
    throw new ViaductError(
      'ERR_COVERAGE',
      'mapping',
      `the mapping table does not cover the model: ${problems.join('; ')}`,
      { problems },
    )
  return { config, bindings, byTheirs, tied: ties, derived: formulas }
}

/** Both sides tile: each logical element has one source, each HF element one reader. */
function bindingProblems(binding: Binding): string[] {
  const problems: string[] = []
  const ours = binding.parts.flatMap((part) => part.regions.map((r) => ({ start: r.to, size: r.size })))
  const fault = tilingFault(binding.shape, ours)
  if (fault) problems.push(`${binding.ours}: ${fault}`)
  for (const part of binding.parts) {
    const theirs = tilingFault(
      part.shape,
      part.regions.map((r) => ({ start: r.from, size: r.size })),
    )
    if (theirs) problems.push(`${part.name}: ${theirs}`)
  }
  return problems
}

/** Names with `*` once per layer, others once. */
function expand(names: readonly string[], config: TransformerConfig): string[][] {
  if (!names.some((name) => name.includes('*'))) return [[...names]]
  return Array.from({ length: config.numLayers }, (_, i) => names.map((name) => name.replace('*', String(i))))
}

/** A tensor as a source describes it. */
export interface TensorFacts {
  readonly dtype: DType
  readonly shape: readonly number[]
}

/** What the user lets pass, by patterns with `*` and `?` over HF names. */
export interface CoveragePolicy {
  /** Source tensors that may stay unread. */
  readonly ignore?: readonly string[]
  /** HF tensors that may be absent: their parameters stay initialised. */
  readonly allowMissing?: readonly string[]
}

/** The outcome of a coverage proof. */
export interface Coverage {
  /** HF tensors that are read by bindings. */
  readonly mapped: readonly string[]
  /** Copies of tied tensors that are there: to be compared, written again on export. */
  readonly tied: readonly string[]
  /** Derived tensors that are there: to be checked, carried. */
  readonly derived: readonly string[]
  /** Unread by permission. */
  readonly ignored: readonly string[]
  /** Absent by permission. */
  readonly missing: readonly string[]
  /** True when something was ignored or missing. */
  readonly partial: boolean
}

/** A name against a pattern with `*` (anything) and `?` (one character). */
export function matchesPattern(name: string, pattern: string): boolean {
  const expression = pattern
    .replace(/[.+^${}()|[\]\\]/g, '\\$&')
    .replaceAll('*', '.*')
    .replaceAll('?', '.')
  return new RegExp(`^${expression}$`, 's').test(name)
}

/**
 * Proves, before a byte moves, that a source and a model fit: every HF tensor has a reader, every logical element a source,
 * all shapes agree, no dtype needs a scale that nobody applies.
 * @throws ERR_TENSOR_SHAPE if shapes are the only problem, ERR_TENSOR_DTYPE if dtypes are, else ERR_COVERAGE; all are listed.
 */
export function proveCoverage(
  mapping: Mapping,
  source: ReadonlyMap<string, TensorFacts>,
  policy: CoveragePolicy = {},
): Coverage {
  const allowed = (name: string, patterns: readonly string[] = []) => patterns.some((p) => matchesPattern(name, p))
  const lists = {
    mapped: [] as string[],
    tied: [] as string[],
    derived: [] as string[],
    ignored: [] as string[],
    missing: [] as string[],
  }
  const absent: string[] = []
  const unexpected: string[] = []
  const shapes: string[] = []
  const kinds: string[] = []
  const checkShape = (name: string, actual: readonly number[], expected: readonly number[]) => {
    if (actual.length !== expected.length || actual.some((n, d) => n !== expected[d])) {
      shapes.push(`${name}: expected [${expected}] from the config, got [${actual}] in the file`)
    }
  }
  for (const [name, facts] of source) {
    const original = mapping.tied.get(name)
    const bound = mapping.byTheirs.get(name)
    const formula = mapping.derived.get(name)
    if (allowed(name, policy.ignore)) lists.ignored.push(name)
    else if (bound) {
      lists.mapped.push(name)
      checkShape(name, facts.shape, bound.part.shape)
      const problem = dtypeProblem(name, facts.dtype)
      if (problem) kinds.push(problem)
    } else if (original !== undefined) {
      lists.tied.push(name)
      checkShape(name, facts.shape, mapping.byTheirs.get(original)?.part.shape ?? [])
    } else if (formula) {
      lists.derived.push(name)
      checkShape(name, facts.shape, formula.shape(mapping.config))
    } else unexpected.push(name)
  }
  for (const name of mapping.byTheirs.keys()) {
    if (source.has(name) && !lists.ignored.includes(name)) continue
    if (allowed(name, policy.allowMissing)) lists.missing.push(name)
    else absent.push(name)
  }
  for (const { ours, parts } of mapping.bindings.values()) {
    const found = new Set(parts.flatMap((part) => source.get(part.name)?.dtype ?? []))
    if (found.size > 1)
      kinds.push(
        `${parts.map((p) => p.name).join(', ')} become ${ours} but have the dtypes ${[...found].join(', ')}: save them in one dtype`,
      )
    const gone = parts.filter((part) => lists.missing.includes(part.name))
    if (gone.length > 0 && gone.length < parts.length)
      absent.push(
        ...gone.map((part) => `${part.name} (its siblings of ${ours} are there: allow all or none to be missing)`),
      )
  }
  const problems = [
    ...list('missing from the source', absent, 'allow with --allow-missing'),
    ...list('unexpected in the source', unexpected, 'allow with --ignore'),
    ...list('of the wrong shape', shapes),
    ...list('of a dtype that is not handled', kinds),
  ]
  if (problems.length > 0) {
    const code =
      absent.length + unexpected.length > 0
        ? 'ERR_COVERAGE'
        : shapes.length > 0
          ? 'ERR_TENSOR_SHAPE'
          : 'ERR_TENSOR_DTYPE'
    const hint = absent.includes('lm_head.weight')
      ? '; lm_head.weight is needed because tie_word_embeddings is false'
      : ''
    throw new ViaductError(code, 'coverage', problems.join('; ') + hint, {
      missing: absent,
      unexpected,
      shapes,
      dtypes: kinds,
    })
  }
  return { ...lists, partial: lists.ignored.length + lists.missing.length > 0 }
}

function list(what: string, items: readonly string[], hint?: string): string[] {
  if (items.length === 0) return []
  const shown = items.slice(0, 50).join(', ') + (items.length > 50 ? ` and ${items.length - 50} more` : '')
  return [
    `${items.length} ${items.length === 1 ? 'tensor' : 'tensors'} ${what}: ${shown}${hint ? ` (${hint} PATTERN)` : ''}`,
  ]
}

/** Integers, booleans and packed floats in a weight's place mean quantisation that nobody undoes. */
function dtypeProblem(name: string, dtype: DType): string | null {
  if (dtypes[dtype].isFloat && dtypes[dtype].code >= 0) return null
  return `${name} is ${dtype}: a quantised weight, and its family has no rule that dequantises it`
}

/** Elements of a logical tensor, for sums and reports. */
export function bindingElements(binding: Binding): number {
  return volume(binding.shape)
}

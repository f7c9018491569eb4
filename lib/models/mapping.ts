// Two-way mapping rules between Hugging Face tensors and logical Megatron tensors. A rule yields regions (HF tensor -> logical
// tensor); import, export, the coverage proof and byte-range plans all read the same regions. Knows names and shapes, no files.
import { type DType, dtypes } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import { identityRegion, type Region, tilingFault, volume } from '../tensor/region.js'
import type { ParameterRow } from './parameterTable.js'
import type { TransformerConfig } from './transformerConfig.js'

/** What one HF tensor, or one slice of it, contributes to a logical tensor. */
export interface Part {
  readonly name: string
  /** Shape that the regions speak of: the HF tensor's, or its slice's. */
  readonly shape: readonly number[]
  /** Where the HF tensor stacks all experts along a first dim of its own: which of how many slices; null: all of the tensor. */
  readonly slice: { readonly index: number; readonly count: number } | null
  /** HF tensor or slice -> logical tensor. */
  readonly regions: readonly Region[]
}

/** Shape of the whole HF tensor that a part is of. */
export function tensorShape({ shape, slice }: Part): readonly number[] {
  return slice === null ? shape : [slice.count, ...shape]
}

/**
 * A rule: which HF tensors make up one logical tensor. In names `*` stands for the layer's index and `{e}` for the expert's. A HF
 * name without `{e}` under a logical name with it is a stack of all experts, of which each takes its slice.
 */
export interface MappingRule {
  readonly kind: 'rename' | 'qkv' | 'gated'
  /** Megatron's name. */
  readonly ours: string
  /** HF names, in the order in which `place` answers. */
  readonly theirs: readonly string[]
  /** For a logical shape: each HF tensor's (or slice's) shape and regions. */
  place(shape: readonly number[], config: TransformerConfig): Pick<Part, 'shape' | 'regions'>[]
}

/** Several ways to write the same parameters; the source's names decide, the first one is for new files. */
export interface SpellingRule {
  readonly kind: 'spellings'
  readonly choices: readonly (readonly MappingRule[])[]
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

export type Rule = MappingRule | SpellingRule | TiedRule | DerivedRule

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

/** Several ways to write the same parameters, the one for new files first. */
export function spellings(...choices: MappingRule[][]): SpellingRule {
  return { kind: 'spellings', choices }
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
  /** The rule that made it. */
  readonly kind: MappingRule['kind']
  readonly ours: string
  readonly shape: readonly number[]
  readonly parts: readonly Part[]
}

/** A part with the binding that it belongs to. */
export interface BoundPart {
  readonly binding: Binding
  readonly part: Part
}

/** All rules of one model, resolved to names and shapes, and proved: both sides of each binding tile. */
export interface Mapping {
  readonly config: TransformerConfig
  readonly bindings: ReadonlyMap<string, Binding>
  /** HF name -> its one reader, or those of its slices in their order. */
  readonly byTheirs: ReadonlyMap<string, readonly BoundPart[]>
  readonly tied: ReadonlyMap<string, string>
  readonly derived: ReadonlyMap<string, DerivedRule>
}

/** Names of a source's tensors. */
export type TensorNames = Pick<ReadonlySet<string>, 'has'>

/**
 * Resolves rules for a model's parameters.
 * @param names - of the source or, for an export, of the source that it came from: they choose the spelling. null: new files.
 * @throws ERR_COVERAGE when a parameter has no rule or two, or a rule's regions do not tile: a fault of the family's table.
 */
export function bindRules(
  rules: readonly Rule[],
  parameters: readonly ParameterRow[],
  config: TransformerConfig,
  names: TensorNames | null = null,
): Mapping {
  const bindings = new Map<string, Binding>()
  const byTheirs = new Map<string, BoundPart[]>()
  const ties = new Map<string, string>()
  const formulas = new Map<string, DerivedRule>()
  const problems: string[] = []
  const rows = new Map(parameters.map((row) => [row.name, row]))
  const bind = (rule: MappingRule) => {
    const placed = new Map<string, Placed>()
    eachInstance(rule, config, (ours, theirs, expert) => {
      const row = rows.get(ours)
      if (row === undefined) return // the rule is for another variant (a bias that this config lacks)
      const { name: known, shape } = row
      const key = shape.join()
      const { places, faults } = placed.get(key) ?? place(rule, shape, config)
      placed.set(key, { places, faults })
      const parts = places.map(({ shape: theirShape, regions }, i): Part => {
        const { name, ofExpert } = theirs(i)
        const slice = expert !== null && !ofExpert ? { index: expert, count: config.numMoeExperts as number } : null
        return { name, shape: theirShape, slice, regions }
      })
      for (const { part, fault } of faults) problems.push(`${part === null ? ours : parts[part]?.name}: ${fault}`)
      const binding = { kind: rule.kind, ours: known, shape, parts }
      const before = bindings.size
      bindings.set(known, binding)
      if (bindings.size === before) problems.push(`${ours} has two rules`)
      for (const part of parts) {
        const readers = byTheirs.get(part.name)
        if ((readers?.length ?? 0) !== (part.slice?.index ?? 0)) problems.push(`${part.name} is read by two rules`)
        if (readers === undefined) byTheirs.set(part.name, [{ binding, part }])
        else readers.push({ binding, part })
      }
    })
  }
  for (const rule of rules) {
    if (rule.kind === 'tied') ties.set(rule.copy, rule.of)
    else if (rule.kind === 'derived') for (const name of layersOf(rule.theirs, config)) formulas.set(name, rule)
    else if (rule.kind === 'spellings') {
      for (const chosen of spellingOf(rule, rows, config, names)) bind(chosen)
    } else bind(rule)
  }
  if (bindings.size < rows.size)
    for (const { name } of parameters) if (!bindings.has(name)) problems.push(`${name} has no rule`)
  for (const [name, readers] of byTheirs) {
    const count = readers[0]?.part.slice?.count ?? 1
    if (readers.length < count) problems.push(`${readers.length} of the ${count} slices of ${name} are read`)
  }
  if (problems.length > 0)
    throw new ViaductError(
      'ERR_COVERAGE',
      'mapping',
      `the mapping table does not cover the model: ${problems.join('; ')}`,
      { problems },
    )
  return { config, bindings, byTheirs, tied: ties, derived: formulas }
}

/** The spelling of which the source has most names: the coverage proof then tells what is missing, and names of another one. */
function spellingOf(
  { choices }: SpellingRule,
  rows: ReadonlyMap<string, unknown>,
  config: TransformerConfig,
  names: TensorNames | null,
): readonly MappingRule[] {
  const [first] = choices as readonly [readonly MappingRule[]]
  if (names === null) return first
  const present = (choice: readonly MappingRule[], step: number) => {
    let count = 0
    for (const rule of choice) {
      const visit = (ours: string, theirs: NamesOf, expert: number | null) => {
        if (!rows.has(ours)) return
        for (const i of rule.theirs.keys()) {
          const { name, ofExpert } = theirs(i)
          if ((ofExpert || (expert ?? 0) === 0) && names.has(name)) count++
        }
      }
      eachInstance(rule, config, visit, step)
    }
    return count
  }
  // The first and the last expert of each layer tell, unless they tell of several spellings alike.
  for (const step of [Math.max(1, (config.numMoeExperts ?? 1) - 1), 1]) {
    const counts = choices.map((choice) => present(choice, step))
    const most = Math.max(...counts)
    if (step === 1 || counts.filter((count) => count === most).length === 1)
      return choices[counts.indexOf(most)] as readonly MappingRule[]
  }
  return first
}

/** Where a rule puts tensors of one shape, and what is wrong about it. Layers and experts of the same shape share it. */
interface Placed {
  readonly places: readonly Pick<Part, 'shape' | 'regions'>[]
  /** Of a part, or (null) of the logical tensor. */
  readonly faults: readonly { readonly part: number | null; readonly fault: string }[]
}

/** Places, and proves that both sides tile: each logical element has one source, each HF element one reader. */
function place(rule: MappingRule, shape: readonly number[], config: TransformerConfig): Placed {
  const places = rule.place(shape, config)
  const ours = tilingFault(
    shape,
    places.flatMap(({ regions }) => regions.map((r) => ({ start: r.to, size: r.size }))),
  )
  const theirs = places.map((part) =>
    tilingFault(
      part.shape,
      part.regions.map((r) => ({ start: r.from, size: r.size })),
    ),
  )
  const faults = [ours, ...theirs].flatMap((fault, i) =>
    fault === null ? [] : [{ part: i === 0 ? null : i - 1, fault }],
  )
  return { places, faults }
}

/** A rule's HF names in one instance, made when asked for; `ofExpert`: it is one expert's own. */
type NamesOf = (i: number) => { readonly name: string; readonly ofExpert: boolean }

/** Calls `f` with a rule's names for each layer and every `step`th expert that they speak of, layer by layer. */
function eachInstance(
  rule: MappingRule,
  config: TransformerConfig,
  f: (ours: string, theirs: NamesOf, expert: number | null) => void,
  step = 1,
): void {
  const named = nameMaker(rule.ours)
  const makers = rule.theirs.map(nameMaker)
  const layers = named.ofLayer ? config.numLayers : 1
  const experts = named.ofExpert ? (config.numMoeExperts ?? 0) : 1
  for (let layer = 0; layer < layers; layer++) {
    for (let expert = 0; expert < experts; expert += step) {
      const theirs: NamesOf = (i) => {
        const { of, ofExpert } = makers[i] as NameMaker
        return { name: of(layer, expert), ofExpert }
      }
      f(named.of(layer, expert), theirs, named.ofExpert ? expert : null)
    }
  }
}

interface NameMaker {
  readonly ofLayer: boolean
  readonly ofExpert: boolean
  readonly of: (layer: number, expert: number) => string
}

/** A pattern with `*` and, behind it, `{e}`, each once or not at all. */
function nameMaker(pattern: string): NameMaker {
  const [start, ...afterLayer] = pattern.split('*')
  const [middle, ...afterExpert] = (afterLayer.length === 0 ? (start as string) : (afterLayer[0] as string)).split(
    '{e}',
  )
  const ofLayer = afterLayer.length > 0
  const ofExpert = afterExpert.length > 0
  const end = afterExpert[0] ?? ''
  if (!ofLayer && !ofExpert) return { ofLayer, ofExpert, of: () => pattern }
  if (!ofExpert) return { ofLayer, ofExpert, of: (layer) => `${start}${layer}${middle}` }
  if (!ofLayer) return { ofLayer, ofExpert, of: (_, expert) => `${middle}${expert}${end}` }
  return { ofLayer, ofExpert, of: (layer, expert) => `${start}${layer}${middle}${expert}${end}` }
}

/** A name with `*` once per layer, another once. */
function layersOf(name: string, config: TransformerConfig): string[] {
  if (!name.includes('*')) return [name]
  return Array.from({ length: config.numLayers }, (_, i) => name.replace('*', String(i)))
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
  return patternMatcher([pattern])(name)
}

/** As matchesPattern for several patterns, of which one must match, and many names. */
export function patternMatcher(patterns: readonly string[]): (name: string) => boolean {
  if (patterns.length === 0) return () => false
  const expressions = patterns.map((pattern) =>
    pattern
      .replace(/[.+^${}()|[\]\\]/g, '\\$&')
      .replaceAll('*', '.*')
      .replaceAll('?', '.'),
  )
  const expression = new RegExp(`^(?:${expressions.join('|')})$`, 's')
  return (name) => expression.test(name)
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
  const mayBeUnread = patternMatcher(policy.ignore ?? [])
  const mayBeAbsent = patternMatcher(policy.allowMissing ?? [])
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
    const bound = mapping.byTheirs.get(name)?.[0]
    const formula = mapping.derived.get(name)
    if (mayBeUnread(name)) lists.ignored.push(name)
    else if (bound) {
      lists.mapped.push(name)
      checkShape(name, facts.shape, tensorShape(bound.part))
      const problem = dtypeProblem(name, facts.dtype)
      if (problem) kinds.push(problem)
    } else if (original !== undefined) {
      lists.tied.push(name)
      checkShape(name, facts.shape, mapping.byTheirs.get(original)?.[0]?.part.shape ?? [])
    } else if (formula) {
      lists.derived.push(name)
      checkShape(name, facts.shape, formula.shape(mapping.config))
    } else unexpected.push(name)
  }
  const ignored = new Set(lists.ignored)
  for (const name of mapping.byTheirs.keys()) {
    if (source.has(name) && !ignored.has(name)) continue
    if (mayBeAbsent(name)) lists.missing.push(name)
    else absent.push(name)
  }
  const missing = new Set(lists.missing)
  for (const { ours, parts } of mapping.bindings.values()) {
    if (parts.length === 1) continue
    const found = parts.flatMap((part) => source.get(part.name)?.dtype ?? [])
    if (found.some((dtype) => dtype !== found[0]))
      kinds.push(
        `${parts.map((p) => p.name).join(', ')} become ${ours} but have the dtypes ${[...new Set(found)].join(', ')}: save them in one dtype`,
      )
    const gone = missing.size === 0 ? [] : parts.filter((part) => missing.has(part.name))
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

// The ways out that a refusal names, as changes of the command line that was refused: what a user would type next.
import { join } from 'node:path'
import type { ViaductError } from '../../lib/base/errors.js'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { checkLayout, chosenLayout, type LayoutFlags } from '../../lib/cli/layout.js'
import { flagsOfFields } from '../../lib/cli/layoutFlagNames.js'

import { resolveTraining, trainConfig } from '../../lib/cli/trainConfig.js'

/** Words of a command line after its command. */
export type Words = readonly string[]

/** A field or flag and its new value; undefined: left out. */
type Change = readonly [name: string, value: string | undefined]

const list = (text: string) => text.split(/, | or /).map((value) => value.trim())

/** One way of `use A, or B`. @param field - what the problem is about. */
function way(text: string, field: string): Change[][] {
  const layout = /^pipelineModelParallelLayout=(\S+?)(?:, without (.*))?$/.exec(text)
  if (layout !== null)
    return [
      [
        ['pipelineModelParallelLayout', layout[1]],
        ...(layout[2]?.split(' and ') ?? []).map((key) => [key, undefined] as const),
      ],
    ]
  if (text.startsWith('no '))
    return [
      text
        .slice(3)
        .split(' and no ')
        .map((key) => [key, undefined] as const),
    ]
  const ranks = /^(\d+(?: or \d+)*) ranks(?: \(dp (\d+)\))?/.exec(text)
  if (ranks !== null) {
    const dp: Change[] = ranks[2] === undefined ? [] : [['--dp', ranks[2]]]
    return list(ranks[1] as string).map((n) => [...dp, ['--nproc-per-node', n]])
  }
  const flag = /^give (--[\w-]+) (\d+)$/.exec(text)
  if (flag !== null) return [[[flag[1] as string, flag[2]]]]
  const [, key = field, values = ''] = /^(?:([\w.]+)=)?(?:at most )?(.*)$/.exec(text) ?? []
  return list(values).map((value) => [[key, value === 'null' ? undefined : value]])
}

/** The ways out of a problem, each a list of changes; empty where it names none. */
function waysOf(problem: string): Change[][] {
  const fits = /; this fits: (\S+)$/.exec(problem)
  if (fits !== null) return [[['pipelineModelParallelLayout', fits[1]]]]
  const start = /: viaduct run (--nproc-per-node) (\d+) SCRIPT/.exec(problem)
  if (start !== null) return [[[start[1] as string, start[2]]]]
  const field = /^((?:--)?[\w.-]+)/.exec(problem)?.[1] ?? ''
  const text = /(?:: |, )(leave it out|use )(.*)$/.exec(problem)
  if (text === null) return []
  const [, first, rest = ''] = text
  const ways = first === 'use ' ? rest.split(/, or /) : rest.split(/, or (?:use )?/).slice(1)
  return [...(first === 'use ' ? [] : [[[field, undefined] as const]]), ...ways.flatMap((one) => way(one, field))]
}

/** The ways out of each problem; those that name the same ones are left behind together, and count once. */
export function waysOut(problems: readonly string[]): Change[][][] {
  const lists = problems.map((problem) => JSON.stringify(waysOf(problem)))
  return [...new Set(lists)].map((list) => JSON.parse(list, (_, value) => value ?? undefined) as Change[][])
}

/** The command line with changes; fields become flags where there are some, else overrides. */
export function changed(words: Words, changes: readonly Change[]): string[] {
  let now = [...words]
  // Where --dp says how many ranks there are, --nproc-per-node says something else or nothing.
  if (changes.some(([name]) => name === '--dp') && words.includes('--dp') && !words.includes('--nproc-per-node'))
    changes = changes.filter(([name]) => name !== '--nproc-per-node')
  for (const [name, value] of changes) {
    const field = name.replace(/^model\./, '')
    const flag = name.startsWith('--') ? name : flagsOfFields[field as keyof typeof flagsOfFields]
    const at = now.indexOf(flag ?? '')
    if (at >= 0) now.splice(at, 2)
    const snake = (key: string) => key.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`)
    now = now.filter((word) => !word.startsWith(`${name}=`) && !word.startsWith(`${snake(name)}=`))
    if (value === undefined) continue
    now.push(...(flag === undefined ? [`${name}=${value}`] : [flag, value]))
  }
  return now
}

const camel = (name: string) => name.replace(/-([a-z])/g, (_, letter: string) => letter.toUpperCase())

/** What the resolver has against a command line, without the processes that the command would start. */
export async function problemsOf(folder: string, words: Words): Promise<readonly string[]> {
  const [command = '', subject = '', ...rest] = words
  const flags: Record<string, unknown> = {}
  const others: string[] = []
  for (let i = 0; i < rest.length; i++) {
    const [word = '', value = ''] = rest.slice(i, i + 2)
    if (!word.startsWith('--')) others.push(word)
    else {
      i++
      const sizes = value.split(',').map(Number)
      flags[camel(word.slice(2))] = sizes.includes(Number.NaN) ? value : sizes.length > 1 ? sizes : sizes[0]
    }
  }
  try {
    if (command === 'train') {
      const config = await trainConfig(subject, others, flags)
      const ranks = (flags['nprocPerNode'] ?? null) as number | null
      resolveTraining(config, flags as LayoutFlags, ranks)
    } else {
      const { transformerConfig } = await AutoBridge.open(join(folder, subject))
      checkLayout(
        chosenLayout(flags as LayoutFlags, null),
        transformerConfig,
        command !== 'import' && command !== 'verify',
      )
    }
    return []
  } catch (error) {
    const { details, message } = error as ViaductError
    return (details['problems'] as string[] | undefined) ?? [message]
  }
}

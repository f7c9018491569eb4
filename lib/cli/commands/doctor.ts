// `viaduct doctor`: what the machine has, what is in use, what is missing and how to get it.
import { existsSync, readFileSync } from 'node:fs'
import { availableParallelism, totalmem } from 'node:os'
import { addonCandidates } from '../../addon/load.js'
import { type EnvName, environment, envText } from '../../base/env.js'
import { ViaductError } from '../../base/errors.js'
import { packageRoot, packageVersion } from '../../base/packageRoot.js'
import { Device } from '../../tensor/device.js'
import { formatBytes, print, styled, table } from '../terminal.js'

type State = 'ok' | 'missing' | 'note'

interface Finding {
  readonly item: string
  readonly state: State
  readonly detail: string
}

function processor(): string {
  try {
    const text = readFileSync('/proc/cpuinfo', 'utf8')
    const model = /model name\s*:\s*(.*)/.exec(text)?.[1] ?? process.arch
    const flags = new Set((/flags\s*:\s*(.*)/.exec(text)?.[1] ?? '').split(' '))
    const vectors = ['avx2', 'fma', 'avx512f', 'avx512_bf16', 'amx_bf16'].filter((flag) => flags.has(flag))
    return `${model}, ${availableParallelism()} cores, ${vectors.join(' ')}`
  } catch {
    return `${process.arch}, ${availableParallelism()} cores`
  }
}

function hugePages(): Finding {
  const file = '/sys/kernel/mm/transparent_hugepage/enabled'
  const mode = existsSync(file) ? /\[(\w+)\]/.exec(readFileSync(file, 'utf8'))?.[1] : undefined
  if (mode === 'always' || mode === 'madvise') return { item: 'huge pages', state: 'ok', detail: mode }
  return {
    item: 'huge pages',
    state: 'note',
    detail: `${mode ?? 'not offered'}: first touches are slower; as root: echo madvise > ${file}`,
  }
}

function addon(): Finding[] {
  try {
    const device = Device.open('cpu')
    const findings: Finding[] = [
      { item: 'addon', state: 'ok', detail: addonCandidates().find((file) => existsSync(file)) ?? '' },
      { item: 'cpu backend', state: 'ok', detail: device.info.description },
    ]
    return findings
  } catch (error) {
    if (!(error instanceof ViaductError)) throw error
    return [{ item: 'addon', state: 'missing', detail: error.message }]
  }
}

function cuda(): Finding {
  const driver = existsSync('/dev/nvidiactl') || existsSync('/proc/driver/nvidia/version')
  return {
    item: 'cuda',
    state: 'note',
    detail: `${driver ? 'a driver is there, but this' : 'no NVIDIA driver is here, and this'} version computes on CPUs only`,
  }
}

export function doctorCommand(flags: { json?: boolean }): void {
  const findings: Finding[] = [
    { item: 'viaduct', state: 'ok', detail: `${packageVersion()} in ${packageRoot()}` },
    { item: 'node', state: 'ok', detail: `${process.version} (${process.platform} ${process.arch})` },
    { item: 'processor', state: 'ok', detail: processor() },
    { item: 'memory', state: 'ok', detail: formatBytes(totalmem()) },
    hugePages(),
    ...addon(),
    cuda(),
  ]
  for (const name of Object.keys(environment) as EnvName[]) {
    const value = envText(name)
    if (value !== undefined) {
      const secret = /TOKEN/.test(name)
      findings.push({ item: name, state: 'note', detail: secret ? '(set)' : `${value}: ${environment[name].meaning}` })
    }
  }
  if (findings.some((finding) => finding.state === 'missing')) process.exitCode = 1
  if (flags.json) return print(JSON.stringify({ findings }))
  const mark: Record<State, string> = { ok: styled('green', 'ok'), note: 'note', missing: styled('red', 'missing') }
  print(
    table(
      ['item', 'state', 'detail'],
      findings.map((f) => [f.item, mark[f.state], f.detail]),
    ),
  )
}

// `viaduct doctor`: what the machine has, what is in use, what is missing and how to get it.
import { existsSync, readFileSync } from 'node:fs'
import { availableParallelism, totalmem } from 'node:os'
import { addonCandidates, native } from '../../addon/load.js'
import { type EnvName, environment, envText } from '../../base/env.js'
import { ViaductError } from '../../base/errors.js'
import { packageRoot, packageVersion } from '../../base/packageRoot.js'
import { cudaLibraryFolders, cudaState } from '../../tensor/cuda.js'
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

/** The driver, the plug-in and NVIDIA's libraries: what is there, and the command that brings what is not. */
function cuda(): Finding[] {
  const version = '/proc/driver/nvidia/version'
  const driver = existsSync(version)
    ? /Kernel Module\s+(?:for \S+\s+)?([\d.]+)/.exec(readFileSync(version, 'utf8'))?.[1]
    : null
  const findings: Finding[] = [
    driver
      ? { item: 'cuda driver', state: 'ok', detail: driver }
      : {
          item: 'cuda driver',
          state: 'note',
          detail: 'none: on a machine with an NVIDIA GPU install its driver, 580 or newer',
        },
  ]
  const state = cudaState()
  const detail = state.problem ?? `${state.plugin}, ${state.devices} GPU${state.devices === 1 ? '' : 's'}`
  findings.push({ item: 'cuda plug-in', state: state.problem === null ? 'ok' : 'note', detail })
  if (state.plugin === undefined || !existsSync(state.plugin)) return findings
  try {
    for (const { name, version, why } of native.pluginLibraries(state.plugin, cudaLibraryFolders())) {
      findings.push({ item: name, state: version ? 'ok' : 'note', detail: version || why })
    }
    if (state.problem === null) {
      findings.push({ item: 'cuda backend', state: 'ok', detail: Device.open('cuda').info.description })
    }
  } catch (error) {
    if (!(error instanceof ViaductError)) throw error
    if (error.message !== state.problem) findings.push({ item: 'cuda', state: 'note', detail: error.message })
  }
  return findings
}

export function doctorCommand(flags: { json?: boolean }): void {
  const findings: Finding[] = [
    { item: 'viaduct', state: 'ok', detail: `${packageVersion()} in ${packageRoot()}` },
    { item: 'node', state: 'ok', detail: `${process.version} (${process.platform} ${process.arch})` },
    { item: 'processor', state: 'ok', detail: processor() },
    { item: 'memory', state: 'ok', detail: formatBytes(totalmem()) },
    hugePages(),
    ...addon(),
    ...cuda(),
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

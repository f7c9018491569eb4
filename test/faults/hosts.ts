// Two hosts on one machine: network namespaces, joined by two cables (pairs of veth). Their only way to each other is the network;
// memory below /dev/shm is each one's own. Needs root and iproute2.
import { spawnSync } from 'node:child_process'

const names = ['a', 'b'].map((end) => `viaduct-${process.pid}-${end}`) as [string, string]
/** What each host calls its end of a cable. */
export const cables = ['eth0', 'eth1'] as const
const subnet = ['10.213.0', '10.213.1'] as const

function ip(...args: string[]): string {
  const { status, stdout, stderr, error } = spawnSync('ip', args, { encoding: 'utf8' })
  if (status !== 0) throw new Error(`ip ${args.join(' ')}: ${(stderr || String(error ?? status)).trim()}`)
  return stdout
}

/** The address of a host on a cable. */
export const addressOf = (host: 0 | 1, cable: 0 | 1) => `${subnet[cable]}.${host + 1}`

/** The program and arguments that run a command on a host. */
export function onHost(host: 0 | 1, command: readonly string[]): string[] {
  const own = 'mount -t tmpfs none /dev/shm && exec "$@"'
  return ['ip', 'netns', 'exec', names[host], 'sh', '-c', own, 'sh', ...command]
}

/** Bytes that a host has sent over a cable. */
export function sentBytes(host: 0 | 1, cable: 0 | 1): number {
  const file = `/sys/class/net/${cables[cable]}/statistics/tx_bytes`
  return Number(ip('netns', 'exec', names[host], 'cat', file))
}

/** Takes a cable out of a host, or puts it in again. */
export function plug(host: 0 | 1, cable: 0 | 1, state: 'up' | 'down'): void {
  ip('-n', names[host], 'link', 'set', cables[cable], state)
}

/** Makes the hosts. @returns why this machine does not let us, or null. */
export function makeHosts(): string | null {
  try {
    for (const name of names) ip('netns', 'add', name)
    for (const name of names) ip('-n', name, 'link', 'set', 'lo', 'up')
    for (const cable of [0, 1] as const) {
      const name = cables[cable]
      ip('-n', names[0], 'link', 'add', name, 'type', 'veth', 'peer', 'name', name, 'netns', names[1])
      for (const host of [0, 1] as const) {
        ip('-n', names[host], 'addr', 'add', `${addressOf(host, cable)}/24`, 'dev', name)
        ip('-n', names[host], 'link', 'set', name, 'up')
      }
    }
    const { status, stderr } = spawnSync('ip', onHost(0, ['true']).slice(1), { encoding: 'utf8' })
    if (status !== 0) throw new Error(stderr)
    return null
  } catch (error) {
    removeHosts()
    return (error as Error).message
  }
}

/** Takes the hosts away, and the cables with them. */
export function removeHosts(): void {
  for (const name of names) spawnSync('ip', ['netns', 'del', name])
}

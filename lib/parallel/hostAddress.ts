// The address at which the other ranks reach this host.
import { networkInterfaces } from 'node:os'
import { envText } from '../base/env.js'
import { ViaductError } from '../base/errors.js'
import type { WorldFacts } from './worldFacts.js'

/** Whether an address or name means the machine itself to any machine. */
export const isLoopback = (host: string) => host === 'localhost' || host === '::1' || /^127\./.test(host)

type Interfaces = ReturnType<typeof networkInterfaces>

function addressOf(interfaces: Interfaces, name: string): string | undefined {
  const list = interfaces[name]?.filter(({ address }) => !address.startsWith('fe80:')) ?? []
  return (list.find(({ family }) => family === 'IPv4') ?? list[0])?.address
}

/**
 * VIADUCT_COMM_ADDR, else the address of GLOO_SOCKET_IFNAME, else the one on the way to the store. On the master's host its own
 * name may lead to a loopback address, which no other host reaches: there it is the only other address, where there is one.
 * @param onTheWay - this side's address of the connection to the store.
 * @throws ERR_USAGE for interfaces that are not there, and when there are several addresses to choose from.
 */
export function hostAddress(
  facts: Pick<WorldFacts, 'size' | 'localSize' | 'masterAddr'>,
  onTheWay: string,
  interfaces: Interfaces = networkInterfaces(),
): string {
  const given = envText('VIADUCT_COMM_ADDR')
  if (given !== undefined) return given
  const names = envText('GLOO_SOCKET_IFNAME')
  const known = Object.keys(interfaces).join(', ')
  if (names !== undefined) {
    const found = names.split(',').map((name) => addressOf(interfaces, name.trim()))
    const address = found.find((one) => one !== undefined)
    if (address !== undefined) return address
    throw new ViaductError(
      'ERR_USAGE',
      'world',
      `expected GLOO_SOCKET_IFNAME to name an interface with an address, got ${names}: this host has ${known}`,
    )
  }
  const { size, localSize, masterAddr } = facts
  if (size === localSize || !isLoopback(onTheWay) || isLoopback(masterAddr)) return onTheWay
  const others = Object.keys(interfaces)
    .map((name) => addressOf(interfaces, name))
    .filter((address): address is string => address !== undefined && !isLoopback(address))
  if (others.length <= 1) return others[0] ?? onTheWay
  throw new ViaductError(
    'ERR_USAGE',
    'world',
    `expected MASTER_ADDR=${masterAddr} to lead to an address that other hosts reach, got ${onTheWay}, and ${others.join(', ')} ` +
      `to choose from: set GLOO_SOCKET_IFNAME to one of ${known}, or give an address for MASTER_ADDR`,
  )
}

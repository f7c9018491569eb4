// A 64-bit hash of a name: the part of a random key that says which parameter. FNV-1a over UTF-8; it never changes.

/** The hash as a signed 64-bit number. */
export function nameHash(name: string): bigint {
  let hash = 0xcbf29ce484222325n
  for (const byte of new TextEncoder().encode(name)) {
    hash = BigInt.asUintN(64, (hash ^ BigInt(byte)) * 0x100000001b3n)
  }
  return BigInt.asIntN(64, hash)
}

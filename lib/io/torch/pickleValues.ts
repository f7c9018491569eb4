// What a restricted pickle may build: plain values, plain containers, names, and descriptions of tensors. Nothing here can be
// called. Containers are lists of pairs and items, never objects with keys, so that no key of a file is special.
import type { DType } from '../../base/dtype.js'

/** Any value on the machine's stack. */
export type PickleValue =
  | null
  | boolean
  | number
  | bigint
  | string
  | Tuple
  | List
  | Dict
  | Name
  | Storage
  | StoredTensor

export class Tuple {
  constructor(readonly items: readonly PickleValue[]) {}
}

export class List {
  readonly items: PickleValue[] = []
}

/** A dict in the order of insertion. Keys are not compared: who reads them refuses what stands twice. */
export class Dict {
  readonly keys: PickleValue[] = []
  readonly values: PickleValue[] = []

  constructor(
    /** An OrderedDict, which may carry attributes. */
    readonly ordered: boolean,
  ) {}
}

/** A name of the allow-list, as `module name`. */
export class Name {
  constructor(readonly name: string) {}
}

/** Bytes that lie elsewhere in the file, under a key. */
export class Storage {
  constructor(
    readonly key: string,
    /** null: bytes without a type. */
    readonly dtype: DType | null,
    /** In elements; bytes where there is no type. */
    readonly count: number,
    readonly bytes: number,
  ) {}
}

/** A view of a storage. `offset` and `strides` count elements of `dtype`. */
export class StoredTensor {
  constructor(
    readonly storage: Storage,
    readonly dtype: DType,
    readonly offset: number,
    readonly shape: readonly number[],
    readonly strides: readonly number[],
  ) {}
}

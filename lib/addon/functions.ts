// The addon's functions, one typed row each. A row's parameter types are the kinds that `addon.table()` reports for the native
// row of the same name (a house test compares them); meanings, shapes and dtypes stand in native/backend.h and native/comm.h.
// Handles, ids and codes are numbers; 0 is "absent" where an Opt type says so.

/** Id of a stream. */
export type Stream = number
/** Index of an open device. */
export type Device = number
/** Handle of a tensor that is read. */
export type In = number
/** Handle of a tensor that is overwritten; its version goes up. */
export type Out = number
/** Handle of a tensor that is read and changed; its version goes up. */
export type InOut = number
/** As In, or 0. */
export type OptIn = number
/** As Out, or 0. */
export type OptOut = number
/** As InOut, or 0. */
export type OptInOut = number
/** Handle of a tensor that work off the streams reads; its memory stays alive until that work is done. */
export type Pinned = number
/** As Pinned, for work that writes. */
export type PinnedOut = number
/** A whole number; a bigint where 53 bits are too few. */
export type integer = number | bigint
/** Up to 6 whole numbers. A Float64Array is read much faster and only during the call. */
export type Dims = readonly number[] | Float64Array
/** Code of a dtype, see lib/base/dtype.ts. */
export type DType = number
/** Code of an activation: silu 0, gelu 1, geluTanh 2, relu 3, relu2 4, quickGelu 5, sigmoid 6. */
export type Activation = number
/** Code of a reduction: sum 0, max 1, min 2. */
export type ReduceOp = number
/** Host memory, copied before the call returns. */
export type bytes = ArrayBuffer | ArrayBufferView

/** Bytes and blocks of a device's memory. */
export interface MemoryStats {
  /** Handed out now. */
  readonly liveBytes: number
  /** Most ever handed out since the last `resetPeak`. */
  readonly peakBytes: number
  /** Taken from the system. */
  readonly reservedBytes: number
  readonly liveBlocks: number
  /** 0: no limit. */
  readonly limitBytes: number
}

/** What a device says about itself. */
export interface DeviceInfo {
  readonly name: string
  /** One line: instruction set, matmul library, threads. */
  readonly description: string
  readonly threads: number
}

/** What a device plug-in finds on this machine. */
export interface PluginDevices {
  /** Devices that this process may use. */
  readonly devices: number
  /** Why there are none, in the driver's words; else empty. */
  readonly why: string
}

/** One of the vendor's libraries that a plug-in opens. */
export interface LibraryFact {
  readonly name: string
  /** Empty when it cannot be used. */
  readonly version: string
  /** Why it cannot be used. */
  readonly why: string
}

/** Time that a stream spent in commands of one name. */
export interface OpTime {
  readonly op: string
  readonly count: number
  readonly seconds: number
}

/** When a command ran, in seconds on the machine's steady clock: one for all streams and processes of a host. */
export interface Span {
  readonly op: string
  readonly start: number
  readonly end: number
}

/** What the slot table holds for a handle; strides and offset in elements. */
export interface TensorInfo {
  readonly shape: readonly number[]
  readonly strides: readonly number[]
  readonly dtype: DType
  readonly offset: number
  readonly storageBytes: number
  readonly address: number
}

/** How two ranges of bytes differ. */
export interface RangeComparison {
  /** Bytes that differ. */
  readonly differing: number
  /** Offset of the first of them in the range, or -1. */
  readonly first: number
}

/** Bytes that this process has moved from and to files through the addon. */
export interface IoCounters {
  readonly bytesRead: number
  readonly bytesWritten: number
}

/** A listening store server. */
export interface StoreServerInfo {
  readonly id: number
  readonly port: number
}

/** What a member of a store knows of the others. */
export interface PresenceState {
  /** Since the server's last answer. */
  readonly unansweredMs: number
  /** `gone`: its connection is closed, and it did not take its leave. */
  readonly silent: readonly { readonly member: string; readonly ms: number; readonly gone: boolean }[]
}

/** A communicator: its place among the ranks, and what it did so far. */
export interface CommInfo {
  readonly name: string
  readonly rank: number
  readonly size: number
  /** Ranks of the world that form the group, in its order. */
  readonly worldRanks: readonly number[]
  readonly transport: string
  /** Hash over (sequence, op, bytes) of all operations, equal on all ranks; 16 hexadecimal digits. */
  readonly fingerprint: string
  readonly sequence: number
  /** Bytes that this rank put into operations so far: a gather counts its part, a reduction the whole tensor. */
  readonly payloadBytes: number
  /** The same by operation: `allReduce`, `allGather`, `reduceScatter` ... */
  readonly payload: Readonly<Record<string, number>>
}

/** One row of `table()`. */
export interface TableRow {
  readonly name: string
  readonly args: readonly string[]
}

/** Everything that crosses the boundary to native code. */
export interface Addon {
  // module
  table(): readonly TableRow[]
  setErrorFactory(factory: unknown): void

  // devices, memory and tensors (native/binding/memory.cc)
  openDevice(kind: string): number
  openPlugin(path: string, ordinal: integer, folders: string[], seed: integer): number
  pluginDevices(path: string): PluginDevices
  pluginLibraries(path: string, folders: string[]): readonly LibraryFact[]
  deviceInfo(device: Device): DeviceInfo
  memoryStats(device: Device): MemoryStats
  resetPeak(device: Device): void
  setMemoryLimit(device: Device, bytes: integer): void
  trimMemory(device: Device): number
  setNumThreads(device: Device, threads: integer): void
  setMatmulEngine(device: Device, engine: string): void
  setGroupedMatmulEngine(device: Device, engine: string): void
  setAttentionEngine(device: Device, engine: string): void
  allowNondeterministic(device: Device, allowed: boolean): void
  supports(device: Device, op: string, dtype: DType): string
  empty(stream: integer, shape: Dims, dtype: DType): number
  view(handle: integer, shape: Dims, strides: Dims, offset: integer): number
  free(handle: integer): void
  tensorInfo(handle: integer): TensorInfo
  version(handle: integer): number
  sharers(handle: integer): number
  liveSlots(): number
  upload(stream: Stream, y: Out, data: bytes): void
  download(stream: Stream, x: In): Promise<ArrayBuffer>
  /** y = x between the stream's device and the host (device `host`), contiguous and alike, in the stream's order. */
  copyBetween(stream: Stream, y: PinnedOut, x: Pinned): void

  // streams and events (native/binding/streams.cc)
  createStream(device: integer): number
  destroyStream(stream: integer): void
  syncStream(stream: Stream): Promise<void>
  checkStream(stream: Stream): void
  resetStream(stream: Stream): void
  setPlace(stream: Stream, place: string): void
  recordEvent(stream: Stream): number
  waitEvent(stream: Stream, event: integer): void
  eventDone(event: integer): boolean
  destroyEvent(event: integer): void
  debugFail(stream: Stream, message: string): void
  debugFailTasks(stream: Stream, tasks: integer, message: string): void
  debugDelay(stream: Stream, microseconds: integer): void
  startProfile(stream: Stream): void
  endProfile(stream: Stream): readonly OpTime[]
  startTrace(stream: Stream): void
  endTrace(stream: Stream): readonly Span[]
  threadMicroseconds(): number

  // files (native/binding/io.cc): a tensor in a file is (path, byte offset, dtype, shape), row-major
  readBlock(
    path: string,
    offset: integer,
    dtype: DType,
    shape: Dims,
    start: Dims,
    size: Dims,
    y: PinnedOut,
    yStart: Dims,
  ): Promise<void>
  writeBlock(
    path: string,
    offset: integer,
    dtype: DType,
    shape: Dims,
    start: Dims,
    size: Dims,
    x: Pinned,
    xStart: Dims,
  ): Promise<void>
  copyBlock(
    from: string,
    xOffset: integer,
    xDtype: DType,
    xShape: Dims,
    xStart: Dims,
    to: string,
    yOffset: integer,
    yDtype: DType,
    yShape: Dims,
    yStart: Dims,
    size: Dims,
  ): Promise<void>
  hashRange(path: string, offset: integer, count: integer): Promise<string>
  compareRanges(a: string, aOffset: integer, b: string, bOffset: integer, count: integer): Promise<RangeComparison>
  createFile(path: string, size: integer, head: bytes): Promise<void>
  exchangePaths(a: string, b: string): boolean
  gatherBox(paths: string[], plan: bytes, hash: boolean, stopId: integer): Promise<string>
  scatterBox(paths: string[], plan: bytes, hash: boolean, stopId: integer): Promise<string>
  readHashed(paths: string[], plan: bytes, y: PinnedOut, stopId: integer): Promise<string>
  stopMoves(stopId: integer): void
  ioCounters(): IoCounters
  hasSha256(): boolean
  sha256Range(path: string, offset: integer, count: integer): Promise<string>
  tryLock(descriptor: integer): boolean

  // ops (native/backend.h)
  fill(stream: Stream, y: Out, value: number): void
  copy(stream: Stream, y: Out, x: In): void
  add(stream: Stream, y: Out, a: In, b: In): void
  mul(stream: Stream, y: Out, a: In, b: In): void
  accumulate(stream: Stream, acc: InOut, x: In): void
  scale(stream: Stream, x: InOut, factor: In): void
  clamp(stream: Stream, y: Out, x: In, low: number, high: number): void
  clampBackward(stream: Stream, dx: Out, dy: In, x: In, low: number, high: number): void
  sum(stream: Stream, y: Out, x: In): void
  sumRows(stream: Stream, acc: InOut, x: In): void
  addBias(stream: Stream, y: Out, x: In, bias: In): void
  matmul(
    stream: Stream,
    y: InOut,
    a: In,
    b: In,
    bias: OptIn,
    transA: boolean,
    transB: boolean,
    accumulate: boolean,
  ): void
  matmulRows(stream: Stream, y: Out, a: In, b: In, bias: OptIn, transB: boolean, rows: integer): void
  matmulActivation(stream: Stream, y: Out, pre: OptOut, a: In, b: In, bias: OptIn, kind: Activation): void
  groupedMatmul(stream: Stream, y: Out, a: In, b: In[], counts: integer[], transB: boolean): void
  groupedMatmulWeights(stream: Stream, acc: InOut[], dy: In, x: In, counts: integer[]): void
  rmsNormForward(
    stream: Stream,
    y: Out,
    rstd: Out,
    sum: OptOut,
    x: In,
    residual: OptIn,
    w: In,
    eps: number,
    zeroCentered: boolean,
  ): void
  rmsNormBackwardInput(
    stream: Stream,
    dx: Out,
    dy: In,
    x: In,
    w: In,
    rstd: In,
    dResidual: OptIn,
    zeroCentered: boolean,
  ): void
  rmsNormBackwardWeight(stream: Stream, dw: InOut, dy: In, x: In, rstd: In): void
  layerNormForward(
    stream: Stream,
    y: Out,
    mean: Out,
    rstd: Out,
    x: In,
    w: In,
    bias: OptIn,
    eps: number,
    zeroCentered: boolean,
  ): void
  layerNormBackwardInput(stream: Stream, dx: Out, dy: In, x: In, w: In, mean: In, rstd: In, zeroCentered: boolean): void
  layerNormBackwardWeight(stream: Stream, dw: InOut, dBias: OptInOut, dy: In, x: In, mean: In, rstd: In): void
  rope(stream: Stream, x: InOut, cos: In, sin: In, positions: In, interleaved: boolean, inverse: boolean): void
  attentionForward(
    stream: Stream,
    out: Out,
    lse: Out,
    q: In,
    k: In,
    v: In,
    firstKey: OptIn,
    keyEnd: OptIn,
    scale: number,
    causal: boolean,
    queryOffset: integer,
    window: integer,
    softcap: number,
  ): void
  attentionBackward(
    stream: Stream,
    dq: Out,
    dk: Out,
    dv: Out,
    dOut: In,
    q: In,
    k: In,
    v: In,
    out: In,
    lse: In,
    firstKey: OptIn,
    keyEnd: OptIn,
    scale: number,
    causal: boolean,
    queryOffset: integer,
    window: integer,
    softcap: number,
  ): void
  mergeAttention(stream: Stream, out: InOut, lse: InOut, part: In, partLse: In): void
  attentionSink(stream: Stream, out: InOut, lse: InOut, sink: In): void
  attentionSinkBackward(stream: Stream, rows: Out, dOut: In, out: In, lse: In, sink: In): void
  gatedActivationForward(stream: Stream, y: Out, x: In, kind: Activation): void
  gatedActivationBackward(stream: Stream, dx: Out, dy: In, x: In, kind: Activation): void
  activationForward(stream: Stream, y: Out, x: In, kind: Activation): void
  activationBackward(stream: Stream, dx: Out, dy: In, x: In, kind: Activation): void
  routerForward(
    stream: Stream,
    weights: Out,
    experts: Out,
    scores: Out,
    logits: In,
    bias: OptIn,
    sigmoid: boolean,
    normalize: boolean,
    groups: integer,
    groupTopk: integer,
    scaling: number,
  ): void
  routerBackward(
    stream: Stream,
    dLogits: Out,
    dWeights: OptIn,
    dScores: OptIn,
    experts: In,
    scores: In,
    sigmoid: boolean,
    normalize: boolean,
    scaling: number,
  ): void
  balanceScores(
    stream: Stream,
    dScores: Out,
    losses: Out,
    scores: In,
    counts: In,
    first: integer,
    tokens: integer,
    factor: number,
    normalize: boolean,
  ): void
  jitter(stream: Stream, y: Out, x: In, rng: In, sampleIds: In, positions: In, site: integer, eps: number): void
  capExperts(stream: Stream, capped: Out, experts: In, weights: OptIn, numExperts: integer, capacity: integer): void
  expertCounts(stream: Stream, counts: Out, experts: In): void
  expertOrder(stream: Stream, source: Out, place: Out, experts: In, numExperts: integer): void
  expertSlots(stream: Stream, source: Out, place: Out, experts: In, numExperts: integer, capacity: integer): void
  spreadRows(stream: Stream, y: Out, x: In, source: In, weights: OptIn, K: integer): void
  combineRows(stream: Stream, y: Out, x: In, place: In, weights: OptIn, first: integer): void
  combineRowsBackwardWeights(stream: Stream, dWeights: Out, dy: In, x: In, place: In, first: integer): void
  embeddingForward(stream: Stream, y: Out, w: In, ids: In, vocabStart: integer): void
  embeddingBackward(stream: Stream, dw: InOut, dy: In, ids: In, vocabStart: integer): void
  crossEntropyStats(stream: Stream, stats: Out, logits: In, labels: In, vocabStart: integer, vocabSize: integer): void
  crossEntropyCombine(stream: Stream, lse: Out, loss: Out, stats: In, labels: In): void
  crossEntropyBackward(
    stream: Stream,
    dLogits: Out,
    logits: In,
    lse: In,
    labels: In,
    dLoss: In,
    vocabStart: integer,
    vocabSize: integer,
  ): void
  sumSquares(stream: Stream, acc: InOut, x: In): void
  clipFactor(stream: Stream, norm: Out, factor: Out, acc: In, maxNorm: number): void
  adamw(
    stream: Stream,
    param: InOut,
    m: InOut,
    v: InOut,
    model: OptOut,
    grad: In,
    slots: In,
    beta1: number,
    beta2: number,
    eps: number,
    weightDecay: number,
  ): void
  dropout(
    stream: Stream,
    y: Out,
    x: In,
    rng: In,
    sampleIds: In,
    positions: In,
    site: integer,
    channelStart: integer,
    p: number,
  ): void
  randomNormal(
    stream: Stream,
    y: Out,
    seed: integer,
    nameHash: integer,
    start: Dims,
    logicalStride: Dims,
    mean: number,
    std: number,
  ): void
  argmax(stream: Stream, index: Out, value: Out, logits: In, vocabStart: integer, vocabSize: integer): void

  // stores and communicators (native/binding/comm.cc)
  storeServer(host: string, port: integer, jobId: string): StoreServerInfo
  storeServerClose(server: integer): void
  storeClient(kind: string, host: string, port: integer, jobId: string, timeoutMs: integer): Promise<number>
  storeSet(store: integer, key: string, value: bytes): Promise<void>
  storeGet(store: integer, key: string, timeoutMs: integer): Promise<Uint8Array>
  storeAdd(store: integer, key: string, amount: integer): Promise<number>
  storeCheck(store: integer, key: string): Promise<boolean>
  storeAddress(store: integer): Promise<string>
  storeClose(store: integer): void
  startPresence(host: string, port: integer, jobId: string, member: string, periodMs: integer, leastMs: integer): number
  presence(presence: integer): PresenceState
  stopPresence(presence: integer, politely: boolean): Promise<void>
  startHeartbeat(file: string, periodMs: integer): void
  connectGloo(
    store: integer,
    name: string,
    rank: integer,
    size: integer,
    address: string,
    timeoutMs: integer,
    sharedMemory: boolean,
  ): Promise<number>
  connectDevice(comm: integer, device: Device): void
  splitComm(comm: integer, colour: integer, key: integer, name: string): Promise<number>
  gatherBytes(comm: integer, mine: bytes): Promise<Uint8Array[]>
  commInfo(comm: integer): CommInfo
  abortComm(comm: integer, reason: string): void
  setCommTimeout(comm: integer, timeoutMs: integer): void
  closeComm(comm: integer): void
  allReduce(comm: integer, stream: Stream, out: Out, x: In, op: ReduceOp): void
  allGather(comm: integer, stream: Stream, out: Out, x: In): void
  reduceScatter(comm: integer, stream: Stream, out: Out, x: In, op: ReduceOp): void
  broadcast(comm: integer, stream: Stream, buffer: InOut, root: integer): void
  allToAll(comm: integer, stream: Stream, out: Out, x: In, sendCounts: integer[], recvCounts: integer[]): void
  pointToPoint(
    comm: integer,
    stream: Stream,
    sends: In[],
    sendPeers: integer[],
    recvs: Out[],
    recvPeers: integer[],
  ): void
  barrier(comm: integer, stream: Stream): void
}

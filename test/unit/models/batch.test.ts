// Batches are checked on the host, with the place of what is wrong, before anything reaches a kernel.
import { afterAll, describe, expect, test } from 'vitest'
import { type TokenBatch, uploadBatch } from '../../../lib/models/batch.js'
import { Ctx } from '../../../lib/tensor/ctx.js'

const ctx = Ctx.create({ device: 'cpu' })
const config = { vocabSize: 10, maxPositionEmbeddings: 4 }
const base: TokenBatch = { batchSize: 2, seqLength: 3, tokens: Int32Array.of(1, 2, 3, 4, 5, 9) }
const upload = (changes: Partial<TokenBatch> = {}) => uploadBatch(ctx, { ...base, ...changes }, config)
const values = async (t: { toFloat32Array(): Promise<Float32Array> } | null) =>
  t ? Array.from(await t.toFloat32Array()) : null

afterAll(() => ctx.scope.close())

describe('uploadBatch', () => {
  test.each([
    [{ tokens: Int32Array.of(1, 2, 3, 4, 5, 10) }, 'ERR_TOKEN_ID', /got 10 at row 1, position 2/],
    [{ tokens: Int32Array.of(1, -1, 3, 4, 5, 6) }, 'ERR_TOKEN_ID', /got -1 at row 0, position 1/],
    [{ labels: Int32Array.of(1, 2, 3, 999, 5, 6) }, 'ERR_LABEL', /got 999 at row 1, position 0/],
    [{ labels: Int32Array.of(1, 2, 3, -1, 5, 6) }, 'ERR_LABEL', /got -1/],
    [{ labels: Int32Array.of(1) }, 'ERR_DATA', /labels with 6 values, got 1/],
    [{ tokens: Int32Array.of(1) }, 'ERR_DATA', /tokens with 6 values, got 1/],
    [{ positionIds: Int32Array.of(0, 1, 2, 0, -3, 2) }, 'ERR_DATA', /got -3 at row 1, position 1/],
    [{ attentionMask: Uint8Array.of(1, 1, 1, 1, 0, 1) }, 'ERR_DATA', /row 1 of attention_mask, got 0 at position 1/],
    [{ attentionMask: Uint8Array.of(1, 1, 1, 0, 0, 0) }, 'ERR_DATA', /real token in row 1/],
    [{ batchSize: 0, tokens: Int32Array.of() }, 'ERR_DATA', /at least one token/],
  ])('refuses %o', (changes, code, message) => {
    expect(() => upload(changes)).toThrowError(
      expect.objectContaining({ code, message: expect.stringMatching(message) }),
    )
  })

  test('counts labels that are not ignored', () => {
    expect(upload().numTokens).toBe(0)
    expect(upload({ labels: Int32Array.of(1, -100, 3, -100, -100, 0) }).numTokens).toBe(3)
  })

  test('left padding becomes first visible keys, right padding ends', async () => {
    const left = upload({ attentionMask: Uint8Array.of(1, 1, 1, 0, 1, 1) })
    expect(await values(left.firstKey)).toEqual([0, 0, 0, 1, 1, 1])
    expect(left.keyEnd).toBeNull()
    const right = upload({ attentionMask: Uint8Array.of(1, 1, 0, 1, 1, 1) })
    expect(right.firstKey).toBeNull()
    expect(await values(right.keyEnd)).toEqual([2, 3])
  })

  test('packed sequences begin where positions restart', async () => {
    const packed = upload({ positionIds: Int32Array.of(0, 1, 0, 5, 6, 7), packed: true })
    expect(await values(packed.firstKey)).toEqual([0, 0, 2, 0, 0, 0])
    expect(packed.maxPosition).toBe(8)
  })

  test('positions go on after a cache, and padding of the prompt stays hidden', async () => {
    const step = upload({ start: 7, firstKeys: Int32Array.of(0, 2) })
    expect(await values(step.positions)).toEqual([7, 8, 9, 7, 8, 9])
    expect(await values(step.firstKey)).toEqual([0, 0, 0, 2, 2, 2])
  })

  test('samples are named by row or by token', async () => {
    expect(await values(upload().sampleIds)).toEqual([0, 0, 0, 1, 1, 1])
    expect(await values(upload({ sampleIds: BigInt64Array.of(40n, 7n) }).sampleIds)).toEqual([40, 40, 40, 7, 7, 7])
  })
})

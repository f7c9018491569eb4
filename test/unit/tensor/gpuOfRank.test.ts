// Which GPU a local rank takes.
import { expect, test } from 'vitest'
import { gpuOfRank } from '../../../lib/tensor/cuda.js'

test('each local rank takes its own GPU, or the only one that it sees', () => {
  expect([0, 1, 2, 3].map((rank) => gpuOfRank(rank, 4, false))).toEqual([0, 1, 2, 3])
  expect([0, 5].map((rank) => gpuOfRank(rank, 1, false))).toEqual([0, 0])
})

test('more ranks than GPUs go round where GPUs may be shared, else the error says how', () => {
  expect([0, 1, 2, 3, 4].map((rank) => gpuOfRank(rank, 2, true))).toEqual([0, 1, 0, 1, 0])
  expect(() => gpuOfRank(2, 2, false)).toThrow(/got 2 for local rank 2: .*NCCL_MULTI_RANK_GPU_ENABLE=1/)
})

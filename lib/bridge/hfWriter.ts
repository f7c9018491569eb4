// Writes a Hugging Face folder: files of the right size are laid out first, then every rank puts its bytes at their places, then
// the folder gets its name in one step. A full disk or a failed rank leaves the former target as it was and nothing else.
import { mkdir } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import type { HfParcel } from '../checkpoint/hfParcel.js'
import { growTogether, onFirst, type Ranks, together } from '../checkpoint/ranks.js'
import { checkTarget, flush, writeFlushed } from '../io/atomic.js'
import { copyRegion, createFile, type FileTensor, settleAll } from '../io/blocks.js'
import { identityRegion } from '../tensor/region.js'
import type { ExportPlan, PlannedTensor } from './exportPlan.js'

export interface WriteOptions {
  readonly ranks: Ranks
  readonly overwrite?: boolean
  /** Writes config.json and the other files too; else weights and index only. Default true. */
  readonly files?: boolean
}

/**
 * Writes a folder by a plan.
 * @param fill - puts this rank's bytes of the tensors at their places; carried tensors are not among them.
 * @throws ERR_TARGET_EXISTS, ERR_NO_SPACE, ERR_IO, ERR_RANK_FAILED
 */
export async function writeHfFolder(
  target: string,
  plan: ExportPlan,
  parcel: HfParcel,
  options: WriteOptions,
  fill: (tensors: readonly (PlannedTensor & { readonly place: FileTensor })[]) => Promise<void>,
): Promise<void> {
  const { ranks } = options
  const admit = () => checkTarget(target, options.overwrite ?? false)
  await growTogether(ranks, target, admit, async (folder, commit) => {
    await onFirst(ranks, async () => {
      for (const { name, header } of plan.files) {
        await mkdir(dirname(join(folder, name)), { recursive: true })
        await createFile(join(folder, name), header.fileBytes, header.bytes)
      }
      if (options.files !== false) await parcel.writeFiles(folder)
      if (plan.index) await writeFlushed(join(folder, plan.index.name), plan.index.text)
    })
    const placed = plan.tensors.map((tensor) => ({
      ...tensor,
      place: { path: join(folder, tensor.file), offset: tensor.offset, dtype: tensor.dtype, shape: tensor.shape },
    }))
    await together(ranks, async () => {
      await fill(placed.filter(({ origin }) => !('carried' in origin)))
      if (ranks.rank !== 0) return
      await settleAll(
        placed.flatMap(({ origin, place, shape }) =>
          'carried' in origin ? [copyRegion(origin.carried, place, identityRegion(shape))] : [],
        ),
      )
    })
    await onFirst(ranks, async () => {
      for (const { name } of plan.files) await flush(join(folder, name))
      await commit()
    })
  })
}

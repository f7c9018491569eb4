// `viaduct train`: starts the world of the layout and runs the loop, or, with --dry-run, only tells what would run.
import { ViaductError } from '../../base/errors.js'
import { toPlain, toYaml } from '../../config/overrides.js'
import { isAddress } from '../../io/hub/remoteFolder.js'
import { describePrice, priceOf } from '../../plan/price.js'
import type { DeviceKind } from '../../tensor/device.js'
import { forwardStep } from '../../train/forwardStep.js'
import { pretrain } from '../../train/pretrain.js'
import { memoryTable } from '../memoryTable.js'
import { fetchModel } from '../modelSource.js'
import { isFirstRank, launchedRanks, onRanks } from '../ranks.js'
import { print, say } from '../terminal.js'
import { resolveTraining, type TrainFlags, trainConfig } from '../trainConfig.js'

interface Flags extends TrainFlags {
  nprocPerNode?: number
  maxRestarts?: number
  dryRun?: boolean
  revision?: string
  device: DeviceKind
  json?: boolean
}

export async function trainCommand(recipe: string | undefined, overrides: string[], flags: Flags): Promise<void> {
  if (flags.hf !== undefined && isAddress(flags.hf))
    throw new ViaductError(
      'ERR_USAGE',
      'train',
      'expected --hf to be a folder or hub id, got an address: import it first',
    )
  const fetched = flags.hf === undefined ? null : await fetchModel(flags.hf, flags)
  const config = await trainConfig(recipe, overrides, fetched === null ? flags : { ...flags, hf: fetched.folder })
  const given = launchedRanks() ?? flags.nprocPerNode ?? null
  const { resolved, ranks } = resolveTraining(config, flags, given)
  if (flags.dryRun) {
    const price = priceOf(resolved, null)
    if (flags.json) return print(JSON.stringify({ config: toPlain(config), price, ranks }))
    print(toYaml(config))
    for (const line of describePrice(resolved, price, config.train.trainIters)) say(line)
    say(memoryTable(resolved, price.memoryByStage))
    return
  }
  const work = async () => {
    const result = await pretrain(config, forwardStep, { device: flags.device, ...(flags.json ? { log: say } : {}) })
    if (!isFirstRank() || !flags.json) return
    const { step, losses, validation, checkpoint, reason } = result
    print(JSON.stringify({ step, losses, validation, checkpoint, reason }))
  }
  await onRanks(ranks, work, { check: async () => fetched?.pin ?? [], maxRestarts: flags.maxRestarts })
}

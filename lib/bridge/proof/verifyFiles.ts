// What a checkpoint keeps of its Hugging Face folder beside the tensors, against the folder: config, names and headers of weight files,
// index, every other file.
import { stat } from 'node:fs/promises'
import type { HfParcel } from '../../checkpoint/hfParcel.js'
import { sha256Range } from '../../io/blocks.js'
import { fileInside } from '../../io/paths.js'
import type { HfModel } from '../hfModel.js'
import type { VerifiedFile } from './certificate.js'
import { configDifferences, describeField } from './configDifference.js'

/** Every file beside the tensors with its digest on both sides, config.json first. @param kept - null: no checkpoint is given. */
export async function verifyFiles(model: HfModel, kept: HfParcel | null): Promise<VerifiedFile[]> {
  const names = new Set(['config.json', ...model.parcel.others, ...(kept?.others ?? [])])
  const ours = new Set(['config.json', ...model.parcel.others])
  const theirs = new Set(kept ? ['config.json', ...kept.others] : [])
  const files: VerifiedFile[] = []
  for (const name of names) {
    files.push({
      name,
      sha256Before: ours.has(name) ? await digest(model.folder, name) : null,
      sha256After: theirs.has(name) ? await digest(kept?.folder as string, name) : null,
    })
  }
  return files
}

async function digest(folder: string, name: string): Promise<string> {
  const path = await fileInside(folder, name)
  return sha256Range(path, 0, (await stat(path)).size)
}

/** What differs between the files of a folder and those that a checkpoint keeps, in words. */
export function fileProblems(model: HfModel, kept: HfParcel, files: readonly VerifiedFile[]): string[] {
  const problems: string[] = []
  const fields = configDifferences(model.parcel.config.value, kept.config.value)
  if (kept.config.text !== model.parcel.config.text) {
    const how = fields.length === 0 ? 'in spelling alone' : fields.map(describeField).join('; ')
    problems.push(`config.json differs from the one that the checkpoint keeps: ${how}`)
  }
  problems.push(...layoutProblems(model, kept))
  for (const { name, sha256Before, sha256After } of files) {
    if (name === 'config.json') continue
    if (sha256Before === null) problems.push(`${name} is kept in the checkpoint but not in the folder`)
    else if (sha256After === null) problems.push(`${name} is not among the files that the checkpoint keeps`)
    else if (sha256Before !== sha256After) problems.push(`${name} differs from the one that the checkpoint keeps`)
  }
  return problems
}

function layoutProblems({ parcel: { layout } }: HfModel, kept: HfParcel): string[] {
  if (kept.layout === null) return []
  const problems: string[] = []
  const ours = new Map(kept.layout.files.map((file) => [file.name, file.header.bytes]))
  for (const { name, header } of layout?.files ?? []) {
    const bytes = ours.get(name)
    ours.delete(name)
    if (bytes === undefined) problems.push(`${name} is not among the files that the checkpoint keeps`)
    else if (!Buffer.from(bytes).equals(Buffer.from(header.bytes)))
      problems.push(`${name}: its header differs from the one that the checkpoint keeps`)
  }
  for (const name of ours.keys()) problems.push(`${name} is kept in the checkpoint but not in the folder`)
  if ((kept.layout.index?.text ?? null) !== (layout?.index?.text ?? null))
    problems.push('the index differs from the one that the checkpoint keeps')
  return problems
}

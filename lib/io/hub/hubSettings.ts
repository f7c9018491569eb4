// Where the hub is, where its files are kept and who asks: the variables that Python's package reads too. Read at each call.
import { readFile } from 'node:fs/promises'
import { homedir } from 'node:os'
import { join } from 'node:path'
import { envFlag, envText } from '../../base/env.js'
import { ViaductError } from '../../base/errors.js'

export interface HubSettings {
  /** Without a slash at its end. */
  readonly endpoint: string
  /** The folder of `models--org--name` folders. */
  readonly cache: string
  readonly offline: boolean
}

function huggingFaceHome(): string {
  return envText('HF_HOME') ?? join(envText('XDG_CACHE_HOME') ?? join(homedir(), '.cache'), 'huggingface')
}

/** Endpoint, cache and mode. @throws ERR_USAGE for an HF_ENDPOINT that is no address. */
export function hubSettings(): HubSettings {
  const endpoint = (envText('HF_ENDPOINT') ?? 'https://huggingface.co').replace(/\/+$/, '')
  const url = URL.canParse(endpoint) ? new URL(endpoint) : null
  if (url === null || !/^https?:$/.test(url.protocol) || url.username !== '' || url.password !== '')
    throw new ViaductError(
      'ERR_USAGE',
      'hub',
      'expected HF_ENDPOINT to be an http or https address without user and password: correct or unset it',
    )
  return {
    endpoint,
    cache: envText('HF_HUB_CACHE') ?? join(huggingFaceHome(), 'hub'),
    offline: envFlag('HF_HUB_OFFLINE'),
  }
}

/** HF_TOKEN, else what `huggingface-cli login` wrote, else null. @throws ERR_USAGE for one that no header can carry. */
export async function hubToken(): Promise<string | null> {
  const file = envText('HF_TOKEN_PATH') ?? join(huggingFaceHome(), 'token')
  const text = envText('HF_TOKEN') ?? (await readFile(file, 'utf8').catch(() => ''))
  const token = text.trim()
  if (token === '') return null
  if (/^[\x21-\x7e]+$/.test(token)) return token
  throw new ViaductError(
    'ERR_USAGE',
    'hub',
    `expected a token of printable characters in ${envText('HF_TOKEN') === undefined ? file : 'HF_TOKEN'}, got others: log in again`,
  )
}

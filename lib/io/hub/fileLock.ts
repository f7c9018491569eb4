// A lock between processes, as Python's filelock takes it: flock(2) on a file that stays. It ends with the process that holds it.
import { open, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import { native } from '../../addon/load.js'
import { ViaductError } from '../../base/errors.js'
import { ioError, makeFolder } from '../atomic.js'

/** Runs `work` while this process alone holds the lock; waits for others. @throws ERR_ABORTED while it waits */
export async function withFileLock<T>(
  path: string,
  signal: AbortSignal | undefined,
  work: () => Promise<T>,
): Promise<T> {
  for (let wait = 20; ; wait = Math.min(500, wait * 2)) {
    if (signal?.aborted)
      throw new ViaductError('ERR_ABORTED', 'lock', 'the signal was aborted', {}, { cause: signal.reason })
    const file = await makeFolder(dirname(path))
      .then(() => open(path, 'a', 0o664))
      .catch((cause: unknown) => {
        throw ioError(cause, `cannot open ${path}`)
      })
    try {
      // Another process may have removed the file that we have opened: then our lock is on nothing.
      if (native.tryLock(file.fd)) {
        const now = await stat(path).catch(() => null)
        if (now?.ino === (await file.stat()).ino) return await work()
        wait = 1
      }
    } finally {
      await file.close()
    }
    await pause(wait)
  }
}

// The rank's sign of life for the launcher that supervises it: a native thread touches a file. Read by lib/launch/heartbeats.ts.
import { native } from '../addon/load.js'
import { envText } from '../base/env.js'

/** Time between two signs of life. */
export const heartbeatMs = 500

/** Begins to show that this process lives, where a launcher asked for it. Idempotent. */
export function startHeartbeat(): void {
  const file = envText('VIADUCT_HEARTBEAT_FILE')
  if (file === undefined) return
  try {
    native.startHeartbeat(file, heartbeatMs)
  } catch {
    // The launcher that asked is gone, or the addon does not load: what needs it says so.
  }
}

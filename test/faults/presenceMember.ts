// A process of presence.test.ts: keeps a store, or is a member of one while its JavaScript never comes to an end.
import { native } from '../../lib/addon/load.js'

const [role = '', port = '0'] = process.argv.slice(2)
if (role === 'server') {
  console.log(`port=${native.storeServer('127.0.0.1', 0, 'job').port} `)
  setInterval(() => {}, 1000)
} else {
  native.startPresence('127.0.0.1', Number(port), 'job', role, 250, 1000)
  process.stdout.write('ready\n', () => {
    for (;;);
  })
}

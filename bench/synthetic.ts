// `tsx bench/synthetic.ts FOLDER GIGABYTES`: makes the folder of syntheticModel.ts.
import { writeSyntheticModel } from './syntheticModel.js'

const [folder, gigabytes] = process.argv.slice(2)
if (folder === undefined || !(Number(gigabytes) > 0)) {
  console.error('usage: tsx bench/synthetic.ts FOLDER GIGABYTES')
  process.exitCode = 2
} else {
  console.log(`${writeSyntheticModel(folder, Number(gigabytes) * 1e9)} bytes in ${folder}`)
}

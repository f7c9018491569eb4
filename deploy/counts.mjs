// Reads vitest's JSON report for .ci/run: prints `PASSED FAILED`. Arguments: the report, vitest's exit status. A file that
// could not be loaded, or a run that ended badly without a failed test, counts as one failure.
import { readFileSync } from 'node:fs'

const [path, status] = process.argv.slice(2)

function counts() {
  let report
  try {
    report = JSON.parse(readFileSync(path, 'utf8'))
  } catch {
    return [0, 1]
  }
  const brokenFiles = report.testResults.filter(
    (file) => file.status === 'failed' && !file.assertionResults.some((t) => t.status === 'failed'),
  )
  const failed = report.numFailedTests + brokenFiles.length
  return [report.numPassedTests, failed === 0 && status !== '0' ? 1 : failed]
}

console.log(counts().join(' '))

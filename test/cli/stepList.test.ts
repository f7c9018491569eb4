// The quickstart's list of steps on screens that are narrow, wide and none.
import { expect, test } from 'vitest'
import { StepList } from '../../examples/stepList.js'

async function draw(screen: { isTTY?: boolean; columns?: number }): Promise<string> {
  let text = ''
  const list = new StepList(2, { ...screen, write: (part) => (text += part) })
  await list.step(
    'Pretrain it on a text of this length, so that a narrow terminal cannot hold it',
    async (progress) => {
      for (let i = 0; i <= 100; i++) progress(i / 100, 'loss 3.14159, 12345 tokens/s')
      return 'a result'
    },
  )
  return text
}

/** What is left on a terminal: a line that is longer than it is wide goes on in the next row. */
function rowsOf(text: string, columns: number): string[] {
  const rows = ['']
  let at = 0
  for (const [part] of text.matchAll(/\r|\n|\x1b\[2K|\x1b\[1A|[^\r\n\x1b]+/g)) {
    if (part === '\n') at++
    else if (part === '\x1b[1A') at--
    else if (part === '\x1b[2K') rows[at] = ''
    else if (part !== '\r')
      for (let rest = part; rest !== ''; rest = rest.slice(columns)) {
        if (rest !== part) at++
        rows[at] = `${rows[at] ?? ''}${rest.slice(0, columns)}`
      }
    rows[at] ??= ''
  }
  return rows
}

test.each([40, 60, 80, 200])('on a terminal of %i columns the bar leaves nothing behind', async (columns) => {
  const rows = rowsOf(await draw({ isTTY: true, columns }), columns)
  expect(rows[0]).toMatch(/^ {2}✓ 1\/2 Pretrain/)
  expect(rows.filter((row) => row.includes('…') || row.includes('%'))).toEqual([])
  expect(rows.join('')).toMatch(/length, so that a narrow terminal cannot hold it \(\d+\.\d s\)\s+a result/)
})

test('elsewhere it is a line at each tenth', async () => {
  const lines = (await draw({})).trimEnd().split('\n')
  expect(lines).toHaveLength(1 + 10 + 2)
  expect(lines[1]).toBe('    10% loss 3.14159, 12345 tokens/s')
})

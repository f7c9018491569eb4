// A timeline as a picture: one row a stage, time to the right, a box an action with its micro-batch's number. Plain SVG, no scripts, no
// fonts of its own; readable on white and, by its own background, on dark pages.
import type { ActionKind } from '../parallel/schedules.js'
import type { TimedAction, Timeline } from './timeline.js'

/** Colours by kind: of the first chunk, of the last. Chunks between lie between. */
const colours: Readonly<Record<ActionKind, readonly [string, string]>> = {
  forward: ['#9ec5f4', '#2f6fb8'],
  backward: ['#a8dcb0', '#2f8a4c'],
  backwardInput: ['#8fd5c3', '#1f7f72'],
  backwardWeight: ['#f3cf8e', '#c07f1f'],
}

const names: Readonly<Record<ActionKind, string>> = {
  forward: 'forward',
  backward: 'backward',
  backwardInput: 'gradient of input',
  backwardWeight: 'gradient of weights',
}

const size = { row: 34, gap: 6, left: 76, right: 24, top: 74, bottom: 40, widest: 2400, least: 640, box: 26 } as const

/**
 * Draws a timeline.
 * @param title - the first line, e.g. the schedule's sizes.
 * @param chunks - on each stage; more than one are told by shades.
 */
export function timelineSvg(timeline: Timeline, title: string, chunks: number): string {
  const boxes = timeline.stages.flatMap(({ actions }) => actions)
  const shortest = Math.min(...boxes.map(({ start, end }) => end - start).filter((length) => length > 0))
  const width = Math.min(size.widest, Math.max(size.least, (timeline.duration / shortest) * size.box))
  const scale = width / timeline.duration
  const rows = timeline.stages.length
  const bottom = size.top + rows * (size.row + size.gap)
  const total = { width: Math.ceil(size.left + width + size.right), height: bottom + size.bottom }
  const share = (100 * timeline.bubble).toFixed(1)
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${total.width}" height="${total.height}" viewBox="0 0 ${total.width} ${total.height}" font-family="system-ui, sans-serif" font-size="12">`,
    `<title>${escape(title)}</title>`,
    '<rect width="100%" height="100%" fill="#ffffff"/>',
    `<text x="16" y="26" font-size="16" font-weight="600" fill="#1c1c1c">${escape(title)}</text>`,
    `<text x="${total.width - size.right}" y="26" text-anchor="end" fill="#444">bubble ${share}% of the work</text>`,
    ...legend(boxes, chunks),
    ...timeline.stages.flatMap(({ actions }, stage) => {
      const y = size.top + stage * (size.row + size.gap)
      return [
        `<text x="16" y="${y + size.row / 2 + 4}" fill="#1c1c1c">stage ${stage}</text>`,
        `<rect x="${size.left}" y="${y}" width="${round(width)}" height="${size.row}" fill="#f1f1f1"/>`,
        ...actions.filter(({ start, end }) => end > start).map((action) => box(action, y, scale, chunks)),
      ]
    }),
    ...axis(timeline.duration, scale, bottom),
    '</svg>',
    '',
  ].join('\n')
}

const round = (x: number) => Number(x.toFixed(2))
const escape = (text: string) =>
  text.replace(/[&<>]/g, (c) => ({ '&': '&amp;', '<': '&lt;', '>': '&gt;' })[c] as string)

function box(
  { kind, microBatch, chunk, stage, start, end }: TimedAction,
  y: number,
  scale: number,
  chunks: number,
): string {
  const [x, width] = [size.left + start * scale, (end - start) * scale]
  const share = chunks === 1 ? 0 : chunk / (chunks - 1)
  const what = `${names[kind]}, micro-batch ${microBatch}${chunks > 1 ? `, chunk ${chunk}` : ''}, stage ${stage}, ${round(start)} to ${round(end)}`
  const font = Math.min(12, (width - 2) / (0.6 * String(microBatch).length))
  const label =
    font < 5
      ? ''
      : `<text x="${round(x + width / 2)}" y="${y + size.row / 2 + 4}" text-anchor="middle" font-size="${round(font)}" fill="${share > 0.5 ? '#ffffff' : '#10243a'}">${microBatch}</text>`
  return `<g><title>${what}</title><rect x="${round(x)}" y="${y}" width="${round(width)}" height="${size.row}" fill="${mix(colours[kind], share)}" stroke="#ffffff"/>${label}</g>`
}

/** A colour between two, by its share of the second. */
function mix([from, to]: readonly [string, string], share: number): string {
  const part = (colour: string, i: number) => Number.parseInt(colour.slice(1 + 2 * i, 3 + 2 * i), 16)
  return `#${[0, 1, 2]
    .map((i) =>
      Math.round(part(from, i) * (1 - share) + part(to, i) * share)
        .toString(16)
        .padStart(2, '0'),
    )
    .join('')}`
}

function legend(boxes: readonly TimedAction[], chunks: number): string[] {
  const kinds = (Object.keys(colours) as ActionKind[]).filter((kind) => boxes.some((b) => b.kind === kind))
  let x = 16
  const parts: string[] = []
  const entry = (fill: string, text: string) => {
    parts.push(
      `<rect x="${x}" y="42" width="14" height="14" fill="${fill}"/><text x="${x + 20}" y="53" fill="#444">${text}</text>`,
    )
    x += 44 + 6.6 * text.length
  }
  for (const kind of kinds) entry(mix(colours[kind], 0), names[kind])
  entry('#f1f1f1', 'idle')
  if (chunks > 1) entry('#ffffff', `darker: later of ${chunks} chunks`)
  return parts
}

/** Some ten round numbers. */
function axis(duration: number, scale: number, y: number): string[] {
  const raw = duration / 10
  const power = 10 ** Math.floor(Math.log10(raw))
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw) as number
  const marks = Array.from({ length: Math.floor(duration / step + 1e-9) + 1 }, (_, i) => i * step)
  return marks.map((time) => {
    const x = round(size.left + time * scale)
    return `<line x1="${x}" y1="${y}" x2="${x}" y2="${y + 5}" stroke="#888"/><text x="${x}" y="${y + 20}" text-anchor="middle" fill="#444">${round(time)}</text>`
  })
}

/** Charts: the loss over the steps on a logarithmic axis, and its contours for two unknowns. */

import { byId, svg } from './dom.js';
import * as format from './format.js';

/** @typedef {{name: string, values: number[], style?: string}} Series values after 0, 1, 2, ... updates */

const [HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [260, 58, 76, 12, 34];

/** Maximum number of decades that the axis shows below the largest loss. */
const MAX_DECADES = 16;
/** A loss below this fraction of the largest one is a rounding error. */
const ROUNDING = 1e-16;

/**
 * Draw loss curves. Returns the step at a horizontal position of the pointer.
 * @param {Series[]} series @param {{best: number|null, cursor: number|null, length?: number}} options
 */
export function drawLosses(series, { best, cursor, length = 0 }) {
  const chart = byId('loss-chart');
  const width = Math.max(280, chart.getBoundingClientRect().width);
  chart.setAttribute('viewBox', `0 0 ${width} ${HEIGHT}`);
  const steps = Math.max(length, 1, ...series.map(({ values }) => values.length - 1));
  const positive = series.flatMap(({ values }) => values).filter((value) => value > 0 && Number.isFinite(value));
  const largest = positive.reduce((a, b) => Math.max(a, b), best || 1e-3);
  // If the smallest possible loss is a rounding error, the axis does not extend to it.
  const least = positive.reduce((a, b) => Math.min(a, b), best && best > ROUNDING * largest ? best : largest);
  const top = Math.ceil(Math.log10(largest) + 1e-9);
  const bottom = Math.max(Math.min(Math.floor(Math.log10(least) - 0.15), top - 1), top - MAX_DECADES);
  const x = (/** @type {number} */ step) => LEFT + (step / steps) * (width - LEFT - RIGHT);
  const y = (/** @type {number} */ loss) => {
    const decades = loss > 0 ? Math.max(Math.log10(loss), bottom) : bottom;
    return TOP + ((top - decades) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
  };
  const parts = [];
  const every = Math.ceil((top - bottom) / 5);
  for (let decade = top; decade >= bottom; decade -= every) {
    const at = y(10 ** decade);
    parts.push(svg('line', { class: 'axis', x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
    parts.push(svg('text', { x: LEFT - 8, y: at + 4, 'text-anchor': 'end' }, format.number(10 ** decade)));
  }
  const ticks = [...new Set([0, 0.25, 0.5, 0.75, 1].map((part) => Math.round(part * steps)))];
  for (const step of ticks) parts.push(svg('text', { x: x(step), y: HEIGHT - BOTTOM + 18, 'text-anchor': 'middle' }, String(step)));
  parts.push(svg('text', { x: x(steps) + 20, y: HEIGHT - BOTTOM + 18 }, 'steps'));
  if (best !== null) {
    const at = y(best);
    // A loss of 0, or of rounding errors, lies below the axis: it is stated, not drawn.
    if (best > 10 ** bottom) parts.push(svg('line', { class: 'best', x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
    const words = best > 10 ** bottom ? format.number(best) : best > 0 ? '0 up to rounding' : '0';
    parts.push(svg('text', { class: 'best', x: LEFT + 6, y: at - 6 }, `smallest possible loss: ${words}`));
  }
  let lastLabel = -99;
  const labels = [];
  for (const { name, values, style = '' } of series) {
    // A curve ends at its last finite loss.
    const points = values.map((value, step) => (Number.isFinite(value) ? `${x(step).toFixed(1)},${y(value).toFixed(1)}` : ''));
    const last = values.findLastIndex(Number.isFinite);
    if (name && last >= 0) labels.push({ name, at: y(values[last]), step: last });
    if (last >= 0 && values.slice(last).some((value) => value === Infinity))
      parts.push(svg('text', { x: x(last) + 7, y: y(values[last]) + 14 }, 'then past the largest number'));
    parts.push(svg('polyline', { class: `series ${style}`, points: points.filter(Boolean).join(' ') }));
  }
  for (const { name, at, step } of labels.sort((a, b) => a.at - b.at)) {
    lastLabel = Math.max(at, lastLabel + 13);
    parts.push(svg('text', { x: x(step) + 7, y: lastLabel + 4 }, name));
  }
  const current = series[0]?.values[cursor ?? -1];
  if (cursor !== null && current !== undefined) {
    parts.push(svg('line', { class: 'cursor', x1: x(cursor), x2: x(cursor), y1: TOP, y2: HEIGHT - BOTTOM }));
    if (Number.isFinite(current)) parts.push(svg('circle', { class: 'dot', cx: x(cursor), cy: y(current), r: 4.5 }));
  }
  chart.replaceChildren(...parts);
  return (/** @type {number} */ clientX) => {
    const box = chart.getBoundingClientRect();
    const at = ((clientX - box.left) / box.width) * width;
    return Math.round(Math.min(Math.max((at - LEFT) / (width - LEFT - RIGHT), 0), 1) * steps);
  };
}

/**
 * Draw the contours of a quadratic loss of two weights, and the path of a descent over them.
 * @param {ReturnType<typeof import('./descent.js').ellipse>} bowl @param {Float64Array[]} path @param {number} position
 */
export function drawContours({ angle, along, across, center }, path, position) {
  const [side, margin] = [240, 40];
  const start = path[0];
  // The plot extends to at most four times the initial distance from the minimum; a diverging path leaves it.
  const limit = 4 * Math.max(Math.hypot(start[0] - center[0], start[1] - center[1]), 0.5);
  const reach = 1.15 * Math.min(limit, path.reduce((most, [u, v]) =>
    Math.max(most, Math.abs(u - center[0]), Math.abs(v - center[1])), 0.5));
  const scale = side / (2 * reach);
  const x = (/** @type {number} */ value) => margin + side / 2 + (value - center[0]) * scale;
  const y = (/** @type {number} */ value) => 10 + side / 2 - (value - center[1]) * scale;
  const clip = svg('clipPath', { id: 'contour-clip' }, svg('rect', { x: margin, y: 10, width: side, height: side }));
  const inside = svg('g', { 'clip-path': 'url(#contour-clip)' });
  const turn = `translate(${x(center[0])} ${y(center[1])}) rotate(${(-angle * 180) / Math.PI})`;
  const largest = Math.max(along, 1e-12) * 2 * reach * reach;
  for (let level = largest * 4; level > largest / 3000; level /= 2.5)
    inside.append(svg('ellipse', {
      class: 'contour', transform: turn, rx: Math.sqrt(level / Math.max(along, 1e-12)) * scale,
      ry: across > 0 ? Math.min(Math.sqrt(level / across) * scale, 1e5) : 1e5,
    }));
  const isNear = (/** @type {Float64Array} */ [u, v]) => Math.hypot(u - center[0], v - center[1]) < 50 * reach;
  const shown = path.slice(0, position + 1).filter(isNear);
  inside.append(svg('polyline', { class: 'series', points: shown.map(([u, v]) => `${x(u).toFixed(1)},${y(v).toFixed(1)}`).join(' ') }));
  for (const [u, v] of shown.slice(0, 60)) inside.append(svg('circle', { class: 'dot', cx: x(u), cy: y(v), r: 2.5 }));
  const [u, v] = shown[shown.length - 1];
  inside.append(svg('circle', { class: 'dot', cx: x(u), cy: y(v), r: 5.5 }));
  const tick = (/** @type {number} */ value) => format.number(Number(value.toFixed(10)), 2);
  const cross = `M${x(center[0]) - 6},${y(center[1])}h12m-6,-6v12`;
  byId('contour-chart').replaceChildren(
    clip, svg('rect', { class: 'axis', x: margin, y: 10, width: side, height: side, fill: 'none' }), inside,
    svg('path', { class: 'best', d: cross, 'stroke-width': 2, 'stroke-dasharray': 'none' }),
    ...[-0.87 * reach, 0, 0.87 * reach].flatMap((offset) => [
      svg('text', { x: x(center[0] + offset), y: side + 26, 'text-anchor': 'middle' }, tick(center[0] + offset)),
      svg('text', { x: margin - 6, y: y(center[1] + offset) + 4, 'text-anchor': 'end' }, tick(center[1] + offset)),
    ]),
  );
}

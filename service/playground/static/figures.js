/** The grids of Convolve and Learn: drawn, explained, edited, and computed by the service. */

/** @import {State, Matrix, Problem, GridName, Cell} from './types.js' */
import { byId, debounce, input, onTheme, save, theme } from './dom.js';
import { color, css, ink, scaleOf } from './colors.js';
import { explain } from './explain.js';
import * as format from './format.js';
import { correlate, firstDifference, layout, padded, shape, withValue } from './geometry.js';
import { Grid, textSize } from './grid.js';
import * as learn from './learn.js';
import { outputRequest, send } from './requests.js';
import * as service from './service.js';
import { changed, state, update } from './store.js';

/** Sizes in px at the usual size of text: of cells, of all rows, and of the sign between two grids. */
const [MAX_CELL, MIN_KERNEL_CELL, MAX_GRID_HEIGHT, SIGN_WIDTH] = [46, 30, 440, 58];

const EMPTY = 'No output: the kernel does not fit into the input. Use mode same or full.';

let painting = false;
/** The problem and the matrices that the grids show. @type {{problem: Problem, output: Matrix, target: Matrix | null}} */
let shown = { problem: state, output: [], target: null };
/** @type {AbortController | null} */
let pending = null;

/** Fields that the output depends on. @type {(keyof State)[]} */
const PROBLEM = ['input', 'kernel', 'kernelName', 'mode', 'boundary', 'fill', 'stride', 'dilation', 'operation'];
/** Fields that the target and the fit depend on besides these. @type {(keyof State)[]} */
const FIT = ['target', 'targetKind', 'noise', 'seed', 'start', 'solver', 'rate', 'steps'];

const activate = (/** @type {GridName} */ grid) => (/** @type {number} */ row, /** @type {number} */ column) => {
  if (String(state.active) !== String([grid, row, column])) update({ active: [grid, row, column] });
};

/** @type {Record<GridName, Grid>} */
let grids;

/** Build the grids and their controls. */
export function setUp() {
  grids = {
    input: new Grid('input', 'Input', {
      activate: activate('input'),
      edit: (row, column, value) => update({ input: withValue(state.input, row, column, value), image: '' }),
      brush: () => (painting ? Number(input('paint-value').value) || 0 : null),
    }),
    kernel: new Grid('kernel', 'Kernel', {
      activate: activate('kernel'),
      edit: (row, column, value) => update({ kernel: withValue(state.kernel, row, column, value), kernelName: '' }),
    }),
    output: new Grid('output', 'Output', { activate: activate('output') }),
    target: new Grid('target', 'Target', {
      activate: activate('target'),
      edit: (row, column, value) => shown.target && update({ target: withValue(shown.target, row, column, value), targetKind: 'own' }),
      brush: () => (painting ? Number(input('paint-value').value) || 0 : null),
    }),
  };
  const paint = byId('paint');
  paint.addEventListener('click', () => {
    painting = !painting;
    paint.setAttribute('aria-pressed', String(painting));
    for (const grid of [grids.input, grids.target]) grid.root.classList.toggle('painting', painting);
  });
  byId('save-png').addEventListener('click', async () => save(await png(), 'corr2d.png'));
  new ResizeObserver(debounce(drawNow, 60)).observe(byId('figures'));
  onTheme(drawNow);
}

/** Draw after a change of state. @param {State} now @param {State} before */
export function draw(now, before) {
  if (now.view === 'picture') return;
  if (changed(now, before, 'view', ...PROBLEM, ...FIT)) drawNow();
  else if (changed(now, before, 'active')) lightUp();
  if (now.view === 'convolve' && changed(now, before, 'view', ...PROBLEM)) request();
}

/** Draw the current state, also between the steps of a fit. */
export function drawNow() {
  if (state.view === 'picture') return;
  const learning = state.view === 'learn';
  const problem = learning ? { ...state, operation: /** @type {const} */ ('correlate'), kernel: learn.currentKernel() } : state;
  shown = { problem, output: correlate(problem), target: learning ? learn.target() : null };
  const image = padded(problem);
  const { height, width, top, left } = layout(problem);
  const sizes = cellSizes([shape(image), shape(problem.kernel), shape(shown.output), ...(shown.target ? [shape(shown.target)] : [])]);
  grids.input.draw(image, sizes.data, { padding: [top, left], inner: [height, width], scale: scaleOf(problem.input) });
  grids.kernel.draw(problem.kernel, sizes.kernel, learning ? { scale: learn.kernelScale(), readOnly: true } : {});
  const scale = scaleOf(shown.target ?? shown.output);
  grids.output.draw(shown.output, sizes.data, { scale, empty: EMPTY });
  if (shown.target) grids.target.draw(shown.target, sizes.data, { scale });
  const kernelTitle = problem.operation === 'convolve' ? 'Kernel, flipped when used' : 'Kernel';
  byId('kernel-title').textContent = learning ? 'Learned kernel' : kernelTitle;
  byId('output-title').textContent = learning ? 'Prediction' : 'Output';
  byId('sign').textContent = problem.operation === 'convolve' ? '∗' : '⋆';
  const border = height * width < image.length * (image[0]?.length ?? 0);
  byId('input-size').textContent = border ? `with its padding ${shape(image).join(' × ')}` : '';
  byId('output-size').textContent = shape(shown.output).join(' × ');
  byId('target-size').textContent = shown.target ? shape(shown.target).join(' × ') : '';
  lightUp();
}

/** Cells as large as fit in one row, or one grid a row on a narrow screen. @param {[number, number][]} shapes */
function cellSizes(shapes) {
  const [data, kernel] = [shapes.filter((_, index) => index !== 1), shapes[1]];
  const available = byId('figures').clientWidth || 800;
  const narrow = available < 780;
  const rows = Math.max(...shapes.map(([count]) => count));
  const zoom = Number.parseFloat(getComputedStyle(document.documentElement).fontSize) / 16;
  let size = zoom * Math.min(MAX_CELL, Math.max(MAX_GRID_HEIGHT / rows, 5));
  const readable = Math.min(MIN_KERNEL_CELL, 300 / Math.max(...kernel));
  const kernelSize = (/** @type {number} */ cell) => Math.min(zoom * MAX_CELL, Math.max(cell, readable));
  // The controls below input and kernel need a width of their own.
  const width = (/** @type {number} */ cell) => Math.max(kernelSize(cell) * kernel[1], zoom * 150) +
    (shapes.length - 1) * zoom * SIGN_WIDTH +
    data.reduce((sum, [, columns], index) => sum + Math.max(columns * cell, index ? 70 : zoom * 330), 0);
  if (narrow) size = Math.min(size, available / Math.max(...data.map(([, columns]) => columns)));
  else while (size > 3 && width(size) > available) size -= 0.5;
  size = size >= 8 ? Math.floor(size) : Math.max(size, 2);
  const tallest = Math.max(size * Math.max(...data.map(([count]) => count)), kernelSize(size) * kernel[0]);
  byId('figures').style.setProperty('--tall', narrow ? '0px' : `${tallest}px`);
  return { data: size, kernel: Math.min(kernelSize(size), available / kernel[1]) };
}

/** Mark the cells of the explained sum, and write the sum below the grids. */
function lightUp() {
  const { problem, output, target } = shown;
  let active = state.active;
  let found = explain(problem, output, target, active);
  if (!found) found = explain(problem, output, target, (active = ['output', 0, 0]));
  for (const grid of /** @type {GridName[]} */ (['input', 'kernel', 'output', 'target']))
    grids[grid].light(found?.lit[grid] ?? [], active[0] === grid ? /** @type {Cell} */ (active.slice(1)) : null);
  const line = byId('sum');
  line.replaceChildren();
  if (!found) return;
  const title = document.createElement('b');
  title.textContent = found.title;
  const result = document.createElement('output');
  result.textContent = found.result;
  line.append(title, found.text, ...(found.result ? [' = ', result] : []), found.note ? `. ${found.note}` : '');
}

const request = debounce(compute, 120);

/** Send the problem to the service, and compare its output with the one of the page. */
async function compute() {
  if (state.view !== 'convolve') return;
  const now = state;
  const sent = outputRequest(now);
  service.remember(sent);
  pending?.abort();
  if (!shown.output.length || !shown.output[0].length) {
    service.showError('');
    service.describe(['Not sent: the kernel does not fit into the input']);
    return;
  }
  pending = new AbortController();
  const started = performance.now();
  try {
    const response = await send(sent, pending.signal);
    const body = await response.json();
    if (changed(now, state, 'view', ...PROBLEM)) return;
    const page = correlate(now);
    const bound = body.explanation?.error_bound ?? 0;
    const cell = firstDifference(now, body.output, page, bound);
    const [theirs, ours] = [body.output, page].map((output) => (cell ? format.number(output[cell[0]]?.[cell[1]] ?? NaN, 8) : ''));
    service.showError(cell ? service.difference(`at output (${cell.join(', ')}): ${theirs} and ${ours}`) : '');
    service.describe([...service.engine(body), service.timing(response, started),
      ...(body.nonfinite ? [`${format.plural(body.nonfinite, 'output is', 'outputs are')} past the range of float32`] : []),
      ...(cell ? [] : [service.agreement()])]);
  } catch (error) {
    service.fail(error, compute);
  }
}

/** The grids as a PNG, at twice the size of the screen. */
async function png() {
  const [cell, gap, head] = [44, 56, 40];
  const mode = theme();
  const { problem, output, target } = shown;
  /** @type {[string, Matrix, Matrix][]} */
  const figures = [
    ['Input', padded(problem), problem.input], [byId('kernel-title').textContent ?? '', problem.kernel, problem.kernel],
    [byId('output-title').textContent ?? '', output, target ?? output],
  ];
  if (target) figures.push(['Target', target, target]);
  const largest = Math.max(...figures.map(([, values]) => Math.max(...shape(values))));
  const size = Math.max(6, Math.min(cell, 900 / largest));
  const height = Math.max(...figures.map(([, values]) => values.length)) * size + head + 20;
  const width = figures.reduce((sum, [, values]) => sum + Math.max(values[0]?.length * size || 0, 60) + gap, 40 - gap);
  const canvas = new OffscreenCanvas(2 * width, 2 * height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext('2d'));
  const style = getComputedStyle(document.documentElement);
  const [paper, text] = [style.getPropertyValue('--paper'), style.getPropertyValue('--ink')];
  context.scale(2, 2);
  context.fillStyle = paper;
  context.fillRect(0, 0, width, height);
  context.textAlign = 'center';
  context.textBaseline = 'middle';
  let left = 20;
  figures.forEach(([name, values, scaled], index) => {
    const scale = scaleOf(scaled);
    const span = Math.max(values[0]?.length * size || 0, 60);
    const top = head + (height - head - 20 - values.length * size) / 2;
    context.fillStyle = text;
    context.font = `600 15px ${style.fontFamily}`;
    context.fillText(name, left + span / 2, 20);
    const signs = ['', problem.operation === 'convolve' ? '∗' : '⋆', '=', '≈'];
    context.fillText(signs[index], left - gap / 2, head + (height - head - 20) / 2);
    context.font = `${textSize(values, size)}px ${style.fontFamily}`;
    values.forEach((row, r) => row.forEach((value, c) => {
      const background = color(value, scale, mode);
      const [x, y] = [left + (span - row.length * size) / 2 + c * size, top + r * size];
      context.fillStyle = css(background);
      context.fillRect(x, y, size, size);
      if (size < 20) return;
      context.strokeStyle = 'rgb(128 128 128 / .35)';
      context.strokeRect(x, y, size, size);
      context.fillStyle = ink(background);
      context.fillText(format.cell(value), x + size / 2, y + size / 2);
    }));
    if (!index) {
      const { top: above, left: before, height: inner, width: across } = layout(problem);
      [context.strokeStyle, context.lineWidth] = [text, 1.5];
      context.strokeRect(left + (span - values[0].length * size) / 2 + before * size, top + above * size, across * size, inner * size);
      context.lineWidth = 1;
    }
    left += span + gap;
  });
  return canvas.convertToBlob({ type: 'image/png' });
}

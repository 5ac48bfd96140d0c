/** Learn: a fit by the service, followed step by step, and compared with the page's own descent. */

/** @import {State, Matrix, Fit, Forecast, Solver} from './types.js' */
import { drawContours, drawLosses } from './chart.js';
import { scaleOf } from './colors.js';
import { byId, debounce, h, input, onTheme, select, toast } from './dom.js';
import { DIVERGED, descend, ellipse, evaluate, initialKernel, leastSquares, normal, random, toMatrix } from './descent.js';
import * as format from './format.js';
import { correlate, layout, resize, shape } from './geometry.js';
import { events, fitRequest, send } from './requests.js';
import * as service from './service.js';
import { changed, state, update } from './store.js';

/** Maximum difference of losses and kernels between service and page, relative to the initial ones. */
const TOLERANCE = 1e-6;
/** @type {Solver[]} */
const SOLVERS = ['sgd', 'momentum', 'nesterov', 'adam', 'exact'];
/** Fields that a fit depends on, besides the rate and the number of steps. @type {(keyof State)[]} */
const DATA = ['input', 'kernel', 'mode', 'boundary', 'fill', 'stride', 'dilation', 'target', 'targetKind', 'noise', 'start',
  'seed', 'solver'];
/** Maximum number of products in one step of the page's own descent. */
const MAX_PRODUCTS = 1e6;

/**
 * One fit. The page computes `kernels` and `losses`: those before the first update and after each one.
 * @typedef {object} Run
 * @property {Float64Array[]} kernels
 * @property {number[]} losses
 * @property {number} received updates that the service has reported
 * @property {Fit | null} result
 * @property {AbortController} abort
 */

/** @type {Run | null} */
let run = null;
let position = 0;
let timer = 0;
/** @type {number[]} */
let previous = [];
/** @type {{forecast: Forecast, auto: number | null} | null} */
let known = null;
/** @type {AbortController | null} */
let asking = null;
/** @type {Fit[] | null} */
let comparison = null;
let redraw = () => {};
let stepAt = (/** @type {number} */ _x) => 0;
/** @type {{of: State, value: Matrix} | null} */
let cached = null;

const problem = () => ({ ...state, operation: /** @type {const} */ ('correlate') });
/** @returns {boolean} whether there is an output to fit */
const isPossible = () => layout(problem()).outputRows > 0 && layout(problem()).outputColumns > 0;
const size = () => shape(state.kernel);
const start = () => initialKernel(...size(), state.solver === 'exact' ? 'zeros' : state.start, state.seed);

/** @returns {Matrix} target of the fit: the output of the hidden kernel with noise, or own values */
export function target() {
  if (cached?.of === state) return cached.value;
  const { outputRows, outputColumns } = layout(problem());
  let value;
  if (state.targetKind === 'own' && state.target) value = resize(state.target, outputRows, outputColumns);
  else {
    const uniform = random(state.seed + 1);
    value = correlate(problem());
    const disturb = (/** @type {number} */ entry) => Number((entry + state.noise * normal(uniform)).toPrecision(6));
    if (state.noise > 0) value = value.map((row) => row.map(disturb));
  }
  cached = { of: state, value };
  return value;
}

/** @returns {Matrix} kernel after the updates that are shown */
export const currentKernel = () => (run ? toMatrix(run.kernels[position], size()) : start());

/** @returns {import('./colors.js').Scale} the same in all steps, wide enough for the hidden kernel */
export function kernelScale() {
  const hidden = scaleOf(state.kernel);
  const now = scaleOf(currentKernel());
  const high = Math.max(hidden.high, Math.min(now.high, 1e3 * hidden.high));
  return { kind: 'diverging', low: -high, high };
}

/** @param {() => void} drawGrids */
export function setUp(drawGrids) {
  redraw = () => {
    drawGrids();
    draw();
  };
  select('target-kind').addEventListener('change', () => {
    const own = select('target-kind').value === 'own';
    update({ targetKind: own ? 'own' : 'kernel', target: own ? target() : null });
  });
  byId('play').addEventListener('click', () => (timer ? pause() : play()));
  byId('step').addEventListener('click', () => {
    pause();
    begin();
    goTo(position + 1);
  });
  byId('reset').addEventListener('click', () => reset());
  byId('new-start').addEventListener('click', () => update({ seed: state.seed + 1 }));
  byId('compare').addEventListener('click', compare);
  input('scrub').addEventListener('input', () => {
    if (comparison) return readOut(Number(input('scrub').value));
    pause();
    goTo(Number(input('scrub').value));
  });
  const chart = byId('loss-chart');
  chart.addEventListener('pointermove', (event) => readOut(stepAt(event.clientX)));
  chart.addEventListener('pointerleave', () => readOut(position));
  input('rate').addEventListener('change', () => {
    const rate = Number(input('rate').value);
    if (rate > 0) update({ rate });
    else {
      toast('The learning rate must be a number above 0.');
      draw();
    }
  });
  input('rate-slider').addEventListener('input', () =>
    update({ rate: Number(toRate(Number(input('rate-slider').value) / 1000).toPrecision(3)) }));
  if (matchMedia('(prefers-reduced-motion: reduce)').matches) select('speed').value = '1e9';
  onTheme(draw);
  new ResizeObserver(debounce(draw, 60)).observe(chart);
}

/** @param {State} now @param {State} before */
export function onChange(now, before) {
  const data = changed(now, before, ...DATA);
  if (data || changed(now, before, 'rate', 'steps')) {
    if (data) previous = [];
    reset(!data);
  }
  if (data || changed(now, before, 'steps')) known = null;
  if (now.view !== 'learn') return pause();
  if (known === null || changed(now, before, 'view')) ask();
  if (!changed(now, before, 'active') || changed(now, before, 'view')) draw();
  if (!run && isPossible()) service.remember(fitRequest(state, target(), start(), true));
}

/** @param {boolean} [keep] keep the curve, for comparison with the next one */
function reset(keep = true) {
  pause();
  if (keep && run) previous = run.losses.slice(0, position + 1);
  run?.abort.abort();
  run = null;
  comparison = null;
  position = 0;
  if (state.view === 'learn') redraw();
}

const ask = debounce(async () => {
  if (state.view !== 'learn' || !isPossible()) return;
  const now = state;
  asking?.abort();
  asking = new AbortController();
  try {
    const started = performance.now();
    const response = await send(fitRequest({ ...state, rate: 'auto' }, target(), start(), false), asking.signal);
    const forecast = /** @type {Fit} */ (await response.json());
    if (changed(now, state, 'view', 'steps', ...DATA)) return;
    known = { forecast, auto: forecast.learning_rate };
    service.showError('');
    if (!run) service.describe(['Service: rates and smallest possible loss', service.timing(response, started)]);
    draw();
  } catch (error) {
    service.fail(error, ask);
  }
}, 150);

/** Start a fit, if none is running. */
async function begin() {
  if (run || !isPossible()) return;
  comparison = null;
  const now = state;
  const aim = target();
  if (aim.length * aim[0].length * now.kernel.length * now.kernel[0].length > MAX_PRODUCTS)
    return service.showError('This fit is too large to be followed step by step: choose a smaller kernel or image.');
  const fit = leastSquares(problem(), aim);
  const first = Float64Array.from(start().flat());
  /** @type {Run} */
  const mine = {
    kernels: [first], losses: [evaluate(fit, first).loss], received: 0, result: null, abort: new AbortController(),
  };
  run = mine;
  const sent = fitRequest(now, aim, start(), true);
  service.remember(sent);
  const started = performance.now();
  /** @type {string[]} */
  const differences = [];
  const check = (/** @type {string} */ what, /** @type {number} */ theirs, /** @type {number} */ ours) => {
    if (!(Math.abs(theirs - ours) <= TOLERANCE * Math.max(mine.losses[0], ours)))
      differences.push(`${what}: ${format.number(theirs, 8)} and ${format.number(ours, 8)}`);
  };
  try {
    const response = await send(sent, mine.abort.signal);
    for await (const { event, data } of events(response)) {
      if (event === 'error') throw new Error(data.detail);
      if (event === 'forecast' && now.solver !== 'exact') {
        known = { forecast: data, auto: known?.auto ?? null };
        Object.assign(mine, descend(fit, first, now.solver, data.learning_rate, now.steps));
      } else if (event === 'step' && now.solver !== 'exact') {
        const ours = mine.losses[data.number - 1];
        if (ours !== undefined) check(`loss before step ${data.number}`, data.loss, ours);
        mine.received = Math.min(data.number - 1, mine.losses.length - 1);
      } else if (event === 'result') {
        mine.result = data;
        if (now.solver === 'exact') {
          mine.kernels.push(Float64Array.from(data.kernel.flat()));
          mine.losses.push(evaluate(fit, mine.kernels[1]).loss);
        }
        mine.received = mine.losses.length - 1;
        if (data.steps === mine.received) check('final loss', data.final_loss, mine.losses[mine.received]);
      }
    }
    service.showError(differences.length ? service.difference(`in the ${differences[0]}`) : '');
    if (mine.result) service.describe([
      `Service: solver ${mine.result.solver} in float64`, service.timing(response, started), mine.result.message,
      ...(differences.length ? [] : [service.agreement()]),
    ]);
    if (mine === run) redraw();
  } catch (error) {
    service.fail(error, begin);
    if (mine === run) {
      run = null;
      reset();
    }
  }
}

function play() {
  if (run && position >= run.losses.length - 1) reset();
  begin();
  if (!run) return;
  announce('off');
  const perSecond = Number(select('speed').value);
  let due = performance.now();
  const tick = () => {
    const now = performance.now();
    const steps = Math.floor(((now - due) / 1000) * perSecond);
    if (steps > 0) {
      due = now;
      if (run) goTo(Math.min(position + steps, run.received));
    }
    if (run?.result && position >= run.received) pause();
    else timer = requestAnimationFrame(tick);
  };
  timer = requestAnimationFrame(tick);
  draw();
}

function pause() {
  cancelAnimationFrame(timer);
  timer = 0;
  byId('play').textContent = 'Play';
  announce('polite');
}

/** Screen readers announce single steps, not every step of Play. @param {'polite'|'off'} live */
function announce(live) {
  for (const id of ['sum', 'readout', 'forecast']) byId(id).setAttribute('aria-live', live);
}

/** @param {number} update number of updates to show; waits for the service if they are not received yet */
function goTo(update) {
  if (!run) return;
  if (update > run.received && !run.result) {
    window.setTimeout(() => goTo(update), 30);
    return;
  }
  position = Math.min(update, run.received);
  redraw();
}

// The slider is logarithmic, about the largest stable rate if it is known.
function limits() {
  const stable = known?.forecast.largest_stable_learning_rate;
  return stable ? [stable / 100, stable * 3] : [1e-3, 10];
}
const toRate = (/** @type {number} */ part) => limits()[0] * (limits()[1] / limits()[0]) ** part;
const toPart = (/** @type {number} */ rate) => {
  const [low, high] = limits();
  return Math.min(Math.max(Math.log(rate / low) / Math.log(high / low), 0), 1);
};

/** Draw controls and charts. */
function draw() {
  if (state.view !== 'learn') return;
  const exact = state.solver === 'exact';
  const stable = known?.forecast.largest_stable_learning_rate ?? null;
  const rate = state.rate === 'auto' ? known?.auto ?? null : state.rate;
  const { noise, steps, solver, start: from, targetKind } = state;
  for (const [id, value] of Object.entries({ noise, steps, solver, start: from, 'target-kind': targetKind }))
    if (document.activeElement !== byId(id)) input(id).value = String(value);
  byId('rate-field').hidden = exact;
  byId('target-picture').hidden = state.targetKind !== 'own';
  input('noise').disabled = state.targetKind === 'own';
  for (const id of ['steps', 'start']) input(id).disabled = exact;
  if (document.activeElement !== byId('rate')) input('rate').value = rate === null ? '' : String(Number(rate.toPrecision(4)));
  if (rate !== null) {
    input('rate-slider').value = String(Math.round(1000 * toPart(rate)));
    input('rate-slider').setAttribute('aria-valuetext', format.number(rate, 3));
  }
  drawTrack(stable);
  drawForecast(rate, stable);
  byId('play').textContent = timer ? 'Pause' : 'Play';
  const best = known?.forecast.best_possible_loss ?? null;
  const series = comparison
    ? descents().map((fit, index) => ({ name: fit.solver, values: [...fit.loss_history, fit.final_loss], style: `s${index + 1}` }))
    : [{ name: '', values: run ? run.losses.slice(0, position + 1) : [] }, { name: '', values: previous, style: 'faint' }];
  const lengths = run ? run.losses.length - 1 : exact ? 1 : state.steps;
  stepAt = drawLosses(series, { best, cursor: comparison || !run ? null : position, length: comparison ? 0 : lengths });
  input('scrub').max = String(comparison ? state.steps : run?.received ?? 0);
  input('scrub').value = String(position);
  input('scrub').disabled = !run && !comparison;
  readOut(position);
  const two = state.kernel.length * state.kernel[0].length === 2;
  byId('contours').hidden = !two;
  const path = run?.kernels ?? [Float64Array.from(start().flat())];
  if (two) drawContours(ellipse(leastSquares(problem(), target())), path, position);
  drawComparison();
}

/** Marks below the slider: the largest stable rate, and the automatic one. @param {number | null} stable */
function drawTrack(stable) {
  const track = byId('track');
  const auto = known?.auto ?? null;
  const stamp = `${stable} ${auto} ${state.solver}`;
  if (track.dataset.stamp === stamp) return;
  track.dataset.stamp = stamp;
  const mark = (/** @type {string} */ id, /** @type {string} */ word, /** @type {number} */ rate, /** @type {() => void} */ click) => {
    const button = h('button', { id, type: 'button', 'data-value': rate, click }, `${word} ${format.number(rate, 3)}`);
    button.style.left = `${100 * toPart(rate)}%`;
    return button;
  };
  const over = h('span', { class: 'over' });
  if (stable) over.style.left = `${100 * toPart(stable)}%`;
  track.replaceChildren(
    ...(stable ? [over, mark('rate-stable', 'largest stable', stable, () => update({ rate: stable }))] : []),
    ...(auto ? [mark('rate-auto', state.solver === 'adam' ? 'usual' : 'auto', auto, () => update({ rate: 'auto' }))] : []),
  );
}

/**
 * Describe whether the descent converges or has diverged, and how many weights the data determine.
 * @param {number | null} rate @param {number | null} stable
 */
function drawForecast(rate, stable) {
  const times = rate && stable ? rate / stable : 0;
  const ratio = `this rate is ${format.number(times, 2)} times the largest stable rate`;
  const warn = (/** @type {string} */ text) => h('span', { class: 'warn' }, text);
  const parts = [];
  if (!isPossible()) parts.push('There is no output to fit: the kernel does not fit into the input. ');
  else if (run && run.losses[position] > DIVERGED * (run.losses[0] || 1)) {
    const loss = format.number(run.losses[position], 2);
    parts.push(warn(`Diverged: after ${format.plural(position, 'step')} the loss is ${loss}. ` +
      `Choose a rate below ${format.number(stable ?? 0, 3)}. `));
  } else if (state.solver === 'exact') parts.push('The best kernel is computed directly, without steps. ');
  else if (times > 1) parts.push(warn(`Diverges: ${ratio}. The loss will grow without bound. `));
  else if (times === 1) parts.push('At the largest stable rate itself, the loss need not fall. ');
  else if (times) parts.push(`Converges: ${times > 0.99 ? 'this rate is just below the largest stable rate' : ratio}. `);
  else if (known?.forecast.rank === 0) parts.push('Every rate is stable: the loss does not depend on the kernel. ');
  else if (known) parts.push('No rate is known to be stable for this solver. ');
  const { rank = null, unknowns = 0 } = known?.forecast ?? {};
  if (rank !== null && rank < unknowns)
    parts.push(h('strong', {}, `The data determine only ${rank} of ${unknowns} weights: other kernels fit as well.`));
  const text = byId('forecast');
  const stamp = parts.map((part) => (typeof part === 'string' ? part : part.textContent)).join('');
  if (text.dataset.stamp === stamp) return;
  text.dataset.stamp = stamp;
  text.replaceChildren(...parts);
}

/** Fits of the comparison that have steps: all but that of the solver "exact". */
const descents = () => comparison?.filter(({ solver }) => solver !== 'exact') ?? [];

/** @param {number} step */
function readOut(step) {
  const shown = Math.min(step, position);
  const loss = run?.losses[shown];
  const losses = descents().map((fit) => `${fit.solver} ${format.number(fit.loss_history[step] ?? fit.final_loss, 3)}`);
  byId('readout').textContent = comparison ? `After step ${step}: ${losses.join(', ')}`
    : loss === undefined ? 'Press Play or Step: the service learns the kernel from input and target.'
      : `${shown === 0 ? 'Before the first step' : `After step ${shown}`}: loss ${format.number(loss, 5)}`;
}

/** Fit with every solver, each with its automatic rate. */
async function compare() {
  if (!isPossible()) return;
  pause();
  reset();
  byId('comparison').hidden = false;
  byId('comparison').textContent = 'Computing';
  const now = state;
  try {
    const fits = await Promise.all(SOLVERS.map(async (solver) => {
      const request = fitRequest({ ...now, solver, rate: 'auto' }, target(), start(), false);
      return /** @type {Fit} */ (await (await send(request)).json());
    }));
    if (changed(now, state, 'view', 'steps', ...DATA)) return;
    comparison = fits;
    draw();
  } catch (error) {
    service.fail(error, compare);
    draw();
  }
}

function drawComparison() {
  const container = byId('comparison');
  container.hidden = !comparison;
  if (!comparison) return;
  const rows = comparison.map(({ solver, learning_rate: rate, steps, final_loss: loss }) => h('tr',
    { 'data-solver': solver, 'data-loss': loss }, h('th', { scope: 'row' }, solver),
    ...[rate === null ? 'none' : format.number(rate, 3), String(steps), format.number(loss, 3)].map((text) => h('td', {}, text))));
  const titles = ['Solver', 'Rate', 'Steps', 'Loss at the end'].map((word) => h('th', { scope: 'col' }, word));
  container.replaceChildren(h('table', {}, h('thead', {}, h('tr', {}, ...titles)), h('tbody', {}, ...rows)));
}

/** Use a picture as the target. @param {(size: [number, number]) => Matrix} sample grey values of the picture at a size */
export function setTarget(sample) {
  const { outputRows, outputColumns } = layout(problem());
  update({ targetKind: 'own', target: sample([outputRows, outputColumns]) });
}


/** Gradient descent on the squared differences, computed by the page to check the service. */

/** @import {Matrix, Problem, Solver} from './types.js' */
import { build, layout, padded } from './geometry.js';

/** A descent whose loss exceeds this multiple of its initial loss has diverged, and ends. */
export const DIVERGED = 1e6;

/** @param {number} seed @returns {() => number} uniform numbers in [0, 1) (mulberry32) */
export function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** @param {() => number} uniform @returns {number} a normal number of variance 1 (Box and Muller) */
export const normal = (uniform) => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());

/**
 * Initial kernel: zeros, or random as in torch.nn.Conv2d, rounded to 4 digits so that requests stay readable.
 * @param {number} rows @param {number} columns @param {'zeros'|'random'} start @param {number} seed @returns {Matrix}
 */
export function initialKernel(rows, columns, start, seed) {
  const uniform = random(seed);
  const bound = 1 / Math.sqrt(rows * columns);
  return build(rows, columns, () => (start === 'zeros' ? 0 : Number(((2 * uniform() - 1) * bound).toFixed(4))));
}

/**
 * Least squares problem of a fit: all windows of the input, one row for each target value.
 * @typedef {{windows: Float64Array[], target: Float64Array, size: [number, number]}} LeastSquares
 */

/** @param {Problem} problem @param {Matrix} target @returns {LeastSquares} */
export function leastSquares(problem, target) {
  const { outputRows, outputColumns, rows, columns } = layout(problem);
  const image = padded(problem);
  const windows = [];
  for (let i = 0; i < outputRows; i++)
    for (let j = 0; j < outputColumns; j++) {
      const window = new Float64Array(rows * columns);
      for (let a = 0; a < rows; a++)
        for (let b = 0; b < columns; b++)
          window[a * columns + b] = image[i * problem.stride + a * problem.dilation][j * problem.stride + b * problem.dilation];
      windows.push(window);
    }
  return { windows, target: Float64Array.from(target.flat()), size: [rows, columns] };
}

/**
 * Loss (sum of squared differences), residuals (output - target) and gradient at a kernel.
 * @param {LeastSquares} fit @param {Float64Array} kernel
 */
export function evaluate({ windows, target }, kernel) {
  const gradient = new Float64Array(kernel.length);
  const residuals = new Float64Array(target.length);
  let loss = 0;
  windows.forEach((window, row) => {
    let residual = -target[row];
    for (let k = 0; k < kernel.length; k++) residual += window[k] * kernel[k];
    residuals[row] = residual;
    loss += residual * residual;
    for (let k = 0; k < kernel.length; k++) gradient[k] += 2 * residual * window[k];
  });
  return { loss, residuals, gradient };
}

/**
 * Kernels and losses of a descent as torch.optim defines it: before the first update, and after each one.
 * The descent ends early when the loss exceeds DIVERGED times the initial loss.
 * @param {LeastSquares} fit @param {Float64Array} start @param {Solver} solver @param {number} rate @param {number} steps
 */
export function descend(fit, start, solver, rate, steps) {
  const kernels = [start];
  let { loss, gradient } = evaluate(fit, start);
  const losses = [loss];
  let velocity = new Float64Array(start.length);
  const squares = new Float64Array(start.length);
  for (let step = 1; step <= steps && !(losses[step - 1] > DIVERGED * (losses[0] || 1)); step++) {
    const kernel = Float64Array.from(kernels[step - 1]);
    for (let k = 0; k < kernel.length; k++) {
      const slope = gradient[k];
      if (solver === 'adam') {
        velocity[k] = 0.9 * velocity[k] + 0.1 * slope;
        squares[k] = 0.999 * squares[k] + 0.001 * slope * slope;
        const scale = Math.sqrt(squares[k] / (1 - 0.999 ** step)) + 1e-8;
        kernel[k] -= (rate * velocity[k]) / (1 - 0.9 ** step) / scale;
      } else if (solver === 'sgd') kernel[k] -= rate * slope;
      else {
        velocity[k] = 0.9 * velocity[k] + slope;
        kernel[k] -= rate * (solver === 'nesterov' ? slope + 0.9 * velocity[k] : velocity[k]);
      }
    }
    ({ loss, gradient } = evaluate(fit, kernel));
    kernels.push(kernel);
    losses.push(loss);
  }
  return { kernels, losses };
}

/**
 * Ellipses that are the contours of the loss of two unknowns: the curvatures of the loss along and across `angle`
 * (radians), and the centre, which is the best kernel (the one of least norm if several are equally good).
 * @param {LeastSquares} fit
 */
export function ellipse({ windows, target }) {
  let [a, b, c, u, v] = [0, 0, 0, 0, 0];
  windows.forEach(([x, y], row) => {
    [a, b, c] = [a + x * x, b + x * y, c + y * y];
    [u, v] = [u + x * target[row], v + y * target[row]];
  });
  const spread = Math.hypot((a - c) / 2, b);
  const along = (a + c) / 2 + spread;
  const across = (a + c) / 2 - spread < 1e-12 * along ? 0 : (a + c) / 2 - spread;
  const angle = Math.atan2(2 * b, a - c) / 2;
  const [cosine, sine] = [Math.cos(angle), Math.sin(angle)];
  const first = along && (cosine * u + sine * v) / along;
  const second = across && (cosine * v - sine * u) / across;
  return { angle, along, across, center: [cosine * first - sine * second, sine * first + cosine * second] };
}

/** @param {Float64Array} values @param {[number, number]} size @returns {Matrix} */
export const toMatrix = (values, [rows, columns]) => build(rows, columns, (r, c) => values[r * columns + c]);

/** Geometry of 2-D cross-correlation: padding, windows, and the sum that gives each output value. */

/** @import {Matrix, Problem, Cell, GridName, Boundary} from './types.js' */

/**
 * @param {number} rows
 * @param {number} columns
 * @param {(row: number, column: number) => number} value
 * @returns {Matrix}
 */
export function build(rows, columns, value) {
  return Array.from({ length: Math.max(0, rows) }, (_, row) =>
    Array.from({ length: Math.max(0, columns) }, (_, column) => value(row, column)));
}

/** @param {(number|null)[][]} matrix @returns {[number, number]} rows and columns */
export const shape = (matrix) => [matrix.length, matrix[0]?.length ?? 0];

/** @param {Matrix} matrix @returns {Matrix} rotated by 180 degrees */
export const flip = (matrix) => matrix.map((row) => [...row].reverse()).reverse();

/**
 * Resize a matrix: rows and columns are cut at the end, or added with zeros.
 * @param {Matrix} matrix @param {number} rows @param {number} columns
 */
export const resize = (matrix, rows, columns) => build(rows, columns, (r, c) => matrix[r]?.[c] ?? 0);

/** @param {Matrix} matrix @param {number} row @param {number} column @param {number} value */
export const withValue = (matrix, row, column, value) =>
  matrix.map((line, r) => (r === row ? line.map((old, c) => (c === column ? value : old)) : line));

/** @param {Matrix} matrix @returns {[number, number]} smallest and largest value */
export function range(matrix) {
  let low = Infinity;
  let high = -Infinity;
  for (const row of matrix) for (const value of row) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 0];
}

/**
 * Index of the input value at a position. Outside the input, it is the index of the value that the boundary repeats
 * there, or -1 for "zeros" and "constant".
 * Reflections are periodic, as in numpy.pad.
 * @param {number} position @param {number} size @param {Boundary} boundary
 */
export function sourceIndex(position, size, boundary) {
  if (position >= 0 && position < size) return position;
  if (boundary === 'zeros' || boundary === 'constant') return -1;
  if (boundary === 'replicate' || size === 1) return Math.min(Math.max(position, 0), size - 1);
  const doubledEnds = boundary === 'symmetric' ? 1 : 0;
  const period = boundary === 'circular' ? size : 2 * size - 2 + 2 * doubledEnds;
  const inside = ((position % period) + period) % period;
  return boundary === 'circular' ? inside : Math.min(inside, period - doubledEnds - inside);
}

/**
 * Padding before and after one axis.
 * @param {Problem} problem @param {number} taps side of the kernel along the axis
 * @returns {[number, number]}
 */
export function padding({ mode, dilation, operation }, taps) {
  const reach = dilation * (taps - 1);
  if (mode === 'valid') return [0, 0];
  if (mode === 'full') return [reach, reach];
  const less = Math.floor(reach / 2);
  return operation === 'correlate' ? [less, reach - less] : [reach - less, less];
}

/**
 * All sizes of a problem.
 * @param {Problem} problem
 */
export function layout(problem) {
  const [height, width] = shape(problem.input);
  const [rows, columns] = shape(problem.kernel);
  const [top, bottom] = padding(problem, rows);
  const [left, right] = padding(problem, columns);
  const { stride, dilation } = problem;
  const outputs = (/** @type {number} */ size, /** @type {number} */ taps) =>
    Math.max(0, Math.floor((size - dilation * (taps - 1) - 1) / stride) + 1);
  return {
    height, width, rows, columns, top, bottom, left, right,
    outputRows: outputs(height + top + bottom, rows),
    outputColumns: outputs(width + left + right, columns),
  };
}

/** The input with its padding: the values that the boundary gives. @param {Problem} problem @returns {Matrix} */
export function padded(problem) {
  const { height, width, top, bottom, left, right } = layout(problem);
  return build(height + top + bottom, width + left + right, (r, c) => {
    const row = sourceIndex(r - top, height, problem.boundary);
    const column = sourceIndex(c - left, width, problem.boundary);
    return row < 0 || column < 0 ? (problem.boundary === 'constant' ? problem.fill : 0) : problem.input[row][column];
  });
}

/** The kernel as it is multiplied: flipped for "convolve". @param {Problem} problem */
export const multiplied = (problem) => (problem.operation === 'convolve' ? flip(problem.kernel) : problem.kernel);

/** The output, computed in the page. @param {Problem} problem @returns {Matrix} */
export function correlate(problem) {
  const { outputRows, outputColumns, rows, columns } = layout(problem);
  const image = padded(problem);
  const kernel = multiplied(problem);
  const { stride, dilation } = problem;
  return build(outputRows, outputColumns, (i, j) => {
    let sum = 0;
    for (let a = 0; a < rows; a++)
      for (let b = 0; b < columns; b++) sum += kernel[a][b] * image[i * stride + a * dilation][j * stride + b * dilation];
    return sum;
  });
}

/**
 * One product: its kernel cell (as displayed), input cell (in coordinates of the unpadded input) and output cell.
 * @typedef {{kernel: Cell, input: Cell, output: Cell, weight: number, value: number}} Term
 */

/**
 * All products in which a cell takes part.
 * @param {Problem} problem @param {GridName} grid @param {number} row @param {number} column @returns {Term[]}
 */
export function terms(problem, grid, row, column) {
  const sizes = layout(problem);
  const image = padded(problem);
  const { stride, dilation } = problem;
  const flipped = problem.operation === 'convolve';
  /** @type {Term[]} */
  const found = [];
  const add = (/** @type {number} */ i, /** @type {number} */ j, /** @type {number} */ a, /** @type {number} */ b) => {
    const [r, c] = [i * stride + a * dilation, j * stride + b * dilation];
    const kernel = /** @type {Cell} */ (flipped ? [sizes.rows - 1 - a, sizes.columns - 1 - b] : [a, b]);
    found.push({
      kernel, input: [r - sizes.top, c - sizes.left], output: [i, j],
      weight: problem.kernel[kernel[0]][kernel[1]], value: image[r][c],
    });
  };
  const eachTap = (/** @type {(a: number, b: number) => void} */ visit) => {
    for (let a = 0; a < sizes.rows; a++) for (let b = 0; b < sizes.columns; b++) visit(a, b);
  };
  if (grid === 'output' || grid === 'target') {
    if (row < sizes.outputRows && column < sizes.outputColumns) eachTap((a, b) => add(row, column, a, b));
  } else if (grid === 'input') {
    eachTap((a, b) => {
      const i = (row + sizes.top - a * dilation) / stride;
      const j = (column + sizes.left - b * dilation) / stride;
      if (Number.isInteger(i) && Number.isInteger(j) && i >= 0 && j >= 0 && i < sizes.outputRows && j < sizes.outputColumns)
        add(i, j, a, b);
    });
    found.reverse();
  } else if (row < sizes.rows && column < sizes.columns) {
    const [a, b] = flipped ? [sizes.rows - 1 - row, sizes.columns - 1 - column] : [row, column];
    for (let i = 0; i < sizes.outputRows; i++) for (let j = 0; j < sizes.outputColumns; j++) add(i, j, a, b);
  }
  return found;
}

/**
 * Error of an output due to the rounding of the numbers that are sent, relative to the sum of the absolute values of
 * its products. It is added to the error bound that the service reports.
 */
const FLOAT32_INPUT_ERROR = 5e-7;
const MAX_FLOAT32 = 3.4028234e38;

/**
 * First cell in which two outputs differ by more than rounding, or null. The service sends null for values beyond the
 * range of float32; null agrees if the sum of the absolute values of the products is beyond that range.
 * @param {Problem} problem @param {(number|null)[][]} service @param {Matrix} page @param {number} bound error bound of the service
 * @returns {Cell | null}
 */
export function firstDifference(problem, service, page, bound) {
  const sizes = correlate({
    ...problem, fill: Math.abs(problem.fill),
    input: problem.input.map((row) => row.map(Math.abs)), kernel: problem.kernel.map((row) => row.map(Math.abs)),
  });
  if (String(shape(service)) !== String(shape(page))) return [0, 0];
  const agrees = (/** @type {number|null} */ value, /** @type {number} */ r, /** @type {number} */ c) => (value === null
    ? sizes[r][c] >= MAX_FLOAT32
    : Math.abs(value - page[r][c]) <= bound + FLOAT32_INPUT_ERROR * sizes[r][c]);
  for (let r = 0; r < page.length; r++)
    for (let c = 0; c < page[r].length; c++) if (!agrees(service[r][c], r, c)) return [r, c];
  return null;
}

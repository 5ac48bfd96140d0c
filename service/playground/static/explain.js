/** Explanation of one cell: the cells that take part, and the sum in words and numbers. */

/** @import {Problem, GridName, Matrix, Cell} from './types.js' */
import * as format from './format.js';
import { layout, shape, sourceIndex, terms } from './geometry.js';

/**
 * @typedef {object} Explanation
 * @property {string} title
 * @property {string} text the sum, up to its equals sign
 * @property {string} result
 * @property {string} note
 * @property {Record<GridName, Cell[]>} lit
 */

/**
 * Explain a cell. With a target, a cell of the kernel is explained by the gradient of the loss.
 * @param {Problem} problem @param {Matrix} output @param {Matrix|null} target @param {[GridName, number, number]} active
 * @returns {Explanation | null} null if the cell does not exist
 */
export function explain(problem, output, target, [grid, row, column]) {
  const at = `(${row}, ${column})`;
  const products = terms(problem, grid, row, column);
  /** @type {Explanation} */
  const found = {
    title: '', text: '', result: '', note: '',
    lit: {
      input: products.map((term) => term.input), kernel: products.map((term) => term.kernel),
      output: products.map((term) => term.output), target: target ? products.map((term) => term.output) : [],
    },
  };
  if (grid === 'output' || grid === 'target') {
    if (!products.length) return null;
    const value = output[row]?.[column];
    found.title = `${target ? 'Prediction' : 'Output'} ${at}: each input value under the kernel times its weight`;
    found.text = format.sum(products.map((term) => [term.value, term.weight]));
    found.result = format.number(value, 6);
    if (target) found.note = `Target ${format.number(target[row]?.[column])}, difference ${format.number(value - target[row]?.[column])}`;
    return found;
  }
  if (grid === 'kernel') {
    const [rows, columns] = shape(problem.kernel);
    if (row < 0 || column < 0 || row >= rows || column >= columns) return null;
    const weight = problem.kernel[row][column];
    if (target) {
      const pairs = products.map((term) => /** @type {[number, number]} */ ([
        output[term.output[0]][term.output[1]] - target[term.output[0]][term.output[1]], term.value]));
      found.title = `Gradient of weight ${at}: 2 × the sum of difference × input, over all outputs`;
      const other = pairs.filter(([left, right]) => left * right !== 0);
      const zero = pairs.length - other.length;
      found.text = `2 × (${other.length ? format.sum(other, 8) : '0'})`;
      found.result = format.number(2 * pairs.reduce((sum, [left, right]) => sum + left * right, 0), 6);
      found.note = zero ? `${format.plural(zero, 'product is', 'products are')} 0. ` : '';
      found.note += `A step of sgd subtracts the learning rate times this from ${format.number(weight)}.`;
    } else {
      found.title = `Weight ${at} = ${format.number(weight)}`;
      const values = new Set(products.map((term) => String(term.input))).size;
      found.text = `It multiplies ${format.plural(values, 'input value')}, one for each of ${format.plural(products.length, 'output')}`;
    }
    return found;
  }
  const { height, width, top, left, right, bottom } = layout(problem);
  if (row < -top || column < -left || row >= height + bottom || column >= width + right) return null;
  const from = [sourceIndex(row, height, problem.boundary), sourceIndex(column, width, problem.boundary)];
  const outside = row < 0 || column < 0 || row >= height || column >= width;
  const origin = from[0] < 0 || from[1] < 0 ? 'a constant' : `a copy of input (${from.join(', ')})`;
  found.title = outside ? `Outside the input ${at}, ${origin}` : `Input ${at}`;
  found.title += `: it reaches ${format.plural(products.length, 'output')}`;
  found.text = products.slice(0, 6).map(({ value, weight, output: [i, j] }) =>
    `${format.factor(value)} × ${format.factor(weight)} = ${format.number(value * weight)} in (${i}, ${j})`).join('; ');
  if (products.length > 6) found.text += `; … (${products.length - 6} more)`;
  return found;
}

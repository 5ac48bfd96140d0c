/** Numbers and sums as text. */

/** @import {Matrix} from './types.js' */

/** @param {string} text @returns {string} with a true minus sign */
const minus = (text) => text.replace(/-/g, '\u2212');

/**
 * A number with at most `digits` significant digits, exponents only where they are shorter.
 * @param {number} value @param {number} [digits]
 */
export function number(value, digits = 4) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? 'not a number' : minus(value > 0 ? '\u221e' : '-\u221e');
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return minus(value.toExponential(Math.min(digits, 3) - 1).replace(/\.?0+e/, 'e').replace('e+', 'e'));
  return minus(String(Number(value.toPrecision(digits))));
}

/** A number for a narrow cell, without the rounding errors of a computation. @param {number} exact */
export function cell(exact) {
  const value = Math.abs(exact) < 1e-9 ? 0 : Number(exact.toPrecision(9));
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 10000) return minus(String(value));
  if (!Number.isFinite(value) || size >= 1000) return number(value, 1);
  if (size < 0.005) return '0.0';
  const text = value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
  return minus(text.includes('.') ? text.replace(/(\.\d)0$/, '$1') : text);
}

/** A factor of a product: in parentheses if it is negative. @param {number} value */
export const factor = (value) => (value < 0 ? `(${number(value)})` : number(value));

/**
 * A sum of products written out, such as "0 × 1 + 1 × (−1)"; long sums are shortened at the end.
 * @param {[number, number][]} products @param {number} [most]
 */
export function sum(products, most = 12) {
  const shown = products.slice(0, most).map(([left, right]) => `${factor(left)} × ${factor(right)}`);
  const hidden = products.length - shown.length;
  return shown.join(' + ') + (hidden > 0 ? ` + … (${hidden} more)` : '');
}

/** @param {number} milliseconds */
export const time = (milliseconds) =>
  milliseconds >= 1000 ? `${number(milliseconds / 1000, 3)} s` : `${number(milliseconds, 2)} ms`;

/** @param {number} count @param {string} one @param {string} [many] */
export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

/** A matrix as compact JSON-like rows, for labels. @param {Matrix} matrix */
export const rows = (matrix) => `[${matrix.map((row) => `[${row.map((value) => number(value, 3)).join(', ')}]`).join(', ')}]`;

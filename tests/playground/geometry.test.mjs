import assert from 'node:assert/strict';
import { test } from 'node:test';
import { correlate, firstDifference, layout, padded, shape, sourceIndex, terms } from '../../service/playground/static/geometry.js';
import { DEFAULT } from '../../service/playground/static/codec.js';

const counting = { ...DEFAULT, input: [[0, 1, 2], [3, 4, 5], [6, 7, 8]], kernel: [[0, 1], [2, 3]] };
const line = (/** @type {Partial<typeof DEFAULT>} */ change) => ({ ...DEFAULT, input: [[0, 0, 1, 0, 0]], kernel: [[1, 2]], ...change });

test('the example of d2l', () => assert.deepEqual(correlate(counting), [[19, 25], [37, 43]]));

test('even kernels in mode same and full, as docs/modes.md states', () => {
  assert.deepEqual(correlate(line({ mode: 'full', operation: 'convolve' })), [[0, 0, 1, 2, 0, 0]]);
  assert.deepEqual(correlate(line({ mode: 'same', operation: 'convolve' })), [[0, 0, 1, 2, 0]]);
  assert.deepEqual(correlate(line({ mode: 'full' })), [[0, 0, 2, 1, 0, 0]]);
  assert.deepEqual(correlate(line({ mode: 'same' })), [[0, 2, 1, 0, 0]]);
});

test('boundaries repeat the values of numpy.pad', () => {
  const outside = (/** @type {any} */ boundary, size = 4) => [-3, -2, -1, size, size + 1].map((at) => sourceIndex(at, size, boundary));
  assert.deepEqual(outside('zeros'), [-1, -1, -1, -1, -1]);
  assert.deepEqual(outside('replicate'), [0, 0, 0, 3, 3]);
  assert.deepEqual(outside('reflect'), [3, 2, 1, 2, 1]);
  assert.deepEqual(outside('symmetric'), [2, 1, 0, 3, 2]);
  assert.deepEqual(outside('circular'), [1, 2, 3, 0, 1]);
  assert.deepEqual(outside('reflect', 2), [1, 0, 1, 0, 1]);
  assert.deepEqual(outside('reflect', 1), [0, 0, 0, 0, 0]);
});

test('padding has the fill value', () =>
  assert.deepEqual(padded({ ...line({ mode: 'full' }), boundary: 'constant', fill: 7 }), [[7, 0, 0, 1, 0, 0, 7]]));

test('stride and dilation set the size of the output', () => {
  const square = { ...DEFAULT, input: Array.from({ length: 8 }, () => Array(8).fill(1)), kernel: Array.from({ length: 3 }, () => Array(3).fill(1)) };
  assert.deepEqual(shape(correlate({ ...square, stride: 2 })), [3, 3]);
  assert.deepEqual(shape(correlate({ ...square, dilation: 2 })), [4, 4]);
  assert.deepEqual(shape(correlate({ ...square, dilation: 2, mode: 'same' })), [8, 8]);
  assert.deepEqual(correlate({ ...square, kernel: Array.from({ length: 9 }, () => Array(9).fill(1)) }), []);
});

test('the terms of every output sum to it, and every cell finds the same products', () => {
  for (const mode of /** @type {const} */ (['valid', 'same', 'full']))
    for (const operation of /** @type {const} */ (['correlate', 'convolve']))
      for (const [stride, dilation] of [[1, 1], [2, 1], [1, 2]]) {
        const problem = { ...counting, input: [[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 2, 3], [4, 5, 6, 7]], mode, operation, stride, dilation };
        const output = correlate(problem);
        const products = new Set();
        output.forEach((row, i) => row.forEach((value, j) => {
          const found = terms(problem, 'output', i, j);
          assert.equal(found.reduce((sum, term) => sum + term.weight * term.value, 0), value);
          for (const term of found) products.add(JSON.stringify(term));
        }));
        const { height, width, top, bottom, left, right } = layout(problem);
        const fromInput = [];
        for (let r = -top; r < height + bottom; r++)
          for (let c = -left; c < width + right; c++) fromInput.push(...terms(problem, 'input', r, c));
        const fromKernel = problem.kernel.flatMap((row, a) => row.flatMap((_, b) => terms(problem, 'kernel', a, b)));
        for (const found of [fromInput, fromKernel]) assert.deepEqual(new Set(found.map((term) => JSON.stringify(term))), products);
      }
});

test('a difference beyond rounding is found', () => {
  const output = correlate(counting);
  assert.equal(firstDifference(counting, output.map((row) => row.map(Math.fround)), output, 0), null);
  assert.deepEqual(firstDifference(counting, [[19, 25], [37, 43.001]], output, 1e-5), [1, 1]);
  assert.deepEqual(firstDifference(counting, [[19, 25], [37, /** @type {any} */ (null)]], output, 1e-5), [1, 1]);
  assert.deepEqual(firstDifference(counting, [[19, 25]], output, 1e-5), [0, 0]);
  const large = { ...DEFAULT, input: [[1e38, 1e38]], kernel: [[1e3, 1]] };
  assert.equal(firstDifference(large, [[null]], correlate(large), 0), null);
  assert.deepEqual(firstDifference(large, [[1e30]], correlate(large), 0), [0, 0]);
});

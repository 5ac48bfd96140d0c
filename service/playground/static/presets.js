/** Images and kernels to start from. Kernels of the service come from /kernels. */

/** @import {Matrix} from './types.js' */
import { build } from './geometry.js';
import { random } from './descent.js';

/** @param {string} rows digits, one row a word @returns {Matrix} */
const drawing = (rows) => rows.split(' ').map((row) => [...row].map(Number));

/** @type {Record<string, {label: string, make: () => Matrix}>} */
export const IMAGES = {
  two_edges: { label: 'Two edges (d2l), 6 × 8', make: () => build(6, 8, (_, c) => (c < 2 || c > 5 ? 1 : 0)) },
  counting: { label: 'Counting, 3 × 3', make: () => build(3, 3, (r, c) => 3 * r + c) },
  square: { label: 'Square, 8 × 8', make: () => build(8, 8, (r, c) => (r > 1 && r < 6 && c > 1 && c < 6 ? 1 : 0)) },
  dot: { label: 'Single dot, 5 × 5', make: () => build(5, 5, (r, c) => (r === 2 && c === 2 ? 1 : 0)) },
  checkerboard: { label: 'Checkerboard, 8 × 8', make: () => build(8, 8, (r, c) => (r + c) % 2) },
  ramp: { label: 'Ramp, 6 × 8', make: () => build(6, 8, (_, c) => c) },
  digit: {
    label: 'Drawn digit, 12 × 10',
    make: () => drawing('0000000000 0003999300 0029400950 0000000960 0000002930 0000499500 0000039960 0000000390 ' +
      '0000000390 0290003960 0049999500 0000000000'),
  },
  noise: {
    label: 'Noise, 8 × 8',
    make: () => {
      const uniform = random(7);
      return build(8, 8, () => Math.floor(uniform() * 10));
    },
  },
  blank: { label: 'Blank, 8 × 8', make: () => build(8, 8, () => 0) },
};

/** @type {Record<string, {label: string, kernel: Matrix}>} */
export const KERNELS = {
  d2l_edge: { label: 'Edge of the d2l example', kernel: [[1, -1]] },
  d2l_counting: { label: 'Counting (d2l)', kernel: [[0, 1], [2, 3]] },
  shift: { label: 'Shift by one column', kernel: [[0, 0, 0], [1, 0, 0], [0, 0, 0]] },
  checker: { label: 'Checkerboard', kernel: [[1, -1], [-1, 1]] },
  corner: { label: 'Corner', kernel: [[1, 1, 0], [1, 0, -1], [0, -1, -1]] },
};

/** Grey values 0 to 1 of an image, by the weights of ITU-R BT.601. @param {ImageData} image @returns {Matrix} */
export function grey({ data, width, height }) {
  return build(height, width, (r, c) => {
    const at = 4 * (r * width + c);
    return Math.round(0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2]);
  });
}

/**
 * Pixels of a picture, reduced to at most `most` pixels a side. Browsers give access to pixels through a canvas.
 * @param {ImageBitmap} bitmap @param {number} most @param {[number, number]} [size] rows and columns, exactly
 */
export function pixels(bitmap, most, size) {
  const scale = Math.min(1, most / Math.max(bitmap.width, bitmap.height));
  const [rows, columns] = size ?? [Math.max(1, Math.round(bitmap.height * scale)), Math.max(1, Math.round(bitmap.width * scale))];
  const canvas = new OffscreenCanvas(columns, rows);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext('2d', { willReadFrequently: true }));
  context.imageSmoothingQuality = 'high';
  context.drawImage(bitmap, 0, 0, columns, rows);
  return context.getImageData(0, 0, columns, rows);
}

/** Concentric rings of rising frequency: every orientation and every width of edges. @param {number} side */
export function rings(side) {
  const image = new ImageData(side, side);
  for (let r = 0; r < side; r++)
    for (let c = 0; c < side; c++) {
      const [y, x] = [(r - side / 2) / side, (c - side / 2) / side];
      const value = 127.5 + 127.5 * Math.cos(120 * (x * x + y * y) * Math.PI);
      image.data.set([value, value, value, 255], 4 * (r * side + c));
    }
  return image;
}

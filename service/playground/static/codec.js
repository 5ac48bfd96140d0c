/** State of the page as text: the fragment of a shared link, `v1.` and the deflated JSON in base64url. */

/** @import {State, Matrix} from './types.js' */

export const VERSION = 'v1';
export const MAX_SIDE = 64;
export const MAX_KERNEL_SIDE = 63;
const MAX_CHARACTERS = 400_000;

/** @type {State} */
export const DEFAULT = {
  view: 'convolve', lesson: 0,
  input: [[1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 1, 1],
    [1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 1, 1]],
  image: 'two_edges', kernel: [[1, -1]], kernelName: '',
  mode: 'valid', boundary: 'zeros', fill: 0, stride: 1, dilation: 1, operation: 'correlate',
  active: ['output', 2, 1], targetKind: 'kernel', target: null, noise: 0,
  solver: 'sgd', rate: 'auto', steps: 60, start: 'random', seed: 1, picture: 'camera', show: 'auto',
};

/** @param {unknown} value @param {number} most */
const isMatrix = (value, most) =>
  Array.isArray(value) && value.length >= 1 && value.length <= most && Array.isArray(value[0]) &&
  value[0].length >= 1 && value[0].length <= most && value.every((row) =>
    Array.isArray(row) && row.length === value[0].length && row.every((entry) => Number.isFinite(entry)));
/** @param {...string} words */
const oneOf = (...words) => (/** @type {unknown} */ value) => typeof value === 'string' && words.includes(value);
/** @param {number} low @param {number} high */
const whole = (low, high) => (/** @type {unknown} */ value) =>
  Number.isInteger(value) && Number(value) >= low && Number(value) <= high;
const isText = (/** @type {unknown} */ value) => typeof value === 'string' && value.length <= 60;

/** @type {{[field in keyof State]: (value: unknown) => boolean}} */
const CHECKS = {
  view: oneOf('convolve', 'learn', 'picture'),
  lesson: whole(0, 8),
  input: (value) => isMatrix(value, MAX_SIDE),
  image: isText,
  kernel: (value) => isMatrix(value, MAX_KERNEL_SIDE),
  kernelName: isText,
  mode: oneOf('valid', 'same', 'full'),
  boundary: oneOf('zeros', 'constant', 'replicate', 'reflect', 'symmetric', 'circular'),
  fill: Number.isFinite,
  stride: whole(1, 8),
  dilation: whole(1, 8),
  operation: oneOf('correlate', 'convolve'),
  active: (value) => Array.isArray(value) && oneOf('input', 'kernel', 'output', 'target')(value[0]) &&
    whole(-MAX_SIDE, 2 * MAX_SIDE)(value[1]) && whole(-MAX_SIDE, 2 * MAX_SIDE)(value[2]),
  targetKind: oneOf('kernel', 'own'),
  target: (value) => value === null || isMatrix(value, 2 * MAX_SIDE),
  noise: (value) => Number.isFinite(value) && Number(value) >= 0,
  solver: oneOf('sgd', 'momentum', 'nesterov', 'adam', 'exact'),
  rate: (value) => value === 'auto' || (Number.isFinite(value) && Number(value) > 0),
  steps: whole(1, 2000),
  start: oneOf('zeros', 'random'),
  seed: whole(0, 2 ** 31),
  picture: oneOf('camera', 'rings', 'own'),
  show: oneOf('auto', 'scale', 'clip', 'signed'),
};

/**
 * The valid entries of an untrusted object, as a change of state.
 * @param {unknown} raw @returns {Partial<State>}
 */
export function checked(raw) {
  if (typeof raw !== 'object' || raw === null) throw new Error('the link holds no state');
  const entries = Object.entries(raw);
  const wrong = entries.find(([name, value]) => !Object.hasOwn(CHECKS, name) || !CHECKS[/** @type {keyof State} */ (name)](value));
  if (wrong) throw new Error(`the link has an invalid value of "${wrong[0].slice(0, 40)}"`);
  return Object.fromEntries(entries);
}

/** @param {BlobPart} data @param {CompressionStream | DecompressionStream} stream */
async function pass(data, stream) {
  const reader = new Blob([data]).stream().pipeThrough(/** @type {ReadableWritablePair} */ (stream)).getReader();
  const parts = [];
  for (let length = 0; ;) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    length += value.length;
    if (length > MAX_CHARACTERS) throw new Error('the link is too long');
    parts.push(value);
  }
}

/** @param {State} state @returns {Promise<string>} the fragment without `#` */
export async function encode(state) {
  const changed = Object.entries(state).filter(
    ([name, value]) => JSON.stringify(value) !== JSON.stringify(DEFAULT[/** @type {keyof State} */ (name)]));
  const bytes = await pass(JSON.stringify(Object.fromEntries(changed)), new CompressionStream('deflate-raw'));
  const text = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(''));
  return `${VERSION}.${text.replaceAll('+', '-').replaceAll('/', '_').replace(/=+$/, '')}`;
}

/** @param {string} fragment without `#` @returns {Promise<State>} Throws Error with a reason for the reader. */
export async function decode(fragment) {
  const [version, text = ''] = fragment.split('.');
  if (version !== VERSION) throw new Error(`the link has version "${version.slice(0, 20)}", this page reads ${VERSION}`);
  /** @type {unknown} */
  let raw;
  try {
    const bytes = Uint8Array.from(atob(text.replaceAll('-', '+').replaceAll('_', '/')), (letter) => letter.charCodeAt(0));
    raw = JSON.parse(new TextDecoder().decode(await pass(bytes, new DecompressionStream('deflate-raw'))));
  } catch {
    throw new Error('the link is damaged');
  }
  return { ...DEFAULT, ...checked(raw) };
}

/** Why a value is not a matrix. @param {unknown} value */
function describeMismatch(value) {
  if (!Array.isArray(value)) return 'type a single number into a cell';
  const [first] = value;
  if (!value.length || !value.every((row) => Array.isArray(row) && row.length)) return 'it has rows without numbers';
  if (value.length > MAX_SIDE || first.length > MAX_SIDE)
    return `it has ${value.length} × ${first.length}`;
  const ragged = value.findIndex((row) => row.length !== first.length);
  if (ragged > 0) return `row ${ragged + 1} has ${value[ragged].length} numbers and the first row ${first.length}`;
  const row = value.findIndex((entries) => !entries.every(Number.isFinite));
  const column = value[row].findIndex((/** @type {unknown} */ entry) => !Number.isFinite(entry));
  return `“${value[row][column]}” in row ${row + 1}, column ${column + 1} is not a number`;
}

/**
 * A matrix from text: JSON, or numbers separated by spaces, tabs, commas or semicolons, one row a line. A comma before a
 * digit is a decimal comma if tabs, semicolons or several spaces separate the numbers.
 * @param {string} text
 */
export function parseMatrix(text) {
  /** @type {unknown} */
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    const plain = /[\t;]|[^\s,] {2,}[^\s,]/.test(text.trim()) ? text.replace(/,(?=\d)/g, '.') : text;
    value = plain.trim().split(/\r?\n/).map((line) => line.trim().split(/[\s,;]+/).map((word) => (word && Number.isFinite(Number(word)) ? Number(word) : word)));
  }
  if (!isMatrix(value, MAX_SIDE)) throw new Error(`not a matrix of at most ${MAX_SIDE} × ${MAX_SIDE} numbers: ${describeMismatch(value)}`);
  return /** @type {Matrix} */ (value);
}

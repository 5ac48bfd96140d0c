/** Picture: an image that the service filters, shown before and after, with zoom. */

/** @import {State} from './types.js' */
import { color } from './colors.js';
import { byId, debounce, input, onTheme, theme } from './dom.js';
import * as format from './format.js';
import { padding, shape } from './geometry.js';
import { grey, rings } from './presets.js';
import { decodeNpy, pictureRequest, resolveShow, send } from './requests.js';
import * as service from './service.js';
import { changed, state, update } from './store.js';

export const MAX_PIXELS = 12e6;
/** Types that the service decodes; others are converted to PNG. */
const TYPES = ['image/png', 'image/jpeg', 'image/webp'];

/** @type {{name: string, file: Blob, bitmap: ImageBitmap} | null} */
let picture = null;
/** @type {Blob | null} */
let own = null;
/** @type {AbortController | null} */
let pending = null;
let zoom = 1;

const canvas = (/** @type {string} */ id) => /** @type {HTMLCanvasElement} */ (byId(id));

export function setUp() {
  input('wipe').addEventListener('input', wipe);
  byId('zoom-in').addEventListener('click', () => zoomTo(zoom * 2));
  byId('zoom-out').addEventListener('click', () => zoomTo(zoom / 2));
  byId('zoom-fit').addEventListener('click', () => zoomTo(fitting()));
  byId('closer').addEventListener('click', () => closer(0.5, 0.5));
  byId('stack').addEventListener('dblclick', (event) => {
    const box = byId('stack').getBoundingClientRect();
    closer((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  });
  onTheme(() => state.view === 'picture' && request());
}

/** @param {State} now @param {State} before */
export function onChange(now, before) {
  if (now.view !== 'picture') return pending?.abort();
  if (changed(now, before, 'view', 'picture', 'kernel', 'kernelName', 'mode', 'boundary', 'fill', 'operation', 'show')) request();
}

/** Show an image of the reader. @param {Blob} file */
export function open(file) {
  own = file;
  if (picture?.name === 'own') picture = null;
  update({ view: 'picture', picture: 'own' });
  request();
}

/** @param {string} name @returns {Promise<NonNullable<typeof picture>>} */
async function load(name) {
  /** @type {Blob} */
  let file;
  if (name === 'own' && own) file = own;
  else if (name === 'rings') {
    const side = 1024;
    const drawn = new OffscreenCanvas(side, side);
    /** @type {OffscreenCanvasRenderingContext2D} */ (drawn.getContext('2d')).putImageData(rings(side), 0, 0);
    file = await drawn.convertToBlob({ type: 'image/png' });
  } else file = await (await fetch('page/camera.jpg')).blob();
  let bitmap = await createImageBitmap(file);
  const count = bitmap.width * bitmap.height;
  if (count > MAX_PIXELS || !TYPES.includes(file.type)) {
    const scale = Math.min(1, Math.sqrt(MAX_PIXELS / count));
    const [resizeWidth, resizeHeight] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.floor(side * scale)));
    bitmap = await createImageBitmap(bitmap, { resizeWidth, resizeHeight, resizeQuality: 'high' });
    const drawn = new OffscreenCanvas(bitmap.width, bitmap.height);
    /** @type {OffscreenCanvasRenderingContext2D} */ (drawn.getContext('2d')).drawImage(bitmap, 0, 0);
    file = await drawn.convertToBlob({ type: 'image/png' });
  }
  return { name, file, bitmap };
}

const request = debounce(compute, 120);

async function compute() {
  if (state.view !== 'picture') return;
  const now = state;
  pending?.abort();
  pending = new AbortController();
  const { signal } = pending;
  try {
    if (picture?.name !== now.picture) {
      picture = await load(now.picture).catch(() => {
        throw new Error('This file is not an image that the browser can read. Use PNG, JPEG or WebP.');
      });
      const before = canvas('before');
      [before.width, before.height] = [picture.bitmap.width, picture.bitmap.height];
      before.getContext('2d')?.drawImage(picture.bitmap, 0, 0);
      zoomTo(fitting());
    }
    const sent = pictureRequest(now, picture.file);
    service.remember(sent);
    byId('picture-facts').textContent = 'Computing';
    const started = performance.now();
    const response = await send(sent, signal);
    const result = JSON.parse(response.headers.get('Corr2d-Result') ?? '{}');
    const facts = resolveShow(now) === 'signed' ? drawSigned(await response.arrayBuffer()) : await drawImage(await response.blob());
    align();
    const { width, height } = picture.bitmap;
    byId('picture-facts').textContent = `${width} × ${height} pixels; output ${(result.shape ?? []).join(' × ')}${facts}`;
    byId('picture-facts').dataset.engine = result.engine;
    service.showError('');
    service.describe([...service.engine(result), service.timing(response, started)]);
  } catch (error) {
    byId('picture-facts').textContent = '';
    service.fail(error, compute);
  }
}

/** @param {Blob} blob @returns {Promise<string>} */
async function drawImage(blob) {
  const bitmap = await createImageBitmap(blob);
  const after = canvas('after');
  [after.width, after.height] = [bitmap.width, bitmap.height];
  after.getContext('2d')?.drawImage(bitmap, 0, 0);
  return resolveShow(state) === 'scale' ? ', smallest value black, largest white' : ', values below 0 black, above 255 white';
}

/** Draw an array in the diverging colours; colour planes are averaged. @param {ArrayBuffer} buffer @returns {string} */
function drawSigned(buffer) {
  const { shape: sizes, data } = decodeNpy(buffer);
  const [height, width] = sizes.slice(-2);
  const planes = data.length / (height * width);
  const values = new Float32Array(height * width);
  for (let index = 0; index < data.length; index++) values[index % values.length] += data[index] / planes;
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  const largest = Math.max(Math.abs(low), Math.abs(high)) || 1;
  const [mode, half] = [theme(), 255];
  const colors = Uint32Array.from({ length: 2 * half + 1 }, (_, index) => {
    // The square root shows weak edges next to strong ones.
    const part = (index - half) / half;
    const [red, green, blue] = color(part, { kind: 'diverging', low: -1, high: 1 }, mode);
    return red | (green << 8) | (blue << 16) | (255 << 24);
  });
  const image = new ImageData(width, height);
  const words = new Uint32Array(image.data.buffer);
  for (let index = 0; index < values.length; index++) {
    const part = values[index] / largest;
    words[index] = colors[half + Math.round(half * Math.sign(part) * Math.sqrt(Math.abs(part)))];
  }
  const after = canvas('after');
  [after.width, after.height] = [width, height];
  after.getContext('2d')?.putImageData(image, 0, 0);
  return `, values from ${format.number(low)} to ${format.number(high)}, negative blue and positive orange`;
}

/** Lay the output over the picture, so that each value lies on the centre of its window. */
function align() {
  const [before, after] = [canvas('before'), canvas('after')];
  const [rows, columns] = shape(state.kernel);
  const offset = (/** @type {number} */ taps) => Math.floor((taps - 1) / 2) - padding({ ...state, dilation: 1 }, taps)[0];
  const inset = (/** @type {number} */ pixels, /** @type {number} */ whole) => `${(100 * pixels) / whole}%`;
  after.style.left = inset(offset(columns), before.width);
  after.style.top = inset(offset(rows), before.height);
  after.style.width = inset(after.width, before.width);
  after.style.height = inset(after.height, before.height);
  wipe();
}

function wipe() {
  const part = Number(input('wipe').value);
  const [before, after] = [canvas('before'), canvas('after')];
  const left = (Number.parseFloat(after.style.left) || 0) / 100;
  // The position of the divider is a column of the picture. In modes other than same, the output has another first column.
  const inside = ((part / 100 - left) * before.width) / after.width;
  after.style.clipPath = `inset(0 0 0 ${100 * Math.min(Math.max(inside, 0), 1)}%)`;
  byId('divider').style.left = `${part}%`;
}

/** @returns {number} zoom at which the whole picture is visible */
function fitting() {
  const viewer = byId('viewer');
  const before = canvas('before');
  return Math.min((viewer.clientWidth - 2) / before.width, (viewer.clientHeight - 2) / before.height) || 1;
}

/** @param {number} value */
function zoomTo(value) {
  const viewer = byId('viewer');
  const before = canvas('before');
  const center = [(viewer.scrollLeft + viewer.clientWidth / 2) / zoom, (viewer.scrollTop + viewer.clientHeight / 2) / zoom];
  zoom = Math.min(Math.max(value, 0.02), 32);
  const stack = byId('stack');
  stack.style.width = `${before.width * zoom}px`;
  stack.style.height = `${before.height * zoom}px`;
  stack.classList.toggle('pixelated', zoom >= 3);
  viewer.scrollTo(center[0] * zoom - viewer.clientWidth / 2, center[1] * zoom - viewer.clientHeight / 2);
  byId('zoom').textContent = `${Math.round(zoom * 100)} %`;
}

/** Open 16 x 16 pixels of the picture in the grids. @param {number} across 0 to 1 @param {number} down 0 to 1 */
function closer(across, down) {
  if (!picture) return;
  const { bitmap } = picture;
  const side = Math.min(16, bitmap.width, bitmap.height);
  const corner = (/** @type {number} */ part, /** @type {number} */ whole) =>
    Math.min(Math.max(Math.round(part * whole - side / 2), 0), whole - side);
  const [x, y] = [corner(across, bitmap.width), corner(down, bitmap.height)];
  const cut = canvas('before').getContext('2d')?.getImageData(x, y, side, side);
  if (cut) update({ view: 'convolve', image: '', input: grey(cut), active: ['output', 4, 4] });
}

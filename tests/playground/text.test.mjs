import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { checked, decode, DEFAULT, encode, parseMatrix } from '../../service/playground/static/codec.js';
import { color, gradient, ink, luminance, scaleOf } from '../../service/playground/static/colors.js';
import { explain } from '../../service/playground/static/explain.js';
import * as format from '../../service/playground/static/format.js';
import { correlate } from '../../service/playground/static/geometry.js';
import { IMAGES, KERNELS } from '../../service/playground/static/presets.js';
import { decodeNpy, events, fitRequest, outputRequest, pictureRequest, snippets, url } from '../../service/playground/static/requests.js';

test('a link restores the state', async () => {
  for (const state of [DEFAULT, { ...DEFAULT, view: /** @type {const} */ ('learn'), kernel: [[0.5, -2e-9], [3, 4]], rate: /** @type {const} */ ('auto') }]) {
    const link = await encode(state);
    assert.match(link, /^v1\.[\w-]*$/);
    assert.deepEqual(await decode(link), state);
  }
});

test('links that are damaged, too long, of another version or with invalid values are rejected', async () => {
  const inject = async (/** @type {unknown} */ change) => encode(/** @type {any} */ ({ ...DEFAULT, .../** @type {object} */ (change) }));
  await assert.rejects(decode('v2.abc'), /version "v2"/);
  await assert.rejects(decode('v1.!!'), /damaged/);
  await assert.rejects(decode('v1.'), /damaged/);
  await assert.rejects(decode(await inject({ kernel: [[1], [1, 2]] })), /invalid value of "kernel"/);
  await assert.rejects(decode(await inject({ stride: 0 })), /invalid value of "stride"/);
  await assert.rejects(decode(await inject({ input: [[null]] })), /invalid value of "input"/);
  await assert.rejects(decode(await inject({ constructor: 1 })), /invalid value of "constructor"/);
  await assert.rejects(decode(await inject({ input: Array(65).fill([1]) })), /invalid value of "input"/);
  const bomb = await new Response(new Blob(['0'.repeat(3e7)]).stream().pipeThrough(new CompressionStream('deflate-raw'))).arrayBuffer();
  await assert.rejects(decode(`v1.${Buffer.from(bomb).toString('base64url')}`), /damaged/);
});

test('matrices are read from JSON and from text', () => {
  assert.deepEqual(parseMatrix('[[1, 2], [3, 4]]'), [[1, 2], [3, 4]]);
  assert.deepEqual(parseMatrix('1\t2\r\n3\t-4.5\n'), [[1, 2], [3, -4.5]]);
  for (const text of ['', 'a b', '1 2\n3', '[[1], [null]]']) assert.throws(() => parseMatrix(text), /not a matrix/);
});

test('a comma is a decimal comma where something else separates the numbers', () => {
  for (const text of ['1,5\t2,5\n3,5\t4,5', '1,5;2,5\r\n3,5;4,5', '1,5  2,5\n3,5  4,5', '1.5\t2.5\n3,5\t4,5'])
    assert.deepEqual(parseMatrix(text), [[1.5, 2.5], [3.5, 4.5]]);
  assert.deepEqual(parseMatrix('-1,5\t2\n'), [[-1.5, 2]]);
  for (const text of ['1,2,3', '1, 2, 3', '1,  2,  3', '1 2 3', '1; 2; 3']) assert.deepEqual(parseMatrix(text), [[1, 2, 3]]);
  assert.throws(() => parseMatrix('1,234.5\t2'), /not a matrix/);
});

test('numbers', () => {
  assert.deepEqual([0, 1, -1, 0.5, 1234567, 1e-7, NaN, -Infinity].map((value) => format.number(value)),
    ['0', '1', '−1', '0.5', '1.23e6', '1e−7', 'not a number', '−∞']);
  assert.deepEqual([0, -12, 0.123, 12.34, 123.4, 0.001, -1.004, 5e7, 1e-16, 1.9999999999].map(format.cell),
    ['0', '−12', '0.12', '12.3', '123', '0.0', '−1.0', '5e7', '0', '2']);
  assert.equal(format.sum([[0, 1], [1, -1]]), '0 × 1 + 1 × (−1)');
  assert.equal(format.sum([[1, 1], [2, 2], [3, 3]], 1), '1 × 1 + … (2 more)');
});

test('text has a contrast of 4.5 on every colour, and the scale is symmetric about 0', () => {
  for (const theme of /** @type {const} */ (['light', 'dark']))
    for (let value = -1; value <= 1; value += 1 / 64) {
      const background = color(value, { kind: 'diverging', low: -1, high: 1 }, theme);
      const [a, b] = [luminance(background) + 0.05, (ink(background) === '#fff' ? 1 : 0) + 0.05];
      assert.ok(Math.max(a, b) / Math.min(a, b) >= 4.5, `${theme} ${value}`);
    }
  assert.deepEqual(scaleOf([[-2, 1]]), { kind: 'diverging', low: -2, high: 2 });
  assert.equal(scaleOf(Array.from({ length: 17 }, () => Array(17).fill(9))).kind, 'grey');
  assert.match(gradient(scaleOf([[0]]), 'light'), /^linear-gradient\(90deg, rgb\(/);
});

test('explanations write the sums out', () => {
  const output = correlate(DEFAULT);
  const found = (/** @type {any} */ active, target = null) => /** @type {any} */ (explain(DEFAULT, output, target, active));
  assert.equal(found(['output', 2, 5]).text, '0 × 1 + 1 × (−1)');
  assert.equal(found(['output', 2, 5]).result, '−1');
  assert.equal(found(['input', 0, 1]).text, '1 × (−1) = −1 in (0, 0); 1 × 1 = 1 in (0, 1)');
  assert.match(found(['kernel', 0, 0]).text, /42 input values, one for each of 42 outputs/);
  assert.equal(explain(DEFAULT, output, null, ['output', 9, 9]), null);
  const gradient = explain({ ...DEFAULT, kernel: [[0, 0]] }, correlate({ ...DEFAULT, kernel: [[0, 0]] }), output, ['kernel', 0, 0]);
  assert.equal(gradient?.result, '−12');
});

test('requests use /correlate, and /conv2d with a stride or dilation', () => {
  assert.deepEqual(outputRequest(DEFAULT).json, { input: DEFAULT.input, kernel: [[1, -1]], mode: 'valid', explain: true });
  const strided = outputRequest({ ...DEFAULT, stride: 2, mode: 'same', boundary: 'reflect', operation: 'convolve' });
  assert.equal(strided.path, 'conv2d');
  assert.deepEqual(strided.json, { input: DEFAULT.input, stride: 2, padding: [0, 0, 1, 0], padding_mode: 'reflect', weight: [[-1, 1]], explain: true });
  const symmetric = /** @type {any} */ (outputRequest({ ...DEFAULT, dilation: 2, mode: 'full', boundary: 'symmetric' }).json);
  assert.equal(symmetric.input[0].length, 12);
  assert.equal(symmetric.padding, undefined);
  const fit = /** @type {any} */ (fitRequest({ ...DEFAULT, solver: 'exact' }, [[1]], [[0, 0]], true));
  assert.equal(fit.headers.Accept, 'text/event-stream');
  assert.equal(fit.json.learning_rate, undefined);
  const picture = pictureRequest({ ...DEFAULT, show: 'clip' }, new Blob(['x'], { type: 'image/png' }));
  assert.equal(url(picture, 'http://h/'), 'http://h/correlate?kernel=%5B%5B1%2C-1%5D%5D&mode=valid&png=clip&explain=true');
});

test('snippets quote what a shell would interpret, and name the key instead of containing it', () => {
  const request = { ...outputRequest(DEFAULT), json: { kernel: "it's" } };
  assert.ok(snippets(request, 'http://h/', false).curl.includes(`-d '{"kernel":"it'\\''s"}'`));
  for (const text of Object.values(snippets(request, 'http://h/', true))) assert.match(text, /CORR2D_API_KEY/);
});

test('snippets fetch a picture of the page, and name another one', () => {
  const file = new Blob(['x'], { type: 'image/png' });
  for (const text of Object.values(snippets(pictureRequest({ ...DEFAULT, picture: 'camera' }, file), 'http://h/', false)))
    assert.match(text, /http:\/\/h\/page\/camera\.jpg/);
  for (const text of Object.values(snippets(pictureRequest({ ...DEFAULT, picture: 'own' }, file), 'http://h/', false)))
    assert.match(text, /Save the picture as picture\.png first/);
});

test('text that is not a matrix is described by its first fault', () => {
  const fault = (/** @type {string} */ text) => { try { parseMatrix(text); } catch (error) { return /** @type {Error} */ (error).message; } };
  assert.match(fault('7') ?? '', /: type a single number into a cell/);
  assert.match(fault('NaN 1') ?? '', /“NaN” in row 1, column 1 is not a number/);
  assert.match(fault('1 2\n3 x') ?? '', /“x” in row 2, column 2 is not a number/);
  assert.match(fault('1 2\n3') ?? '', /row 2 has 1 numbers and the first row 2/);
  assert.match(fault(Array(70).fill(Array(70).fill(1).join(' ')).join('\n')) ?? '', /at most 64 × 64 numbers: it has 70 × 70/);
});

test('npy files of the service are read, others rejected', () => {
  const file = (/** @type {string} */ header) => {
    const text = header.padEnd(117) + '\n';
    const bytes = new Uint8Array(128 + 8);
    bytes.set([0x93, ...Buffer.from('NUMPY'), 1, 0, 118, 0, ...Buffer.from(text)]);
    new DataView(bytes.buffer).setFloat32(128, 1.5, true);
    return bytes.buffer;
  };
  const { shape, data } = decodeNpy(file("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }"));
  assert.deepEqual([shape, [...data]], [[1, 2], [1.5, 0]]);
  assert.throws(() => decodeNpy(file("{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }")), /npy header/);
});

test('events are read across chunks', async () => {
  const parts = ['event: step\ndata: {"numb', 'er":1}\n', '\n: keep-alive\n\nevent: result\ndata: {}\n\n'];
  const body = new ReadableStream({
    start(controller) {
      for (const part of parts) controller.enqueue(new TextEncoder().encode(part));
      controller.close();
    },
  });
  const found = [];
  for await (const event of events(new Response(body))) found.push(event);
  assert.deepEqual(found, [{ event: 'step', data: { number: 1 } }, { event: 'result', data: {} }]);
});

test('presets and lessons set valid states', () => {
  for (const { make } of Object.values(IMAGES)) checked({ input: make() });
  for (const { kernel } of Object.values(KERNELS)) checked({ kernel });
  for (let number = 1; number <= 8; number++) {
    const text = readFileSync(new URL(`../../service/playground/static/lessons/${number}.md`, import.meta.url), 'utf8');
    const [title, state, ...rest] = text.split('\n');
    assert.match(title, /^# /);
    checked(JSON.parse(state));
    const actions = rest.filter((line) => line.startsWith('* '));
    assert.ok(actions.length >= 2);
    for (const line of actions) checked(JSON.parse(line.slice(line.indexOf(': {') + 2)));
  }
});

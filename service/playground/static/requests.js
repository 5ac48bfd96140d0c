/** Requests to the service: built from the state, sent, and copied as curl, Python and JavaScript. */

/** @import {State, Matrix, ServiceRequest, Problem} from './types.js' */
import { layout, multiplied, padded } from './geometry.js';

/** The service has no automatic rate for solver adam. */
export const ADAM_RATE = 0.1;
const KEY = 'corr2d-api-key';

/** @param {string} path @param {unknown} json @param {Record<string, string>} [headers] @returns {ServiceRequest} */
const post = (path, json, headers = {}) =>
  ({ path, query: {}, headers: { 'Content-Type': 'application/json', ...headers }, json, file: null });

/**
 * Input, stride, dilation and padding for /conv2d and /train-kernel. For a boundary that these do not support, the input
 * is padded before it is sent.
 * @param {Problem} problem
 */
function convolutionFields(problem) {
  const { top, bottom, left, right } = layout(problem);
  const padded2 = problem.boundary === 'constant' || problem.boundary === 'symmetric';
  const border = top + bottom + left + right > 0;
  return {
    input: border && padded2 ? padded(problem) : problem.input,
    ...(problem.stride > 1 && { stride: problem.stride }),
    ...(problem.dilation > 1 && { dilation: problem.dilation }),
    ...(border && !padded2 && { padding: [top, bottom, left, right] }),
    ...(border && !padded2 && problem.boundary !== 'zeros' && { padding_mode: problem.boundary }),
  };
}

/** Request for the output: /correlate, or /conv2d with a stride or dilation. @param {State} state */
export function outputRequest(state) {
  const { input, kernel, kernelName, mode, boundary, fill, operation } = state;
  if (state.stride > 1 || state.dilation > 1)
    return post('conv2d', { ...convolutionFields(state), weight: multiplied(state), explain: true });
  return post('correlate', {
    input, kernel: kernelName || kernel, mode,
    ...(mode !== 'valid' && { boundary }),
    ...(mode !== 'valid' && boundary === 'constant' && { fill_value: fill }),
    ...(operation === 'convolve' && { operation }), explain: true,
  });
}

/**
 * Request for a fit. The solver "exact" has neither rate nor initial kernel.
 * @param {State} state @param {Matrix} target @param {Matrix} initial @param {boolean} stream as events
 */
export function fitRequest(state, target, initial, stream) {
  const { solver, rate, steps, kernel } = state;
  return post('train-kernel', {
    ...convolutionFields({ ...state, operation: 'correlate' }), target, kernel_size: [kernel.length, kernel[0].length], solver,
    ...(solver !== 'exact' && { learning_rate: rate === 'auto' && solver === 'adam' ? ADAM_RATE : rate, steps, initial_kernel: initial }),
  }, stream ? { Accept: 'text/event-stream' } : {});
}

/**
 * Display of the output of a picture: in signed colours if the sum of the kernel is 0, otherwise as an image.
 * @param {State} state @returns {'scale'|'clip'|'signed'}
 */
export function resolveShow({ show, kernel }) {
  const sizes = kernel.flat().reduce((sum, value) => sum + Math.abs(value), 0);
  const isBalanced = Math.abs(kernel.flat().reduce((sum, value) => sum + value, 0)) < 0.01 * sizes;
  return show === 'auto' ? (isBalanced ? 'signed' : 'clip') : show;
}

/** Request for a picture. @param {State} state @param {Blob} file */
export function pictureRequest(state, file) {
  const { kernel, kernelName, mode, boundary, fill, operation } = state;
  const show = resolveShow(state);
  return /** @type {ServiceRequest} */ ({
    path: 'correlate',
    query: {
      kernel: kernelName || JSON.stringify(kernel), mode,
      ...(mode !== 'valid' && { boundary }),
      ...(mode !== 'valid' && boundary === 'constant' && { fill_value: String(fill) }),
      ...(operation === 'convolve' && { operation }),
      ...(show !== 'signed' && { png: show }),
      explain: 'true',
    },
    headers: { 'Content-Type': file.type, Accept: show === 'signed' ? 'application/x-npy' : 'image/png' },
    json: undefined, file, ...(state.picture === 'camera' && { source: 'page/camera.jpg' }),
  });
}

/** @param {ServiceRequest} request @param {string} [base] */
export function url(request, base = '') {
  const query = new URLSearchParams(request.query).toString();
  return `${base}${request.path}${query ? `?${query}` : ''}`;
}

/** An error response of the service; the message is its detail. */
export class ServiceError extends Error {
  /** @param {number} status @param {string} message */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? '',
  /** @param {string} key */
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

/**
 * Send a request. Throws ServiceError with the detail of the problem, also if the service cannot be reached.
 * @param {ServiceRequest} request @param {AbortSignal} [signal]
 */
export async function send(request, signal) {
  const key = apiKey.get();
  const headers = { ...request.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const body = request.file ?? JSON.stringify(request.json);
  /** @type {Response} */
  let response;
  try {
    response = await fetch(url(request), { method: body === undefined ? 'GET' : 'POST', headers, body, signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServiceError(0, 'The service cannot be reached. The page shows its own computation.');
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  throw new ServiceError(response.status, problem.detail ?? `${response.status} ${response.statusText}`);
}

/** @param {string} path */
export const get = async (path) => (await send({ path, query: {}, headers: {}, json: undefined, file: null })).json();

/**
 * Events of a text/event-stream, as they arrive.
 * @param {Response} response @returns {AsyncGenerator<{event: string, data: any}>}
 */
export async function* events(response) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  for (let buffer = ''; ;) {
    const { done, value } = await reader.read();
    buffer += decoder.decode(value, { stream: !done });
    const blocks = buffer.split('\n\n');
    buffer = blocks.pop() ?? '';
    for (const block of blocks) {
      const event = /^event: (.*)$/m.exec(block)?.[1];
      const data = /^data: (.*)$/m.exec(block)?.[1];
      if (event && data) yield { event, data: JSON.parse(data) };
    }
    if (done) return;
  }
}

/**
 * Array of a npy file (version 1 to 3, little-endian float32 or float64, row-major), as the service sends it.
 * @param {ArrayBuffer} buffer @returns {{shape: number[], data: Float32Array | Float64Array}}
 */
export function decodeNpy(buffer) {
  const view = new DataView(buffer);
  const long = view.getUint8(6) > 1;
  const start = long ? 12 : 10;
  const end = start + (long ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = new TextDecoder().decode(buffer.slice(start, end));
  const dtype = /'descr': '<f([48])'/.exec(header)?.[1];
  if (!dtype || /'fortran_order': True/.test(header)) throw new Error(`the page does not read this npy header: ${header}`);
  const shape = (/'shape': \(([^)]*)\)/.exec(header)?.[1] ?? '').split(',').filter((part) => part.trim()).map(Number);
  return { shape, data: dtype === '4' ? new Float32Array(buffer, end) : new Float64Array(buffer, end) };
}

/** @param {string} text */
const shellQuote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/**
 * The same request as curl, Python (httpx) and JavaScript. A picture of the page is fetched from the service; another one is
 * read from picture.png or the like.
 * @param {ServiceRequest} request @param {string} base address of the service, ending in a slash
 * @param {boolean} withKey whether an API key is sent, which is then read from CORR2D_API_KEY
 */
export function snippets(request, base, withKey) {
  const address = url(request, base);
  const file = request.file && `picture.${request.file.type.split('/')[1]}`;
  const body = file ? '' : JSON.stringify(request.json);
  const accept = request.headers.Accept;
  const events = accept === 'text/event-stream';
  const binary = accept && !events ? (accept === 'image/png' ? 'output.png' : 'output.npy') : '';
  const headers = Object.entries(request.headers);
  const source = request.source ? base + request.source : '';
  const note = file && !source ? `Save the picture as ${file} first.` : '';
  const bearer = { sh: '-H "Authorization: Bearer $CORR2D_API_KEY"', py: 'os.environ["CORR2D_API_KEY"]', js: 'process.env.CORR2D_API_KEY' };
  const python = JSON.stringify(Object.fromEntries(headers)).replace(/}$/, withKey ? `, "Authorization": "Bearer " + ${bearer.py}}` : '}');
  const script = JSON.stringify(Object.fromEntries(headers)).replace(/}$/, withKey ? `,"Authorization":"Bearer " + ${bearer.js}}` : '}');
  return {
    curl: (note && `# ${note}\n`) + (source && `curl -g --no-progress-meter --fail ${shellQuote(source)} -o ${file} &&\n`) + [
      `curl -g --no-progress-meter ${binary ? '--fail' : '--fail-with-body'}${events ? ' -N' : ''} ${shellQuote(address)}`, ...headers.map(([name, value]) => `-H ${shellQuote(`${name}: ${value}`)}`),
      ...(withKey ? [bearer.sh] : []), file ? `--data-binary @${file}` : `-d ${shellQuote(body)}`, ...(binary ? [`-o ${binary}`] : []),
    ].join(' \\\n  '),
    python: [
      ...(withKey ? ['import os'] : []), ...(file || binary ? ['from pathlib import Path'] : []), ...(withKey || file || binary ? [''] : []),
      'import httpx', '',
      ...(note ? [`# ${note}`] : []),
      `body = ${source ? `httpx.get(${JSON.stringify(source)}).raise_for_status().content`
        : file ? `Path(${JSON.stringify(file)}).read_bytes()` : `r'''${body}'''`}`,
      `response = httpx.post(${JSON.stringify(address)}, content=body, headers=${python}).raise_for_status()`,
      binary ? `Path("${binary}").write_bytes(response.content)` : events ? 'print(response.text)' : 'print(response.json()["output"])',
    ].join('\n'),
    javascript: [
      ...(file || binary ? ['import { readFile, writeFile } from "node:fs/promises";', ''] : []),
      ...(note ? [`// ${note}`] : []),
      `const body = ${source ? `await (await fetch(${JSON.stringify(source)})).arrayBuffer()`
        : file ? `await readFile(${JSON.stringify(file)})` : `JSON.stringify(${body})`};`,
      `const response = await fetch(${JSON.stringify(address)}, { method: "POST", headers: ${script}, body });`,
      'if (!response.ok) throw new Error(await response.text());',
      binary ? `await writeFile("${binary}", Buffer.from(await response.arrayBuffer()));`
        : events ? 'console.log(await response.text());' : 'console.log(JSON.stringify((await response.json()).output));',
    ].join('\n'),
  };
}

/** The bar below the figures: what was sent, how the service computed it, errors, and the API key. */

/** @import {ServiceRequest} from './types.js' */
import { byId, h, input, toast } from './dom.js';
import * as format from './format.js';
import { apiKey, ServiceError, snippets } from './requests.js';

/** @type {ServiceRequest | null} */
let latest = null;
/** Requests that wait for an API key. @type {(() => void)[]} */
const retries = [];

/** @returns {string} address of the service, ending in a slash */
const base = () => new URL('.', document.baseURI).href;

/** Store a request, to be copied. @param {ServiceRequest} request */
export function remember(request) {
  latest = request;
  if (/** @type {HTMLDetailsElement} */ (byId('request')).open) drawSnippet();
}

function drawSnippet() {
  byId('snippet').textContent = latest ? snippets(latest, base(), apiKey.get() !== '').curl : '';
}

const errors = { service: '', page: '' };

/**
 * Show an error of the service, or one of the page (an invalid link or file); both can be shown at once.
 * @param {string} message '' removes it @param {'service'|'page'} [source]
 */
export function showError(message, source = 'service') {
  errors[source] = message;
  const text = [errors.page, errors.service].filter(Boolean).join(' ');
  byId('error').hidden = !text;
  if (byId('error').textContent !== text) byId('error').textContent = text;
}

/** Show the error of a request; 401 opens the dialog for an API key. @param {unknown} error @param {() => void} again called when a key is entered */
export function fail(error, again) {
  if (error instanceof DOMException && error.name === 'AbortError') return;
  showError(error instanceof Error ? error.message : String(error));
  byId('service').textContent = 'The service did not compute this.';
  if (!(error instanceof ServiceError) || error.status !== 401) return;
  retries.push(again);
  byId('key-error').hidden = !apiKey.get();
  const dialog = /** @type {HTMLDialogElement} */ (byId('key-dialog'));
  if (!dialog.open) dialog.showModal();
}

/**
 * Describe how a response was computed.
 * @param {(string | Node)[]} facts
 */
export function describe(facts) {
  byId('service').replaceChildren(...facts.flatMap((fact, index) => (index ? [' · ', fact] : [fact])));
}

/** @param {Response} response @param {number} started @returns {string} time of computing and of the whole request */
export function timing(response, started) {
  const compute = /compute;dur=([\d.]+)/.exec(response.headers.get('Server-Timing') ?? '')?.[1];
  const total = format.time(performance.now() - started);
  return Number(compute) > 0 ? `computed in ${format.time(Number(compute))}, received after ${total}` : `received after ${total}`;
}

/**
 * Engine and precision of a response.
 * @param {{engine: string, device: string, dtype: string, explanation?: {error_bound?: number}}} result
 */
export function engine({ engine: name, device, dtype, explanation }) {
  const bound = explanation?.error_bound;
  return [`Service: engine ${name} on ${device}, ${dtype}`, ...(bound == null ? [] : [`error at most ${format.number(bound, 2)}`])];
}

/** @param {string} where */
export const difference = (where) => `The service and this page differ ${where}. One of them has an error: please report it.`;

export const agreement = () => h('span', { class: 'good' }, 'agrees with this page ✓');

export function setUp() {
  for (const language of /** @type {const} */ (['curl', 'python', 'javascript']))
    byId(`copy-${language}`).addEventListener('click', async () => {
      if (!latest) return;
      const text = snippets(latest, base(), apiKey.get() !== '')[language];
      byId('snippet').textContent = text;
      await copy(text, 'Copied');
    });
  byId('request').addEventListener('toggle', drawSnippet);
  byId('key-dialog').addEventListener('close', (event) => {
    const dialog = /** @type {HTMLDialogElement} */ (event.target);
    if (dialog.returnValue === 'save') {
      apiKey.set(input('key').value.trim());
      for (const again of retries.splice(0)) again();
    }
    input('key').value = '';
  });
}

/** @param {string} text @param {string} message */
export async function copy(text, message) {
  try {
    await navigator.clipboard.writeText(text);
    toast(message);
  } catch {
    byId('snippet').textContent = text;
    /** @type {HTMLDetailsElement} */ (byId('request')).open = true;
    byId('snippet').textContent = text;
    toast('The browser does not allow copying: the text is shown below');
  }
}

/** The page: controls bound to the state, files, links. */

/** @import {State, Matrix} from './types.js' */
import { DEFAULT, MAX_SIDE, decode, encode, parseMatrix, VERSION } from './codec.js';
import { byId, h, input, select, toast } from './dom.js';
import * as figures from './figures.js';
import * as format from './format.js';
import { resize } from './geometry.js';
import * as learn from './learn.js';
import * as lessons from './lessons.js';
import * as picture from './picture.js';
import { grey, IMAGES, KERNELS, pixels } from './presets.js';
import { get, send } from './requests.js';
import * as service from './service.js';
import { changed, state, subscribe, update } from './store.js';

/** @typedef {{name: string, signature: string, description: string, example: string, kernel: Matrix}} NamedKernel */

const VIEWS = /** @type {const} */ (['convolve', 'learn', 'picture']);
/** @type {NamedKernel[]} */
let named = [];
/** @type {'input'|'target'|'picture'} */
let fileFor = 'input';

subscribe((now, before) => {
  if (changed(now, before, 'view', 'lesson', 'input', 'kernel')) service.showError('', 'page');
  if (changed(now, before, 'view', 'mode', 'boundary')) drawView(now);
  drawControls(now);
  learn.onChange(now, before);
  figures.draw(now, before);
  picture.onChange(now, before);
});

/** @param {State} now */
function drawView({ view, mode, boundary }) {
  for (const name of VIEWS) {
    byId(`tab-${name}`).setAttribute('aria-selected', String(name === view));
    byId(`tab-${name}`).tabIndex = name === view ? 0 : -1;
  }
  byId('panel').setAttribute('aria-labelledby', `tab-${view}`);
  for (const element of /** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll('[data-views]')))
    element.hidden = !element.dataset.views?.includes(view);
  byId('boundary-field').hidden = mode === 'valid';
  byId('fill-field').hidden = mode === 'valid' || boundary !== 'constant';
  byId('kernel-word').textContent = view === 'learn' ? 'Hidden kernel' : 'Kernel';
}

/** Values of the controls. @param {State} now */
function drawControls(now) {
  const kernel = now.kernelName ? `name:${now.kernelName.replace(/\(.*/, '')}`
    : Object.keys(KERNELS).find((name) => JSON.stringify(KERNELS[name].kernel) === JSON.stringify(now.kernel)) ?? '';
  const values = {
    image: now.image, kernel, mode: now.mode, boundary: now.boundary, fill: now.fill, stride: now.stride, dilation: now.dilation,
    operation: now.operation, picture: now.picture, show: now.show,
    'input-rows': now.input.length, 'input-columns': now.input[0].length,
    'kernel-rows': now.kernel.length, 'kernel-columns': now.kernel[0].length,
  };
  for (const [id, value] of Object.entries(values)) {
    const control = input(id);
    const isTyped = document.activeElement === control && control.tagName === 'INPUT';
    if (control.value !== String(value) && !isTyped) control.value = String(value);
  }
  drawArguments(now);
}

/** Inputs for the arguments of a named kernel. @param {State} now */
function drawArguments({ kernelName }) {
  const family = named.find(({ name }) => name === kernelName.replace(/\(.*/, ''));
  const container = byId('kernel-arguments');
  if (container.dataset.kernel === kernelName && kernelName) return;
  container.dataset.kernel = kernelName;
  const names = /\((.*)\)/.exec(family?.signature ?? '')?.[1].split(/[[\],\s]+/).filter(Boolean) ?? [];
  const given = /\((.*)\)/.exec(kernelName)?.[1].split(',') ?? [];
  if (container.contains(document.activeElement) && container.children.length === names.length) return;
  container.replaceChildren(...names.map((name, index) => h('label', {}, name, h('input', {
    type: 'number', step: 'any', class: 'narrow', value: given[index]?.trim() ?? '', id: `argument-${name}`,
    change: () => {
      const words = names.map((other) => input(`argument-${other}`).value);
      setKernel(`${family?.name}(${words.slice(0, words.findLastIndex((word) => word) + 1).join(', ')})`);
    },
  }))));
}

/** Set a kernel by name: its entries are those that the service uses. @param {string} name */
async function setKernel(name) {
  const example = named.find((kernel) => kernel.example === name);
  try {
    // A single 1, convolved: the output is the kernel itself.
    const request = { input: [[1]], kernel: name, mode: 'full', operation: 'convolve', dtype: 'float64' };
    const kernel = example?.kernel ?? (await (await send({
      path: 'correlate', query: {}, headers: { 'Content-Type': 'application/json' }, json: request, file: null,
    })).json()).output;
    service.showError('');
    update({ kernel, kernelName: name });
  } catch (error) {
    service.fail(error, () => setKernel(name));
  }
}

/** @param {Matrix} values */
const setInput = (values) => update({ input: values, image: '', ...(state.view === 'picture' && { view: 'convolve' }) });

/** @param {string} name */
async function setImage(name) {
  if (name === 'photo') {
    const bitmap = await createImageBitmap(await (await fetch('page/camera.jpg')).blob());
    update({ input: grey(pixels(bitmap, MAX_SIDE)), image: name });
  } else if (IMAGES[name]) update({ input: IMAGES[name].make(), image: name });
}

/** @param {Blob} file @param {string} [what] it is, in messages */
async function openFile(file, what = 'file') {
  try {
    if (!file.type.startsWith('image/')) {
      const matrix = parseMatrix(await file.text());
      if (fileFor === 'target') learn.setTarget(([rows, columns]) => resize(matrix, rows, columns));
      else setInput(matrix);
    } else if (fileFor === 'picture' || state.view === 'picture') picture.open(file);
    else {
      const bitmap = await createImageBitmap(file);
      const sample = (/** @type {[number, number]} */ size) => grey(pixels(bitmap, MAX_SIDE, size));
      if (fileFor === 'target') learn.setTarget((size) => sample(size).map((row) => row.map((value) => value / 255)));
      else setInput(grey(pixels(bitmap, MAX_SIDE)));
    }
    service.showError('', 'page');
  } catch (error) {
    const isDecoded = error instanceof Error && !(error instanceof DOMException);
    const reason = isDecoded ? error.message : 'it is not an image that the browser can read';
    service.showError(`The ${what} was not opened: ${reason}.`, 'page');
  }
}

/** Say why the value of a control is not used. @param {HTMLInputElement} control */
function reject(control) {
  toast(`${control.value && `“${control.value}”: `}${control.validationMessage || 'A number is needed.'}`);
}

function setUpControls() {
  select('image').append(...Object.entries(IMAGES).map(([value, { label }]) => h('option', { value }, label)),
    h('option', { value: 'photo' }, 'Photo, 64 × 64'), h('option', { value: '', hidden: true }, 'Own values'));
  const presets = Object.entries(KERNELS).map(([value, { label }]) => h('option', { value }, label));
  select('kernel').append(h('optgroup', { label: 'Presets' }, ...presets), h('option', { value: '', hidden: true }, 'Own values'));
  select('image').addEventListener('change', () => setImage(select('image').value));
  select('picture').addEventListener('change', () => update({ picture: /** @type {State['picture']} */ (select('picture').value) }));
  select('kernel').addEventListener('change', () => {
    const { value } = select('kernel');
    if (value.startsWith('name:')) setKernel(named.find(({ name }) => `name:${name}` === value)?.example ?? '');
    else if (KERNELS[value]) update({ kernel: KERNELS[value].kernel, kernelName: '' });
  });
  for (const field of /** @type {const} */ (['mode', 'boundary', 'operation', 'show', 'solver', 'start']))
    select(field).addEventListener('change', () => update({ [field]: select(field).value }));
  for (const field of /** @type {const} */ (['fill', 'stride', 'dilation', 'steps', 'noise']))
    input(field).addEventListener('change', () => {
      const control = input(field);
      if (control.value && control.checkValidity()) update({ [field]: Number(control.value) });
      else {
        reject(control);
        control.value = String(state[field]);
      }
    });
  for (const name of /** @type {const} */ (['input', 'kernel']))
    for (const side of ['rows', 'columns'])
      input(`${name}-${side}`).addEventListener('change', () => {
        const [rows, columns] = ['rows', 'columns'].map((word) => input(`${name}-${word}`));
        const preset = name === 'input' ? { image: '' } : { kernelName: '' };
        if (rows.value && columns.value && rows.checkValidity() && columns.checkValidity())
          update({ [name]: resize(state[name], Number(rows.value), Number(columns.value)), ...preset });
        else {
          reject(rows.validity.valid && rows.value ? columns : rows);
          [rows.value, columns.value] = [String(state[name].length), String(state[name][0].length)];
        }
      });
  byId('options').addEventListener('submit', (event) => event.preventDefault());
  for (const view of VIEWS) byId(`tab-${view}`).addEventListener('click', () => update({ view }));
  document.querySelector('[role=tablist]')?.addEventListener('keydown', (event) => {
    const move = { ArrowRight: 1, ArrowLeft: VIEWS.length - 1 }[/** @type {KeyboardEvent} */ (event).key];
    if (!move) return;
    const view = VIEWS[(VIEWS.indexOf(state.view) + move) % VIEWS.length];
    update({ view });
    byId(`tab-${view}`).focus();
  });
}

function setUpFiles() {
  for (const [id, use] of /** @type {const} */ ([['upload', 'input'], ['target-picture', 'target'], ['upload-picture', 'picture']]))
    byId(id).addEventListener('click', () => {
      fileFor = use;
      input('file').click();
    });
  input('file').addEventListener('change', () => {
    const file = input('file').files?.[0];
    if (file) openFile(file);
    input('file').value = '';
  });
  document.addEventListener('dragover', (event) => {
    event.preventDefault();
    document.body.classList.add('dropping');
  });
  document.addEventListener('dragleave', () => document.body.classList.remove('dropping'));
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    document.body.classList.remove('dropping');
    fileFor = event.target instanceof Element && event.target.closest('#figure-target') ? 'target' : 'input';
    const file = event.dataTransfer?.files[0];
    if (file) openFile(file);
  });
  document.addEventListener('paste', (event) => {
    if (event.target instanceof HTMLInputElement) return;
    fileFor = 'input';
    const file = event.clipboardData?.files[0];
    const text = event.clipboardData?.getData('text/plain');
    if (file) openFile(file);
    else if (text) openFile(new Blob([text], { type: 'text/plain' }), 'pasted text');
  });
}

/** Restore the state of the link. */
async function readLink() {
  const fragment = location.hash.slice(1);
  if (!/^v\d/.test(fragment)) return false;
  try {
    const found = await decode(fragment);
    update(found);
    if (found.image === 'photo') await setImage('photo');
    service.showError('', 'page');
  } catch (error) {
    service.showError(`The link could not be opened: ${error instanceof Error ? error.message : error}.`, 'page');
  }
  await lessons.show(false);
  return true;
}

async function begin() {
  setUpControls();
  setUpFiles();
  service.setUp();
  figures.setUp();
  learn.setUp(figures.drawNow);
  picture.setUp();
  byId('share').addEventListener('click', async () => {
    // A link contains no image: it names the photo of the page, and leaves out images of the reader's own.
    const fragment = await encode({
      ...state, ...(state.image === 'photo' && { input: DEFAULT.input }), ...(state.picture === 'own' && { picture: DEFAULT.picture }),
    });
    history.replaceState(null, '', `#${fragment}`);
    await service.copy(location.href, `Link copied, ${format.plural(location.href.length, 'character')}`);
  });
  addEventListener('hashchange', readLink);
  drawView(state);
  drawControls(state);
  figures.draw(state, { ...state, view: 'picture' });
  if (!location.hash.startsWith(`#${VERSION[0]}`) || !(await readLink())) await lessons.show(false);
  const load = async () => {
    try {
      named = (await get('kernels')).kernels;
      select('kernel').append(h('optgroup', { label: 'Kernels of the service' },
        ...named.map(({ name, description }) => h('option', { value: `name:${name}`, title: description }, name))));
      drawControls(state);
    } catch (error) {
      service.fail(error, load);
    }
  };
  await load();
}

begin();

/** A grid of numbers: ARIA grid with one tab stop, edited in place, painted by dragging. */

/** @import {Matrix, GridName, Cell} from './types.js' */
import { color, css, gradient, ink, scaleOf } from './colors.js';
import { byId, h, theme, toast } from './dom.js';
import * as format from './format.js';
import { shape } from './geometry.js';

/** Smallest cell, in px, that shows its number. */
const MIN_TEXT_CELL = 21;

/** Size of the text of cells, so that the longest number fits. @param {Matrix} values @param {number} size of a cell, px */
export function textSize(values, size) {
  const longest = values.reduce((most, row) => row.reduce((length, value) => Math.max(length, format.cell(value).length), most), 3);
  return Math.min(size * 0.36, (1.4 * size) / longest);
}

/**
 * @typedef {object} Handlers
 * @property {(row: number, column: number) => void} activate a cell is pointed at or focused
 * @property {(row: number, column: number, value: number) => void} [edit]
 * @property {() => number | null} [brush] value painted by dragging, or null
 */

export class Grid {
  /** @type {HTMLElement[][]} */
  #cells = [];
  /** @type {HTMLElement[]} */
  #lit = [];
  /** @type {Matrix} */
  values = [];
  /** The state in which each cell was drawn, so that only changed cells are drawn again. @type {WeakMap<HTMLElement, string>} */
  #stamps = new WeakMap();
  #key = '';
  #redraw = () => {};
  /** @type {Handlers['edit']} */
  #edit;
  #top = 0;
  #left = 0;
  #focus = /** @type {Cell} */ ([0, 0]);
  #isGhost = (/** @type {number} */ _row, /** @type {number} */ _column) => false;

  /** @param {GridName} name @param {string} label @param {Handlers} handlers */
  constructor(name, label, handlers) {
    this.name = name;
    this.label = label;
    this.handlers = handlers;
    this.root = byId(`grid-${name}`);
    const at = (/** @type {Event} */ event) => {
      const cell = event.target instanceof Element ? event.target.closest('.cell') : null;
      return cell instanceof HTMLElement ? /** @type {Cell} */ ([Number(cell.dataset.row), Number(cell.dataset.column)]) : null;
    };
    let isSecondTap = false;
    /** The last cell that was painted: a fast pointer skips those after it. */
    let painted = /** @type {Cell} */ ([0, 0]);
    const activate = (/** @type {Event} */ event) => {
      const cell = at(event);
      const element = cell && this.#element(cell);
      if (element) this.#name(element);
      if (cell) handlers.activate(...cell);
    };
    this.root.addEventListener('pointerover', activate);
    this.root.addEventListener('focusin', (event) => {
      const cell = at(event);
      if (cell) this.#setTabStop(cell);
      activate(event);
    });
    this.root.addEventListener('keydown', (event) => this.#onKey(event, at(event)));
    this.root.addEventListener('dblclick', (event) => this.#startEdit(at(event)));
    this.root.addEventListener('pointerdown', (event) => {
      const cell = at(event);
      if (!cell || event.button !== 0 || event.target instanceof HTMLInputElement) return;
      if (this.#paint(cell)) {
        painted = cell;
        this.root.setPointerCapture(event.pointerId);
        event.preventDefault();
      }
      const element = this.#element(cell);
      isSecondTap = event.pointerType === 'touch' && element === document.activeElement;
      element?.focus();
    });
    // A tap on the focused cell edits it: a touch screen has no Enter key.
    this.root.addEventListener('click', (event) => {
      if (isSecondTap) this.#startEdit(at(event));
    });
    this.root.addEventListener('pointermove', (event) => {
      if (!this.root.hasPointerCapture(event.pointerId)) return;
      const under = document.elementFromPoint(event.clientX, event.clientY);
      if (under instanceof HTMLElement && this.root.contains(under) && under.dataset.row) {
        const cell = /** @type {Cell} */ ([Number(under.dataset.row), Number(under.dataset.column)]);
        const [rows, columns] = [cell[0] - painted[0], cell[1] - painted[1]];
        const count = Math.max(Math.abs(rows), Math.abs(columns));
        for (let part = 1; part < count; part++)
          this.#paint([painted[0] + Math.round((rows * part) / count), painted[1] + Math.round((columns * part) / count)]);
        painted = cell;
        if (this.#paint(cell)) handlers.activate(...cell);
      }
    });
  }

  /**
   * Draw the input with its padding, or another matrix. `padding` is the number of rows above and columns left of the
   * input, and `inner` the size of the input.
   * @param {Matrix} values @param {number} size of a cell, px
   * @param {{padding?: Cell, inner?: Cell, scale?: import('./colors.js').Scale, empty?: string, readOnly?: boolean}} [options]
   */
  draw(values, size, { padding = [0, 0], inner, scale = scaleOf(values), empty = '', readOnly = false } = {}) {
    this.#redraw = () => this.draw(values, size, { padding, inner, scale, empty, readOnly });
    this.#edit = readOnly ? undefined : this.handlers.edit;
    const [rows, columns] = shape(values);
    const [height, width] = inner ?? [rows, columns];
    this.values = values;
    [this.#top, this.#left] = padding;
    this.#isGhost = (r, c) => r < 0 || c < 0 || r >= height || c >= width;
    const key = `${readOnly} ${rows} ${columns} ${padding} ${height} ${width}`;
    if (key !== this.#key || !rows || !columns) this.#build(rows, columns, empty);
    this.#key = key;
    this.root.style.setProperty('--cell', `${size}px`);
    this.root.style.setProperty('--text', `${Math.max(8, textSize(values, size)).toFixed(1)}px`);
    const small = size < MIN_TEXT_CELL;
    this.root.classList.toggle('small', small);
    const mode = theme();
    for (let r = 0; r < rows; r++)
      for (let c = 0; c < columns; c++) {
        const value = values[r][c];
        const element = this.#cells[r][c];
        const stamp = `${value} ${scale.kind} ${scale.high} ${mode} ${small}`;
        if (this.#stamps.get(element) === stamp) continue;
        this.#stamps.set(element, stamp);
        element.dataset.value = String(value);
        const background = color(value, scale, mode);
        element.style.backgroundColor = css(background);
        element.style.color = ink(background);
        element.textContent = small ? '' : format.cell(value);
        if (!small) this.#name(element);
      }
    this.#drawLegend(scale, rows * columns > 0);
  }

  /** @param {number} rows @param {number} columns @param {string} empty */
  #build(rows, columns, empty) {
    this.#lit = [];
    const focused = this.root.contains(document.activeElement);
    this.#cells = Array.from({ length: rows }, (_, r) => Array.from({ length: columns }, (_, c) => h('div', {
      role: 'gridcell', class: this.#isGhost(r - this.#top, c - this.#left) ? 'cell ghost' : 'cell', tabindex: -1,
      'data-row': r - this.#top, 'data-column': c - this.#left,
    })));
    if (rows && columns) {
      this.root.setAttribute('role', 'grid');
      this.root.setAttribute('aria-label', this.label);
      this.root.setAttribute('aria-readonly', String(!this.#edit));
      this.root.replaceChildren(...this.#cells.map((row) => h('div', { role: 'row', class: 'row' }, ...row)));
      this.#setTabStop(this.#element(this.#focus) ? this.#focus : [0, 0]);
      if (focused) this.#element(this.#focus)?.focus({ preventScroll: true });
    } else {
      this.root.removeAttribute('role');
      this.root.removeAttribute('aria-label');
      this.root.removeAttribute('aria-readonly');
      this.root.replaceChildren(h('p', { class: 'empty' }, empty));
    }
  }

  /** Name a cell. Small cells are named when they are pointed at or focused: there can be thousands of them. @param {HTMLElement} cell */
  #name(cell) {
    const { row, column, value } = cell.dataset;
    const ghost = cell.classList.contains('ghost') ? 'outside, ' : '';
    cell.setAttribute('aria-label', `${this.label}, ${ghost}row ${row}, column ${column}: ${format.number(Number(value))}`);
  }

  /** @param {import('./colors.js').Scale} scale @param {boolean} visible */
  #drawLegend(scale, visible) {
    const legend = byId(`legend-${this.name}`);
    const bar = h('i');
    bar.style.background = gradient(scale, theme());
    legend.replaceChildren(...(visible ? [format.number(scale.low, 3), bar, format.number(scale.high, 3)] : []));
  }

  /** @param {Cell} cell @returns {HTMLElement | undefined} */
  #element([row, column]) {
    return this.#cells[row + this.#top]?.[column + this.#left];
  }

  /** Mark the cells of a sum, and the cell that it explains. @param {Cell[]} cells @param {Cell | null} hot */
  light(cells, hot) {
    for (const element of this.#lit) element.classList.remove('lit', 'hot');
    this.#lit = [];
    const mark = (/** @type {Cell} */ cell, /** @type {string} */ name) => {
      const element = this.#element(cell);
      if (!element) return;
      element.classList.add(name);
      this.#lit.push(element);
    };
    for (const cell of cells) mark(cell, 'lit');
    if (hot) mark(hot, 'hot');
    this.root.classList.toggle('many', cells.length > 24);
  }

  /** @param {Cell} cell */
  #setTabStop(cell) {
    this.#element(this.#focus)?.setAttribute('tabindex', '-1');
    this.#focus = cell;
    this.#element(cell)?.setAttribute('tabindex', '0');
  }

  /** @param {Cell} cell @returns {boolean} whether the cell was painted */
  #paint(cell) {
    const value = this.handlers.brush?.() ?? null;
    if (value === null || this.#isGhost(...cell)) return false;
    this.#edit?.(...cell, value);
    return true;
  }

  /** @param {KeyboardEvent} event @param {Cell | null} cell */
  #onKey(event, cell) {
    if (!cell || event.target instanceof HTMLInputElement || event.altKey || event.metaKey) return;
    const [row, column] = cell;
    const [rows, columns] = shape(this.values);
    const [lastRow, lastColumn] = [rows - 1 - this.#top, columns - 1 - this.#left];
    /** @type {Record<string, Cell>} */
    const moves = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      Home: [event.ctrlKey ? -this.#top : row, -this.#left], End: [event.ctrlKey ? lastRow : row, lastColumn],
      PageUp: [-this.#top, column], PageDown: [lastRow, column],
    };
    if (moves[event.key]) {
      event.preventDefault();
      this.#element(moves[event.key])?.focus();
    } else if (event.ctrlKey) return;
    else if (event.key === 'Enter' || event.key === 'F2') {
      event.preventDefault();
      this.#startEdit(cell);
    } else if (event.key === ' ') {
      event.preventDefault();
      this.#paint(cell);
    } else if (/^[-\d.,]$/.test(event.key)) {
      event.preventDefault();
      this.#startEdit(cell, event.key);
    } else if (event.key === 'Delete' || event.key === 'Backspace') {
      if (!this.#isGhost(...cell)) this.#edit?.(...cell, 0);
    }
  }

  /** @param {Cell | null} cell @param {string} [typed] */
  #startEdit(cell, typed) {
    const element = cell && !this.#isGhost(...cell) && this.#edit && this.#element(cell);
    if (!cell || !element || this.handlers.brush?.() != null) return;
    const label = `Value of ${this.label}, row ${cell[0]}, column ${cell[1]}`;
    const field = h('input', { inputmode: 'decimal', 'aria-label': label, autocomplete: 'off' });
    field.value = typed ?? element.dataset.value ?? '';
    let open = true;
    const close = (/** @type {boolean} */ keep, /** @type {boolean} */ refocus) => {
      if (!open) return;
      open = false;
      const value = Number(field.value.replace(',', '.').replace('\u2212', '-'));
      this.#stamps.delete(element);
      const isNumber = field.value.trim() !== '' && Number.isFinite(value);
      if (keep && !isNumber) toast(`“${field.value}” is not a number such as 1.5 or -2e3: the cell keeps its value`);
      if (keep && isNumber && value !== Number(element.dataset.value)) this.#edit?.(...cell, value);
      else this.#redraw();
      if (refocus) this.#element(cell)?.focus();
    };
    field.addEventListener('keydown', (event) => {
      event.stopPropagation();
      if (event.key === 'Enter' || event.key === 'Escape') {
        event.preventDefault();
        close(event.key === 'Enter', true);
      }
    });
    field.addEventListener('blur', () => close(true, false));
    element.textContent = '';
    element.append(field);
    field.focus();
    if (typed === undefined) field.select();
  }
}

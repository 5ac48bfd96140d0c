/** State of the page: one object, replaced on every change, and the functions that draw it. */

/** @import {State} from './types.js' */
import { DEFAULT } from './codec.js';

/** @type {State} */
export let state = DEFAULT;

/** @type {((state: State, before: State) => void)[]} */
const listeners = [];

/** @param {(state: State, before: State) => void} listener called after every change */
export const subscribe = (listener) => void listeners.push(listener);

/** @param {Partial<State>} change */
export function update(change) {
  const before = state;
  state = { ...state, ...change };
  for (const listener of listeners) listener(state, before);
}

/**
 * Whether one of the fields changed.
 * @param {State} now @param {State} before @param {...keyof State} fields
 */
export const changed = (now, before, ...fields) => fields.some((field) => now[field] !== before[field]);

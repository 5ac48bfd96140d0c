/** Colour scales: diverging (blue, neutral, orange; safe for colour-blind readers) and grey for pictures. */

/** @import {Matrix} from './types.js' */
import { range, shape } from './geometry.js';

/** @typedef {[number, number, number]} Rgb */
/** @typedef {{kind: 'diverging'|'grey', low: number, high: number}} Scale */

/** @type {Record<'light'|'dark', {negative: Rgb[], positive: Rgb[]}>} from zero outwards */
const ENDS = {
  light: {
    negative: [[247, 246, 242], [168, 203, 230], [52, 120, 186]],
    positive: [[247, 246, 242], [249, 203, 148], [214, 112, 32]],
  },
  dark: {
    negative: [[38, 41, 46], [36, 92, 142], [116, 186, 244]],
    positive: [[38, 41, 46], [146, 80, 20], [255, 180, 92]],
  },
};

/** @param {Rgb[]} stops @param {number} position 0 to 1 @returns {Rgb} */
function interpolate(stops, position) {
  const scaled = Math.min(Math.max(position, 0), 1) * (stops.length - 1);
  const index = Math.min(Math.floor(scaled), stops.length - 2);
  const mix = scaled - index;
  return /** @type {Rgb} */ (stops[index].map((from, channel) => Math.round(from + mix * (stops[index + 1][channel] - from))));
}

/**
 * Scale of a matrix: grey for large matrices without negative values (pictures), diverging about 0 otherwise.
 * @param {Matrix} matrix @returns {Scale}
 */
export function scaleOf(matrix) {
  const [low, high] = range(matrix);
  const [rows, columns] = shape(matrix);
  if (low >= 0 && rows > 16 && columns > 16) return { kind: 'grey', low: 0, high: high || 1 };
  const size = Math.max(Math.abs(low), Math.abs(high)) || 1;
  return { kind: 'diverging', low: -size, high: size };
}

/** @param {number} value @param {Scale} scale @param {'light'|'dark'} theme @returns {Rgb} */
export function color(value, scale, theme) {
  if (!Number.isFinite(value)) return [214, 40, 40];
  if (scale.kind === 'grey') return interpolate([[0, 0, 0], [255, 255, 255]], (value - scale.low) / (scale.high - scale.low));
  return interpolate(value < 0 ? ENDS[theme].negative : ENDS[theme].positive, Math.abs(value) / scale.high);
}

/** @param {Rgb} rgb @returns {number} relative luminance of WCAG 2, 0 to 1 */
export function luminance(rgb) {
  const [red, green, blue] = rgb.map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

/** Text colour with the larger contrast: at least 4.5 to 1 on every background. @param {Rgb} background */
export const ink = (background) => (luminance(background) > 0.179 ? '#000' : '#fff');

/** @param {Rgb} rgb */
export const css = (rgb) => `rgb(${rgb.join(' ')})`;

/** CSS gradient of a scale, for its legend. @param {Scale} scale @param {'light'|'dark'} theme */
export function gradient(scale, theme) {
  const stops = Array.from({ length: 9 }, (_, index) => scale.low + (index / 8) * (scale.high - scale.low));
  return `linear-gradient(90deg, ${stops.map((value) => css(color(value, scale, theme))).join(', ')})`;
}

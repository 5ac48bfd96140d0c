/** Lessons: text files with a title, a state, paragraphs, and buttons that change the state. */

import { DEFAULT, checked } from './codec.js';
import { byId, h } from './dom.js';
import { state, update } from './store.js';

export const COUNT = 8;
const WELCOME = { title: byId('lesson-title').textContent ?? '', text: [...byId('lesson-text').childNodes] };

/**
 * Parse a lesson: `# title`, a line of JSON, paragraphs, and lines `* label: JSON`.
 * @param {string} source
 */
export function parse(source) {
  const [title, settings, ...rest] = source.trim().split('\n');
  const blocks = rest.join('\n').split(/\n\s*\n/).map((block) => block.trim().replace(/\n(?!\*)/g, ' ')).filter(Boolean);
  return {
    title: title.replace(/^# /, ''),
    state: checked(JSON.parse(settings)),
    paragraphs: blocks.filter((block) => !block.startsWith('* ')),
    actions: blocks.filter((block) => block.startsWith('* ')).flatMap((block) => block.split('\n')).map((line) => {
      const at = line.indexOf(': {');
      return { label: line.slice(2, at), change: checked(JSON.parse(line.slice(at + 2))) };
    }),
  };
}

/** Show the current lesson and the list of lessons. @param {boolean} reset apply its state */
export async function show(reset) {
  const number = state.lesson;
  byId('lesson-list').replaceChildren(...Array.from({ length: COUNT }, (_, index) => h('li', {}, h('button', {
    id: `lesson-${index + 1}`, 'aria-label': `Lesson ${index + 1}`, 'aria-current': index + 1 === number ? 'step' : undefined,
    click: () => open(index + 1),
  }, String(index + 1)))));
  if (number === 0) {
    byId('lesson-title').textContent = WELCOME.title;
    byId('lesson-text').replaceChildren(...WELCOME.text);
    byId('lesson-actions').replaceChildren(h('button', { id: 'lesson-begin', click: () => open(1) }, 'Begin the lessons'));
    return;
  }
  const response = await fetch(`page/lessons/${number}.md`);
  if (!response.ok || state.lesson !== number) return;
  const lesson = parse(await response.text());
  byId('lesson-title').textContent = `${number}. ${lesson.title}`;
  byId('lesson-text').replaceChildren(...lesson.paragraphs.map((text) => h('p', {}, ...inline(text))));
  byId('lesson-actions').replaceChildren(
    ...lesson.actions.map(({ label, change }) => h('button', { click: () => update(change) }, label)),
    ...(number < COUNT ? [h('button', { id: 'lesson-next', class: 'primary', click: () => open(number + 1) }, 'Next lesson')] : []),
  );
  if (reset) update({ ...DEFAULT, ...lesson.state, lesson: number });
}

/** @param {number} number */
export async function open(number) {
  update({ lesson: number });
  await show(true);
  byId('lesson-title').focus();
}

/** Text with `**strong**` and `` `code` ``. @param {string} text @returns {(Node | string)[]} */
const inline = (text) => text.split(/(\*\*[^*]+\*\*|`[^`]+`)/).map((part) =>
  part.startsWith('**') ? h('strong', {}, part.slice(2, -2)) : part.startsWith('`') ? h('code', {}, part.slice(1, -1)) : part);

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { DEFAULT } from '../../service/playground/static/codec.js';
import { DIVERGED, descend, ellipse, evaluate, initialKernel, leastSquares, random } from '../../service/playground/static/descent.js';
import { correlate } from '../../service/playground/static/geometry.js';

// Two rows of the d2l example; the expected numbers are those of POST /train-kernel (torch.optim).
const problem = { ...DEFAULT, input: DEFAULT.input.slice(0, 2) };
const fit = leastSquares(problem, correlate(problem));
const zeros = Float64Array.of(0, 0);
const near = (/** @type {number} */ left, /** @type {number} */ right) => assert.ok(Math.abs(left - right) < 1e-8 * Math.max(1, Math.abs(right)), `${left} is not ${right}`);

test('losses are those of torch.optim', () => {
  /** @type {[any, number[]][]} */
  const expected = [['momentum', [4, 2.56, 0.8464]], ['nesterov', [4, 1.5376, 0.1978470399999999]], ['adam', [4, 3.61000000095, 3.240599377734151]]];
  for (const [solver, losses] of expected) descend(fit, zeros, solver, 0.05, 2).losses.forEach((loss, step) => near(loss, losses[step]));
  near(descend(fit, zeros, 'sgd', 0.0999999, 1).losses[1], 1.4400019200006402);
});

test('the gradient is the slope of the loss', () => {
  const [at, small] = [Float64Array.of(0.3, -0.7), 1e-6];
  const { gradient } = evaluate(fit, at);
  for (const weight of [0, 1]) {
    const [up, down] = [1, -1].map((sign) => evaluate(fit, at.map((value, k) => value + (k === weight ? sign * small : 0))).loss);
    assert.ok(Math.abs((up - down) / (2 * small) - gradient[weight]) < 1e-5);
  }
});

test('a rate above the largest stable one ends the descent early', () => {
  const run = descend(fit, Float64Array.of(0.5, 0.5), 'sgd', 0.2, 2000);
  assert.ok(run.losses.length < 2000 && run.losses.at(-1) > DIVERGED * run.losses[0]);
  assert.equal(run.kernels.length, run.losses.length);
});

test('contours: curvatures are half of the largest and smallest eigenvalue, the centre is the best kernel', () => {
  const bowl = ellipse(fit);
  near(2 * bowl.along, 20);
  near(2 * bowl.across, 4);
  near(bowl.center[0], 1);
  near(bowl.center[1], -1);
  const flat = { ...DEFAULT, input: [[1, 1, 1, 1]] };
  const { across, center } = ellipse(leastSquares(flat, [[2, 2, 2]]));
  assert.equal(across, 0);
  near(center[0], 1);
  near(center[1], 1);
});

test('random numbers depend on the seed only', () => {
  assert.equal(random(3)(), random(3)());
  assert.notEqual(random(3)(), random(4)());
  const kernel = initialKernel(3, 3, 'random', 5);
  assert.ok(kernel.flat().every((value) => Math.abs(value) <= 1 / 3));
  assert.deepEqual(initialKernel(1, 2, 'zeros', 5), [[0, 0]]);
});

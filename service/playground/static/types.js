/**
 * Types shared by the modules of the page.
 *
 * @typedef {number[][]} Matrix
 * @typedef {'valid'|'same'|'full'} Mode
 * @typedef {'zeros'|'constant'|'replicate'|'reflect'|'symmetric'|'circular'} Boundary
 * @typedef {'correlate'|'convolve'} Operation
 * @typedef {'input'|'kernel'|'output'|'target'} GridName
 * @typedef {[number, number]} Cell row and column
 * @typedef {'sgd'|'momentum'|'nesterov'|'adam'|'exact'} Solver
 *
 * @typedef {object} Problem everything that determines the output
 * @property {Matrix} input
 * @property {Matrix} kernel
 * @property {Mode} mode
 * @property {Boundary} boundary
 * @property {number} fill value outside the input for boundary "constant"
 * @property {number} stride
 * @property {number} dilation
 * @property {Operation} operation
 *
 * @typedef {object} PageOptions
 * @property {'convolve'|'learn'|'picture'} view
 * @property {number} lesson 1 to 8, or 0
 * @property {string} image name of the preset that the input was taken from, or ''
 * @property {string} kernelName name for /correlate, such as "gaussian(1)", or '' for own values
 * @property {[GridName, number, number]} active cell whose sum is written out
 * @property {'kernel'|'own'} targetKind target of the fit: output of the kernel, or own values
 * @property {Matrix|null} target own values of the target
 * @property {number} noise standard deviation of the noise added to the target
 * @property {Solver} solver
 * @property {number|'auto'} rate
 * @property {number} steps
 * @property {'zeros'|'random'} start initial kernel
 * @property {number} seed seed of the initial kernel and of the noise
 * @property {'camera'|'rings'|'own'} picture
 * @property {'auto'|'scale'|'clip'|'signed'} show how the output of a picture is shown
 *
 * @typedef {Problem & PageOptions} State
 *
 * @typedef {object} ServiceRequest one request to the service, as it is sent and as it is copied
 * @property {string} path
 * @property {Record<string, string>} query
 * @property {Record<string, string>} headers
 * @property {unknown} json body as JSON, or undefined
 * @property {Blob|null} file body as a file, or null
 * @property {string} [source] path of this file, if the service has it
 *
 * @typedef {object} Forecast known before the first step of a fit
 * @property {number|null} learning_rate
 * @property {'converges'|'diverges'|null} prediction
 * @property {number|null} largest_stable_learning_rate
 * @property {number|null} best_possible_loss
 * @property {number|null} rank
 * @property {number} unknowns
 * @property {string} message
 *
 * @typedef {Forecast & {kernel: Matrix, loss_history: number[], final_loss: number, status: string, steps: number, solver: Solver}} Fit
 */
export {};

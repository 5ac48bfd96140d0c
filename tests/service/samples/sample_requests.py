"""Small valid requests that many tests send: the two d2l examples, and a body of /correlate."""

D2L_EXAMPLE = {"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "kernel": [[0, 1], [2, 3]]}
D2L_PAIR = {"input": [[1, 1, 0, 0, 0, 0, 1, 1]] * 6, "target": [[0, -1, 0, 0, 0, 1, 0]] * 6}
SMALL_BODY = b'{"input": [[1, 2], [3, 4]], "kernel": [[1]]}'

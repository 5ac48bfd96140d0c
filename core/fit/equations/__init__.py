"""Normal equations and triangular factors of the examples, and their solution."""

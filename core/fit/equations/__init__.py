"""Normal equations and QR factorizations of the examples, and their solution."""

"""Dense linear algebra in steps that can be interrupted: products, factorizations, eigenvalues and inverses."""

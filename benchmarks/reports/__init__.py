"""Reports of the benchmarks, as Markdown tables."""

"""Compilation of Halide pipelines in a child process, their cache on disk, and their loading and calls."""

"""Counters of a worker and their exposition."""

"""Admission, queues and threads for computations."""

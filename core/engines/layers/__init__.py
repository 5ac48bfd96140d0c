"""Engines for layers of many channels: each needs several files."""

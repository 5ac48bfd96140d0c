"""Endpoints, one module per resource, with its models."""

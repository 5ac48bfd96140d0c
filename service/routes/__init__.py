"""One file per resource, its models beside it."""

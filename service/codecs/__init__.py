"""Formats of request and response bodies, one module each; `registry` lists them."""

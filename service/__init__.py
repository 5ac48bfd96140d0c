"""corr2d over HTTP: parse, one call into core, encode."""

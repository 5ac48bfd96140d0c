"""Settings from flags and environment variables, the defaults that depend on the machine, and API keys."""

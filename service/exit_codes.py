"""Exit codes of the process; 0 is a requested stop."""

COMMAND_FAILED = 1
"""A command failed."""

INVALID_SETTINGS = 3
"""A setting is invalid, the port is in use, or the device is not available."""

WARM_UP_FAILED = 4
"""The warm-up computation failed or returned a wrong result."""

SUPERVISOR_LOST = 5
"""The supervisor of this worker has ended."""

"""What the process ends with, where that is not 0, for having been told to stop."""

COMMAND_FAILED = 1
"""A command that could not do what it was asked."""

INVALID_SETTINGS = 3
"""A setting that makes no sense, a port that is taken, a device that is not there."""

WARM_UP_FAILED = 4
"""The warm-up came out wrong: it would compute wrongly, or not at all."""

SUPERVISOR_LOST = 5
"""A worker whose supervisor is gone."""

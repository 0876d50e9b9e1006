"""Errors that a user can cause and repair.

Each message names what is wrong, where, what was expected, what was found, and the repair. Command lines catch
`InputError`, print its message without a traceback and exit with status 2.
"""


class InputError(ValueError):
    """An argument, a tensor or a file is not what the documented contract asks for."""


class ConfigError(InputError):
    """A configuration has one or more faults; the message lists all of them."""


class DataError(InputError):
    """An image, a shard, an index or a manifest is unreadable, damaged or inconsistent."""


class UnreachableError(DataError):
    """A remote place did not answer in all tries; what it holds may be whole."""


class TrainingError(RuntimeError):
    """A run cannot go on: a loss, an embedding or a gradient is not finite."""


class Interrupted(TrainingError):
    """A signal asked the run to end; its state is saved, and it can go on from there."""

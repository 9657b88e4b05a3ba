"""The errors of this library that have a name of their own; everything else is a plain TypeError or ValueError."""


class ShapeError(ValueError):
    """Sizes of tensors or options do not fit together."""


class BackendError(RuntimeError):
    """No backend, or not the one asked for, can run a call. The message holds every reason."""


class NotSavedError(OSError):
    """Something could not be written. The message says why, and which checkpoint is kept."""

"""The errors of this library that have a name of their own. All other errors are a plain TypeError or ValueError."""

__all__ = ["BackendError", "NotSavedError", "ShapeError"]


class ShapeError(ValueError):
    """The sizes of tensors or options do not fit together."""


class BackendError(RuntimeError):
    """No backend can run a call, or the one asked for cannot. The message lists every reason."""


class NotSavedError(OSError):
    """A file could not be written. The message gives the cause and names the checkpoint that is kept."""

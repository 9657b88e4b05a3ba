"""Retention in the place of attention: the operation, the layer, a language model, and the backends that run them."""

from .backends import register, unregister
from .errors import BackendError, ShapeError
from .functional import explain, initial_state, retain, step
from .layer import MultiScaleRetention, set_backend
from .model import RetNet
from .norm import set_norm_backend
from .state import RetentionState
from .version import __version__

__all__ = [
    "BackendError",
    "MultiScaleRetention",
    "RetNet",
    "RetentionState",
    "ShapeError",
    "__version__",
    "explain",
    "initial_state",
    "register",
    "retain",
    "set_backend",
    "set_norm_backend",
    "step",
    "unregister",
]

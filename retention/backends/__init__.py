"""The backends of `retain`, each in its own file or folder, and the registry that chooses between them."""

from ..call import FORMS, Backend, Call
from .registry import (
    Absent,
    _backends,  # noqa: F401 - for the tests
    check_name,
    choose,
    explain,
    found_by,
    load_plugins,
    names,
    register,
    unregister,
    why_not,
)

__all__ = [
    "FORMS",
    "Absent",
    "Backend",
    "Call",
    "check_name",
    "choose",
    "explain",
    "found_by",
    "load_plugins",
    "names",
    "register",
    "unregister",
    "why_not",
]

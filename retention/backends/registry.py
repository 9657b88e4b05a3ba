"""The registry of backends, and the choice of the one that runs a call.

A form is mathematics (parallel, chunkwise, recurrent); a backend is code that computes one or more forms. A backend is
one object with two methods: `why_not` says why it cannot run a call, `__call__` runs it. All backends compute

    out_n = scale sum over m of gamma^|t_n - t_m| (q_n . k_m) v_m

over the real tokens m of the segment of n, with m <= n if causal, and out_n = 0 where n is padding. On a grid the
tokens are the cells, row by row, and the distance of two cells is that in rows plus that in columns.
`retention.functional` checks the arguments and applies the normalisers for all backends.

To add a backend, write an object like those in this folder and `register` it, or name it in the entry-point group
`retention.backends` of your own distribution.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from ..call import Backend, Call
from ..errors import BackendError
from ..options import shown
from . import chunked, eager, fla, triton, xformers

__all__ = [
    "Absent",
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

# The forms that form="auto" tries, in order. `python -m benchmarks op` measures them, for grids `... vision`.
_PREFERRED = {
    "token": ("recurrent", "chunkwise", "parallel"),
    "small grid": ("parallel", "chunkwise"),
    "short": ("parallel", "chunkwise", "recurrent"),
    "sequence": ("chunkwise", "parallel", "recurrent"),
}
_SMALL_GRID = 24 * 24
_SHORT, _FEW_SCORES = 64, 2**19  # limits of a "short" call: tokens; query-key pairs of all heads and rows
_SHORT_BOTH_WAYS, _FEW_BOTH_WAYS = 200, 2**22  # the same without causality, where the chunkwise form loops twice


class Absent:
    """A backend that could not be loaded: it refuses every call with the reason.

    Args:
        reason: text for `explain` and errors.
        cause: the exception of the failed import, from which errors are raised.
    """

    def __init__(self, reason: str, cause: BaseException | None = None):
        self.reason, self.cause = reason, cause

    def why_not(self, call: Call) -> list[str]:
        return [self.reason]

    def __call__(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        raise BackendError(self.reason) from self.cause


# In order of preference. xformers is never faster than chunked, and eager can be differentiated any number of times.
# fla cannot say before a call that it lacks the gradient of log_decay.
_backends: dict[str, Backend] = {
    "triton": triton.backend,
    "chunked": chunked.backend,
    "eager": eager.backend,
    "xformers": xformers.backend,
    "fla": fla.backend,
}
_PLAIN = ("chunked", "eager")  # backends that torch.export records as plain torch operations
_plugins_loaded = False


def names() -> tuple[str, ...]:
    """Return the names of the registered backends, in order of preference."""
    load_plugins()
    return tuple(_backends)


def register(name: str, backend: Backend, *, before: str | None = None) -> None:
    """Add a backend, last in the order of preference or just before another.

    Args:
        name: a new name, not "auto".
        backend: an object with the methods of `retention.backends.Backend`.
        before: the name of the backend that it is to precede; default: it becomes the last.
    Raises: ValueError if the name is taken (`unregister` it first) or `before` is unknown; TypeError if an object lacks
        the methods.
    Examples:
        >>> import retention
        >>> from retention.backends.xformers import XFormers
        >>> retention.register("approximate", XFormers(eps=1e-4))
        >>> "approximate" in retention.backends.names()
        True
        >>> retention.unregister("approximate")
    """
    if not isinstance(name, str) or name in ("", "auto"):
        raise ValueError(f"name must be that of one backend, not 'auto'; got name {shown(name)}")
    if isinstance(backend, type) or not callable(backend) or not callable(getattr(backend, "why_not", None)):
        raise TypeError(f"backend must have the why_not and __call__ of `Backend`; got backend {shown(backend)}")
    if name in _backends:
        raise ValueError(f"backend names must be unique; got name {name!r} again; unregister it first")
    if before is not None and (not isinstance(before, str) or before not in _backends):
        raise ValueError(f"before must be one of {', '.join(_backends)}; got before {shown(before)}")
    after = {} if before is None else {n: _backends.pop(n) for n in list(_backends)[list(_backends).index(before) :]}
    _backends[name] = backend
    _backends.update(after)


def unregister(name: str) -> None:
    """Remove a backend.

    Args:
        name: the name of a registered backend.
    Raises: ValueError for an unknown name.
    Examples:
        >>> import retention
        >>> retention.unregister("xformers")
        >>> retention.register("xformers", retention.backends.xformers.backend)  # and back again
    """
    if not isinstance(name, str) or name not in _backends:
        raise ValueError(f"name must be one of {', '.join(_backends)}; got name {shown(name)}")
    del _backends[name]


def load_plugins() -> None:
    """Register the backends of other distributions, from the entry-point group `retention.backends`, once."""
    global _plugins_loaded
    if _plugins_loaded or torch.compiler.is_compiling():  # building a layer has loaded them before compilation
        return
    _plugins_loaded = True
    for plugin in entry_points(group="retention.backends"):
        if plugin.name in (*_backends, "auto"):
            warnings.warn(f"{plugin.value} is not used: there is a backend {plugin.name!r} already", stacklevel=2)
            continue
        try:
            register(plugin.name, plugin.load())
        except Exception as error:  # a plugin may fail in any way, which must not affect the other backends
            absent: Any = Absent(f"cannot be loaded ({type(error).__name__}: {error})", error)
            register(plugin.name, absent)


def choose(call: Call, backend: str = "auto") -> tuple[Backend, Call]:
    """Return the backend that runs `call`, and the call with a concrete form. A named backend never falls back.

    Args:
        call: the description of a call; its form may be "auto".
        backend: "auto" or a registered name.
    Raises: ValueError for an unknown name; BackendError, with every reason, if no backend can run the call.
    """
    check_name(backend)
    for _, candidate, asked, reasons in _answers(call, backend):
        if not reasons:
            return candidate, asked
    refusals = [f"  {name}, {asked.form}: {'; '.join(why)}" for name, _, asked, why in _answers(call, backend)]
    what = "no backend can" if backend == "auto" else f"backend {backend!r} cannot"
    cause = None if backend == "auto" else getattr(_backends[backend], "cause", None)
    raise BackendError("\n".join([f"{what} run {call}", *refusals])) from cause


def explain(call: Call, backend: str = "auto") -> str:
    """Return text with lines for the call, for every form and backend that `choose` would try, and for libraries.

    Raises: ValueError for an unknown name.
    """
    check_name(backend)
    lines, taken = [str(call)], False
    for name, _, asked, reasons in _answers(call, backend):
        answer = "cannot: " + "; ".join(reasons) if reasons else "can" if taken else "can, and is chosen"
        taken = taken or not reasons
        lines.append(f"  {asked.form:<10} {name:<10} {answer}")
    found = {name: found_by(name, call.device) for name in (names() if backend == "auto" else (backend,))}
    return "\n".join([*lines, *(f"  {name} found {text}" for name, text in found.items() if text)])


def found_by(backend: str, device: str) -> str | None:
    """Return the line of a backend on the library that it needs; None if it needs none or cannot use it."""
    found = getattr(_backends[backend], "found", None)
    return None if found is None else found(device)


def why_not(call: Call, backend: str) -> list[str]:
    """Return every reason why `backend` cannot run `call`, whose form is a concrete one; an empty list if it can.

    Raises: ValueError for an unknown name.
    """
    check_name(backend)
    return _backends[backend].why_not(call)


def check_name(backend: str) -> None:
    """Check that backend is "auto" or a registered name. Raises: ValueError if not."""
    load_plugins()
    if not isinstance(backend, str) or (backend != "auto" and backend not in _backends):
        raise ValueError(f"backend must be 'auto' or one of {', '.join(_backends)}; got backend {shown(backend)}")


def _kind(call: Call) -> str:
    """Return the key of `_PREFERRED` for a call with form "auto"."""
    if call.length == 1 and (call.has_state or call.return_state):
        return "token"
    if call.grid is not None:
        return "small grid" if isinstance(call.length, int) and call.length <= _SMALL_GRID else "sequence"
    if call.packed or torch.compiler.is_exporting():  # an exported program must suit all lengths
        return "sequence"
    both_ways = not call.causal and not call.masked  # a mask costs the parallel form a decay matrix per row
    short, few = (_SHORT_BOTH_WAYS, _FEW_BOTH_WAYS) if both_ways else (_SHORT, _FEW_SCORES)
    return "short" if call.length <= short and call.batch * call.heads * call.length**2 <= few else "sequence"


def _answers(call: Call, backend: str) -> Iterator[tuple[str, Backend, Call, list[str]]]:
    """Yield each backend and form to try, in order, with the reasons why it cannot run the call."""
    for form in _PREFERRED[_kind(call)] if call.form == "auto" else (call.form,):
        asked = call if call.form == form else call._replace(form=form)
        for name in _candidates(backend):
            yield name, _backends[name], asked, _backends[name].why_not(asked)


def _candidates(backend: str) -> Iterable[str]:
    """Return the names of the backends to try, in order."""
    if backend != "auto":
        return (backend,)
    if torch.compiler.is_exporting():  # operators of other backends are unknown where the program runs
        return dict.fromkeys((*(name for name in _PLAIN if name in _backends), *_backends))
    return _backends

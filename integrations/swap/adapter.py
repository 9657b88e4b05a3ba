"""The `Adapter` interface, which tells how a class of attention is replaced, and the registry of adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from retention.options import check_is, check_whole, shown

__all__ = ["Adapter", "Heads", "find_adapter", "full_name", "register_adapter", "register_recogniser"]

# The integration that registers the adapters for a library's models; imported when the first such model is given.
_INTEGRATIONS = {"timm": "timm", "torch": "torch_nn", "transformers": "transformers"}


@dataclass(frozen=True)
class Heads:
    """The sizes of the heads of an attention layer.

    Args:
        dim: width of the layer's input.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads.
        key_dim, value_dim: channels of one head of q and k, and of v.
    Raises: TypeError or ValueError unless all are whole numbers of at least 1.
    Example:
        Heads(dim=64, num_heads=4, num_kv_heads=2, key_dim=16, value_dim=16)
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            check_whole(name, size)


class Adapter:
    """Tells how retention replaces the softmax in one class of attention.

    A subclass must define `heads` and `forward`; the other methods have defaults. One adapter serves all layers of its
    class and keeps no state of its own.

    Example:
        class MyAdapter(Adapter):
            def heads(self, attention):
                return Heads(dim=64, num_heads=4, num_kv_heads=4, key_dim=16, value_dim=16)

            def forward(self, attention, host_forward, x):
                q, k, v = attention.project(x)  # (B, H, T, K) each
                y, _ = attention.retention(x, q, k, v, scale=16**-0.5)
                return attention.c_proj(y.flatten(2))

        register_adapter(MyAttention, MyAdapter())
    """

    def heads(self, attention: Any) -> Heads:
        """Return the sizes of the layer's heads."""
        raise NotImplementedError

    def forward(self, attention: Any, host_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the layer with `attention.retention` in place of its softmax.

        Args:
            attention: the replaced layer; its child `retention` is a `HostedRetention`.
            host_forward: the forward of the original class, bound to the layer.
            args, kwargs: the arguments of the layer's call.
        Returns: the output in the form in which the original forward returns it.
        """
        raise NotImplementedError

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        """List every reason why the layer cannot be replaced in `model`; an empty list allows the replacement."""
        return []

    def lost(self, attention: Any) -> list[str]:
        """List the layer's features that retention does not have, such as a sliding window.

        Such a layer is replaced only with allow_lost=True. Dropout of the attention weights is not listed: retention
        has no counterpart, but dropout does not change the output in evaluation mode.
        """
        return []

    def both_ways(self, attention: Any) -> bool:
        """Tell whether the layer is known, before any call, to let tokens attend to later tokens."""
        return False

    def reset(self, attention: Any, model: nn.Module) -> None:
        """Draw new weights for the layer, which is a copy of a layer of `model`.

        The default calls `reset_parameters` of the layer and of its children.
        Raises: ValueError if a module with parameters has no `reset_parameters`.
        """
        for name, module in attention.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif any(True for _ in module.parameters(recurse=False)):
                where = f"{type(attention).__name__}.{name}".rstrip(".")
                raise ValueError(f'init="fresh" needs a reset_parameters of {where}, or a reset of the adapter')

    def attach(self, model: Any) -> None:
        """Prepare the whole model, wrappers included, after layers in it were replaced.

        The call is repeated when more layers of the model are replaced.
        """

    def detach(self, model: Any) -> None:
        """Undo `attach`. If some layers stay replaced, `attach` is called after it."""


_Recogniser = Callable[[type[nn.Module]], Adapter | None]

_adapters: dict[str, Adapter] = {}  # keys: full names of classes
_recognisers: list[_Recogniser] = []
_found: dict[type[nn.Module], Adapter | None] = {}  # the answers of `find_adapter` so far


def register_adapter(attention: type[nn.Module] | str, adapter: Adapter) -> None:
    """Let `replace_attention` replace modules of exactly this class.

    Args:
        attention: the class, or its full name "package.module.Class"; a class that is given by name need not be
            imported.
        adapter: an instance of a subclass of `Adapter`.
    Raises: ValueError if the class has a registered adapter; TypeError if `attention` is not a module class or a name,
        or `adapter` is not an `Adapter`.
    Example:
        register_adapter(CausalSelfAttention, NanoGPTAttention())
    """
    check_is("adapter", adapter, Adapter, "an Adapter")
    if not isinstance(attention, str) and not (isinstance(attention, type) and issubclass(attention, nn.Module)):
        raise TypeError(f"attention must be a class of modules, or its full name; got attention {shown(attention)}")
    name = attention if isinstance(attention, str) else full_name(attention)
    if name in _adapters:
        raise ValueError(f"{name} has an adapter already, {_adapters[name]!r}")
    _adapters[name] = adapter
    _found.clear()


def register_recogniser(recogniser: _Recogniser) -> None:
    """Register a function that finds the adapter of a class without a registered one.

    Args:
        recogniser: takes a module class; returns its adapter, or None for a class that it does not know. Recognisers
            are asked in the order of their registration.
    Raises: TypeError if `recogniser` is not callable.
    """
    check_is("recogniser", recogniser, Callable, "a function of a class")
    _recognisers.append(recogniser)
    _found.clear()


def find_adapter(kind: type[nn.Module]) -> Adapter | None:
    """Return the adapter of a class of modules, or None if it has none.

    The integration for the class's library (timm, torch or transformers) is imported first.
    """
    if kind not in _found:
        library = kind.__module__.partition(".")[0]
        if library in _INTEGRATIONS:
            import_module(f"..{_INTEGRATIONS[library]}", __package__)
        recognised = (adapter for recognise in _recognisers if (adapter := recognise(kind)) is not None)
        _found[kind] = _adapters.get(full_name(kind)) or next(recognised, None)
    return _found[kind]


def full_name(kind: type) -> str:
    """Return "package.module.Class", the name under which adapters are registered."""
    return f"{kind.__module__}.{kind.__qualname__}"

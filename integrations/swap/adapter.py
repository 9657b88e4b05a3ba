"""How retention is put into one class of attention: the interface `Adapter`, and which class has which adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from retention.options import check_is, check_whole, shown

# Integrations that bring adapters, by the library whose models they are for; imported when such a model comes.
_INTEGRATIONS = {"timm": "timm", "torch": "torch_nn", "transformers": "transformers"}


@dataclass(frozen=True)
class Heads:
    """What retention needs to know of an attention layer. dim: of its input; key_dim, value_dim: of one head."""

    dim: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            check_whole(name, size)


class Adapter:
    """How retention takes the place of the softmax in one class of attention. `heads` and `forward` are needed."""

    def heads(self, attention: Any) -> Heads:
        """The sizes of the layer."""
        raise NotImplementedError

    def forward(self, attention: Any, host_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer's forward, with `attention.retention` where the softmax was; host_forward: its own, bound to it."""
        raise NotImplementedError

    def why_not(self, attention: Any, model: nn.Module) -> list[str]:
        """Every reason why it cannot be replaced in `model`; none if it can."""
        return []

    def lost(self, attention: Any) -> list[str]:
        """What the layer does that retention will not do, such as a sliding window.

        Not dropout of the attention weights, which has no counterpart but changes nothing of what a model computes.
        """
        return []

    def both_ways(self, attention: Any) -> bool:
        """Whether it is known before any call that tokens also see those after them."""
        return False

    def reset(self, attention: Any, model: nn.Module) -> None:
        """Give the layer, which `model` has a twin of, new weights.

        Raises: ValueError if it is not known how.
        """
        for name, module in attention.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif any(True for _ in module.parameters(recurse=False)):
                where = f"{type(attention).__name__}.{name}".rstrip(".")
                raise ValueError(f'init="fresh" needs a reset_parameters of {where}, or a reset of the adapter')

    def attach(self, model: Any) -> None:
        """Let the model around the layers know, once they are replaced: the whole model, wrappers and all.

        It is called again when more layers of the model are replaced.
        """

    def detach(self, model: Any) -> None:
        """Undo `attach`. If some layers stay replaced, `attach` is called after it."""


Recogniser = Callable[[type[nn.Module]], Adapter | None]

_adapters: dict[str, Adapter] = {}  # by the full name of the class
_recognisers: list[Recogniser] = []
_found: dict[type[nn.Module], Adapter | None] = {}  # what `find_adapter` has answered


def register_adapter(attention: type[nn.Module] | str, adapter: Adapter) -> None:
    """Let `replace_attention` replace modules of exactly this class.

    attention: the class, or its full name, "package.module.Class", which need not be imported.
    Raises: ValueError if it has an adapter; TypeError for what is no class or no adapter.
    """
    check_is("adapter", adapter, Adapter, "an Adapter")
    if not isinstance(attention, str) and not (isinstance(attention, type) and issubclass(attention, nn.Module)):
        raise TypeError(f"attention must be a class of modules, or its full name; got attention {shown(attention)}")
    name = attention if isinstance(attention, str) else full_name(attention)
    if name in _adapters:
        raise ValueError(f"{name} has an adapter already, {_adapters[name]!r}")
    _adapters[name] = adapter
    _found.clear()


def register_recogniser(recogniser: Recogniser) -> None:
    """Let `recogniser` name the adapter of a class that has none registered; None is for what it does not know."""
    check_is("recogniser", recogniser, Callable, "a function of a class")
    _recognisers.append(recogniser)
    _found.clear()


def find_adapter(kind: type[nn.Module]) -> Adapter | None:
    """The adapter of a class of modules; None if it has none."""
    if kind not in _found:
        library = kind.__module__.partition(".")[0]
        if library in _INTEGRATIONS:
            import_module(f"..{_INTEGRATIONS[library]}", __package__)
        recognised = (adapter for recognise in _recognisers if (adapter := recognise(kind)) is not None)
        _found[kind] = _adapters.get(full_name(kind)) or next(recognised, None)
    return _found[kind]


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

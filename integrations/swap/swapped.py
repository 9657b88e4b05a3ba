"""Replaced attention layers: the same object, of a class derived from its original class."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from .adapter import Adapter, find_adapter, full_name
from .retention import HostedRetention

__all__ = ["Swapped", "adapter_of", "replaced_by", "swapped_class"]


class Swapped:
    """Mixin of the class of a replaced attention layer.

    Attributes:
        host: the original class of the layer.
        adapter: the adapter of that class.
        retention: the `HostedRetention` that replaces the softmax.
    Raises: RuntimeError in `forward` if the child `retention` was deleted.
    """

    host: type[nn.Module]
    adapter: Adapter
    retention: HostedRetention

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle cannot import a class that is created at run time
        host: Any = self.host
        own: Any = type(self)
        return (_blank, (host,), self.__dict__) if own is swapped_class(host) else super().__reduce_ex__(protocol)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the adapter's forward; arguments and output are those of the original class."""
        if "retention" not in self.__dict__["_modules"]:
            raise RuntimeError("this layer was replaced, and its child `retention` is gone; call restore_attention")
        host_forward = self.host.forward.__get__(self)
        return self.adapter.forward(self, host_forward, *args, **kwargs)


@cache
def swapped_class(host: type[nn.Module]) -> type[nn.Module]:
    """Return the class of replaced layers whose original class is `host`; there is one for each host.

    Raises: TypeError if `host` has no adapter.
    """
    adapter = find_adapter(host)
    if adapter is None:
        raise TypeError(f"{full_name(host)} has no adapter; register_adapter adds one")
    own = {"host": host, "adapter": adapter, "__module__": __name__}
    return type(f"Retention{host.__name__}", (Swapped, host), own)


def _blank(host: Any) -> nn.Module:
    kind = swapped_class(host)
    return kind.__new__(kind)


def adapter_of(attention: Any) -> Adapter | None:
    """Return the adapter of a module, replaced or not; None if it has none."""
    return attention.adapter if isinstance(attention, Swapped) else find_adapter(type(attention))


def replaced_by(adapter: Adapter, model: nn.Module) -> dict[str, Any]:
    """Return the replaced layers of `model` that use this adapter, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Swapped) and m.adapter is adapter}

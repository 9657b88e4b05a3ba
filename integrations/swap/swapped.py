"""An attention layer that has been replaced: the object it was, of a class derived from its own."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from .adapter import Adapter, find_adapter, full_name
from .retention import HostedRetention


class Swapped:
    """Mixed into the class of an attention layer that has been replaced.

    host: the class that the layer had. adapter: that of the host.
    """

    host: type[nn.Module]
    adapter: Adapter
    retention: HostedRetention

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle does not find a class that was made
        host: Any = self.host
        own: Any = type(self)
        return (_blank, (host,), self.__dict__) if own is swapped_class(host) else super().__reduce_ex__(protocol)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "retention" not in self.__dict__["_modules"]:
            raise RuntimeError("this layer was replaced, and its child `retention` is gone; call restore_attention")
        host_forward = self.host.forward.__get__(self)
        return self.adapter.forward(self, host_forward, *args, **kwargs)


@cache
def swapped_class(host: type[nn.Module]) -> type[nn.Module]:
    """The class that a layer of class `host` gets, one for each host. Raises: TypeError if `host` has no adapter."""
    adapter = find_adapter(host)
    if adapter is None:
        raise TypeError(f"{full_name(host)} has no adapter; register_adapter adds one")
    own = {"host": host, "adapter": adapter, "__module__": __name__}
    return type(f"Retention{host.__name__}", (Swapped, host), own)


def _blank(host: Any) -> nn.Module:
    kind = swapped_class(host)
    return kind.__new__(kind)


def adapter_of(attention: Any) -> Adapter | None:
    """The adapter of a module, replaced or not; None if it has none."""
    return attention.adapter if isinstance(attention, Swapped) else find_adapter(type(attention))


def replaced_by(adapter: Adapter, model: nn.Module) -> dict[str, Any]:
    """The replaced layers of `model` that this adapter is for, by their names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Swapped) and m.adapter is adapter}

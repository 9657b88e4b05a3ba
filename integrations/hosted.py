"""The former place of `Heads` and `HostedRetention`, now in `retention.integrations.swap`; removed in 0.2."""

from .swap import Heads, HostedRetention

__all__ = ["Heads", "HostedRetention"]

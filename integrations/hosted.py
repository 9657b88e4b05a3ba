"""The former place of `Heads` and `HostedRetention`, which are in `retention.integrations.swap`; gone in 0.2."""

from .swap import Heads, HostedRetention

__all__ = ["Heads", "HostedRetention"]

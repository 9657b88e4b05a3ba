"""The former place of `Heads` and `HostedRetention`, now in `retention.integrations.swap`; removed in 0.2."""

from .renamed import former_names

__getattr__ = former_names(
    __name__, {name: f"retention.integrations.swap:{name}" for name in ("Heads", "HostedRetention")}
)

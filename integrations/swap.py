"""Put retention where the attention of an existing model is, and take it out again.

An attention module stays the object it is, with its projections under their own names. It gets one new child,
`retention`, and a class derived from its own that runs it. Checkpoints, optimisers, hooks and LoRA go on as before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

from retention.arguments import check_choice

from .hosted import Heads, HostedRetention

# Integrations that bring adapters, by the library whose models they are for; imported when such a model comes.
_INTEGRATIONS = {"timm": "timm", "torch": "torch_nn", "transformers": "transformers"}


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
        """Let the model around the layers know, once they are replaced."""

    def detach(self, model: Any) -> None:
        """Undo `attach`."""


_adapters: dict[str, Adapter] = {}  # by the full name of the class


def register_adapter(attention: type[nn.Module] | str, adapter: Adapter) -> None:
    """Let `replace_attention` replace modules of exactly this class.

    attention: the class, or its full name, "package.module.Class", which need not be imported.
    Raises: ValueError if it has an adapter.
    """
    name = attention if isinstance(attention, str) else _full_name(attention)
    if name in _adapters:
        raise ValueError(f"{name} has an adapter already, {_adapters[name]!r}")
    _adapters[name] = adapter


@dataclass
class Place:
    """An attention layer of a model. names: all it goes by. kept: why it is not replaced. lost: see `Adapter.lost`."""

    names: list[str]
    attention: nn.Module
    kept: str = ""
    lost: list[str] = field(default_factory=list)


@dataclass
class SwapReport:
    """What `replace_attention` did, or would do: names of layers, and the numbers of parameters."""

    replaced: list[str]
    kept: dict[str, str]
    lost: dict[str, list[str]]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        lines = [f"retention in {len(self.replaced)} layers: {', '.join(self.replaced) or 'none'}"]
        lines += [f"kept {name}: {why}" for name, why in self.kept.items()]
        lines += [f"lost in {name}: {', '.join(what)}" for name, what in self.lost.items()]
        return "\n".join([*lines, f"parameters: {self.parameters_before:,} before, {self.parameters_after:,} after"])


class Swapped:
    """Mixed into the class of an attention layer that has been replaced. `host` is the class that it had."""

    host: type[nn.Module]
    retention: HostedRetention

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle does not find a class that was made
        host: Any = self.host
        own: Any = type(self)
        return (_blank, (host,), self.__dict__) if own is swapped_class(host) else super().__reduce_ex__(protocol)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        host_forward = self.host.forward.__get__(self)
        return adapter_of(self).forward(self, host_forward, *args, **kwargs)


@cache
def swapped_class(host: type[nn.Module]) -> type[nn.Module]:
    """The class that a layer of class `host` gets, one for each host."""
    return type(f"Retention{host.__name__}", (Swapped, host), {"host": host, "__module__": __name__})


def _blank(host: Any) -> nn.Module:
    kind = swapped_class(host)
    return kind.__new__(kind)


def replace_attention(
    model: nn.Module,
    *,
    layers: Iterable[int] | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    init: str = "copy",
    calibrate_on: Mapping[str, Any] | None = None,
    allow_lost: bool = False,
    **options: Any,
) -> SwapReport:
    """Put retention into the attention layers of `model`, in place.

    layers: which, counted from 0 over all that have an adapter, negative from the end. where: name and module to
        whether. Both given: both must hold; none: all.
    init: "copy" keeps the weights of the layers, the projections above all; "fresh" gives them new ones, and what
        they were is gone.
    calibrate_on: a batch, keyword arguments of `model`: one pass of it brings the output of each new head to the size
        of its attention's. In this pass every layer sees what it would see in the model as it was. Not for "fresh".
    allow_lost: replace layers too that do what retention will not do, such as looking at a window only.
    options: of `HostedRetention`, the same for all layers.
    Twice the same is once. Nothing is touched unless everything can be done.
    Raises: ValueError if nothing matches, or if a layer that is asked for cannot be replaced, or has been with other
        options; the text says why, and what attention there is.

    The projections, norms and biases carry over exactly. The softmax does not: train the model afterwards.
    """
    check_choice("init", init, ("copy", "fresh"))
    if init == "fresh" and calibrate_on is not None:
        raise ValueError('calibrate_on needs init="copy"; fresh weights have no attention to be as large as')
    report, chosen = _planned(model, layers, where, allow_lost, options)
    new = [place.attention for place in chosen if not isinstance(place.attention, Swapped)]
    built = [_build(attention, options) for attention in new]
    weights = [_fresh_weights(attention, model) for attention in new] if init == "fresh" else []
    for attention, fresh in zip(new, weights, strict=False):
        attention.load_state_dict(fresh)
    for attention, retention in zip(new, built, strict=True):
        attention.retention = retention
        host: Any = type(attention)
        attention.__class__ = swapped_class(host)
    for adapter in {adapter_of(attention) for attention in new}:
        adapter.attach(model)
    if calibrate_on is not None:
        _calibrate(model, new, built, calibrate_on)
    return report


def plan_replacement(
    model: nn.Module,
    *,
    layers: Iterable[int] | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    allow_lost: bool = False,
    **options: Any,
) -> SwapReport:
    """What `replace_attention` would do, without doing it. The same arguments and errors."""
    return _planned(model, layers, where, allow_lost, options)[0]


def restore_attention(model: nn.Module) -> list[str]:
    """Take the retention out of `model` again, in place; the attention layers are what they were.

    What training or `init="fresh"` has done to their projections stays.
    Returns: the names of the layers. Raises: ValueError if there are none.
    """
    found = [place for place in _places(model) if isinstance(place.attention, Swapped)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention that was replaced by retention")
    _restore(model, [place.attention for place in found])
    return [place.names[0] for place in found]


def _restore(model: nn.Module, replaced: Sequence[Any]) -> None:
    adapters = {adapter_of(attention) for attention in replaced}
    for adapter in adapters:
        adapter.detach(model)
    for attention in replaced:
        del attention.retention
        attention.__class__ = attention.host
    for adapter in adapters:
        if replaced_by(adapter, model):
            adapter.attach(model)


@torch.no_grad()
def _calibrate(model: nn.Module, new: Sequence[nn.Module], built: Sequence[HostedRetention], batch: Any) -> None:
    """See `replace_attention`. If the pass fails, the layers are what they were."""
    for retention in built:
        retention.calibrating = True
    try:
        model(**batch)
    except BaseException:
        _restore(model, new)
        raise
    finally:
        for retention in built:
            retention.calibrating = False


def _planned(
    model: nn.Module,
    layers: Iterable[int] | None,
    where: Callable[[str, nn.Module], bool] | None,
    allow_lost: bool,
    options: dict[str, Any],
) -> tuple[SwapReport, list[Place]]:
    places = _places(model)
    if not places:
        raise ValueError(_nothing_found(model))
    wanted = None if layers is None else _indices(layers, len(places))
    chosen = []
    for i, place in enumerate(places):
        if (wanted is not None and i not in wanted) or (
            where and not any(where(n, place.attention) for n in place.names)
        ):
            place.kept = "not asked for"
            continue
        place.kept = _objections(model, place, allow_lost, options)
        chosen.append(place)
    refused = {place.names[0]: place.kept for place in chosen if place.kept}
    if refused:
        raise ValueError("nothing was replaced, because\n" + "\n".join(f"  {n}: {why}" for n, why in refused.items()))
    if not chosen:
        names = ", ".join(place.names[0] for place in places)
        raise ValueError(f"layers and where leave nothing to replace; the model has {names}")
    before = sum(p.numel() for p in model.parameters())
    new = (
        _build(place.attention, options, device="meta") for place in chosen if not isinstance(place.attention, Swapped)
    )
    report = SwapReport(
        [place.names[0] for place in chosen],
        {place.names[0]: place.kept for place in places if place.kept},
        {place.names[0]: place.lost for place in chosen if place.lost},
        before,
        before + sum(p.numel() for module in new for p in module.parameters()),
    )
    return report, chosen


def _places(model: nn.Module) -> list[Place]:
    """All layers that have an adapter, in the model's order; a module under several names is one layer."""
    for library in {type(module).__module__.partition(".")[0] for module in model.modules()} & _INTEGRATIONS.keys():
        import_module(f".{_INTEGRATIONS[library]}", __package__)
    found: dict[int, Place] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Swapped) or _full_name(type(module)) in _adapters:
            found.setdefault(id(module), Place([], module)).names.append(name)
    return list(found.values())


def _indices(layers: Iterable[int], count: int) -> set[int]:
    given = list(layers)
    wrong = [i for i in given if not -count <= i < count]
    if wrong:
        raise ValueError(f"layers must be from {-count} to {count - 1}; got {wrong[0]}")
    return {i % count for i in given}


def _objections(model: nn.Module, place: Place, allow_lost: bool, options: dict[str, Any]) -> str:
    """What stands against replacing a layer; empty if nothing does."""
    attention = place.attention
    if isinstance(attention, Swapped):
        there = attention.retention.options
        other = there != _build(attention, options, device="meta").options
        return f"has retention already, with other options, {there}; restore_attention first" if other else ""
    adapter = adapter_of(attention)
    place.lost = adapter.lost(attention)
    reasons = adapter.why_not(attention, model)
    if options.get("window") and not options.get("causal") and adapter.both_ways(attention):
        reasons = [*reasons, "sees both ways, and a window looks back; leave window out, or pass causal=True"]
    if place.lost and not allow_lost:
        reasons = [*reasons, f"would lose {', '.join(place.lost)}; pass allow_lost=True if that may be"]
    return "; ".join(reasons)


def _build(attention: nn.Module, options: dict[str, Any], device: Any = None) -> HostedRetention:
    """What the layer gets, on its device, in its dtype and mode."""
    weight = next(p for name, p in attention.named_parameters() if not name.startswith("retention."))
    heads = adapter_of(attention).heads(attention)
    built = HostedRetention(heads, **options, device=device or weight.device, dtype=weight.dtype)
    return built.train(attention.training)


def _fresh_weights(attention: nn.Module, model: nn.Module) -> dict[str, Any]:
    twin = copy.deepcopy(attention)
    adapter_of(attention).reset(twin, model)
    return twin.state_dict()


def replaced_by(adapter: Adapter, model: nn.Module) -> dict[str, Any]:
    """The replaced layers of `model` that this adapter is for, by their names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Swapped) and adapter_of(m) is adapter}


def adapter_of(attention: Any) -> Adapter:
    """Raises: KeyError if its class has none."""
    return _adapters[_full_name(_host(attention))]


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _host(attention: nn.Module) -> type[nn.Module]:
    """The class of a layer, before it was replaced."""
    return attention.host if isinstance(attention, Swapped) else type(attention)


def _nothing_found(model: nn.Module) -> str:
    alike = {type(m).__name__: n for n, m in model.named_modules() if "attention" in type(m).__name__.lower()}
    there = ", ".join(f"{kind} (as {name})" for kind, name in alike.items()) or "none"
    return (
        f"no attention of {type(model).__name__} has an adapter; modules that look like attention: {there}. "
        "retention.integrations.swap.register_adapter(CLASS, ADAPTER) adds one"
    )

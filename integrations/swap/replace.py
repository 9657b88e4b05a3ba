"""Put retention where the attention of an existing model is, and take it out again.

An attention module stays the object it is, with its projections under their own names. It gets one new child,
`retention`, and a class derived from its own that runs it. Checkpoints, optimisers, hooks and LoRA go on as before.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from retention.options import check_choice, check_flags, check_is, shown

from .adapter import Adapter
from .calibration import calibrate
from .retention import HostedRetention
from .swapped import Swapped, adapter_of, replaced_by, swapped_class
from .transaction import all_or_nothing, kept_random_state
from .whole import whole_models


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
    already: list[str] = field(default_factory=list)  # those of `replaced` that had retention before the call

    def __str__(self) -> str:
        lines = [f"retention in {len(self.replaced)} layers: {', '.join(self.replaced) or 'none'}"]
        lines += [f"already there, and left as they are: {', '.join(self.already)}"] if self.already else []
        lines += [f"kept {name}: {why}" for name, why in self.kept.items()]
        lines += [f"lost in {name}: {', '.join(what)}" for name, what in self.lost.items()]
        return "\n".join([*lines, f"parameters: {self.parameters_before:,} before, {self.parameters_after:,} after"])


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

    The projections, norms and biases carry over exactly. The softmax does not: train the model afterwards.

    Args:
        model: a model, a part of one, or a wrapper around one (DistributedDataParallel, PEFT, torch.compile).
        layers: which layers, counted from 0 over all that have an adapter, negative from the end; default: all.
        where: a function of a layer's name and module that says whether to replace it. With `layers`, both must hold.
        init: "copy" keeps the weights of the layers; "fresh" draws new ones, and the old ones are gone.
        calibrate_on: a batch, as keyword arguments of `model`. One pass of it, in evaluation mode and with attention
            still in effect, gives each new head the root mean square of its attention's output. Not for "fresh".
        allow_lost: also replace layers that do what retention will not do, such as looking at a sliding window.
        options: of `HostedRetention`, the same for all layers.
    Returns: what was replaced. A layer that has retention with the same options already is left as it is.
    Raises: TypeError or ValueError if an argument does not fit, if nothing matches, or if a layer that is asked for
        cannot be replaced or has been with other options. The text says why, and what attention there is.

    If anything fails, even by Ctrl-C, the model is what it was. Torch's random numbers stay where they stood, but for
    those that "fresh" draws.
    """
    check_choice("init", init, ("copy", "fresh"))
    if init == "fresh" and calibrate_on is not None:
        raise ValueError('calibrate_on needs init="copy"; fresh weights have no attention to be as large as')
    if calibrate_on is not None and not isinstance(calibrate_on, Mapping):
        raise TypeError(
            "calibrate_on must be the keyword arguments of the model, such as {'input_ids': ids}; "
            f"got {type(calibrate_on).__name__}"
        )
    report, chosen = _planned(model, layers, where, allow_lost, options)
    new = {place.names[0]: place.attention for place in chosen if not isinstance(place.attention, Swapped)}
    if not new:
        _refuse_what_needs_new_layers(init, calibrate_on, report)
        return report
    models = whole_models(new.values())
    _refuse_several_processes(models)
    fresh = init == "fresh"
    overwritten = [x for attention in new.values() for x in attention.state_dict(keep_vars=True).values() if fresh]
    with all_or_nothing(models, overwritten), kept_random_state(model, always=not fresh):
        if fresh:
            _draw_anew(model, new.values())
        _put_in(models, new.values(), options)
        if calibrate_on is not None:
            calibrate(model, new, calibrate_on)
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
    check_is("model", model, nn.Module, "an nn.Module")
    found = [place for place in _places(model) if isinstance(place.attention, Swapped)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention that was replaced by retention")
    replaced: list[Any] = [place.attention for place in found]
    models = whole_models(replaced)
    _refuse_several_processes(models)
    adapters = {attention.adapter for attention in replaced}
    with all_or_nothing(models):
        for adapter, whole in itertools.product(adapters, models):
            adapter.detach(whole)
        for attention in replaced:
            attention._modules.pop("retention", None)
            attention.__class__ = attention.host
        for adapter, whole in itertools.product(adapters, models):
            if replaced_by(adapter, whole):
                adapter.attach(whole)
    return [place.names[0] for place in found]


def _put_in(models: Iterable[nn.Module], new: Iterable[nn.Module], options: dict[str, Any]) -> None:
    for attention in new:
        attention.retention = _build(attention, options)
        host: Any = type(attention)
        attention.__class__ = swapped_class(host)
    for adapter, whole in itertools.product({_adapter(attention) for attention in new}, models):
        adapter.attach(whole)


def _draw_anew(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    weights = [(attention, _fresh_weights(attention, model)) for attention in layers]
    for attention, drawn in weights:
        attention.load_state_dict(drawn)


def _refuse_several_processes(models: Iterable[nn.Module]) -> None:
    """DistributedDataParallel averages the gradients of the parameters that it saw when it was made, and no others."""
    for whole in models:
        for module in whole.modules():
            if isinstance(module, DistributedDataParallel) and module.process_group.size() > 1:
                raise ValueError(
                    "the model is in a DistributedDataParallel of several processes, which does not learn of "
                    "parameters that come or go; replace or restore attention first, then wrap the model"
                )


def _refuse_what_needs_new_layers(init: str, calibrate_on: Any, report: SwapReport) -> None:
    given = 'init="fresh"' if init == "fresh" else "calibrate_on" if calibrate_on is not None else ""
    if given:
        raise ValueError(
            f"{given} is for layers that get retention now; all of these have it already: {', '.join(report.already)}; "
            "call restore_attention first"
        )


def _planned(
    model: nn.Module,
    layers: Iterable[int] | None,
    where: Callable[[str, nn.Module], bool] | None,
    allow_lost: bool,
    options: dict[str, Any],
) -> tuple[SwapReport, list[Place]]:
    check_is("model", model, nn.Module, "an nn.Module")
    check_flags(allow_lost=allow_lost)
    if where is not None and not callable(where):
        raise TypeError(f"where must be a function of a layer's name and module; got where {shown(where)}")
    places = _places(model)
    if not places:
        raise ValueError(_nothing_found(model))
    wanted = range(len(places)) if layers is None else _indices(layers, len(places))
    chosen: dict[int, Place] = {}
    for i, place in enumerate(places):
        if i in wanted and (where is None or any(where(name, place.attention) for name in place.names)):
            place.kept = _objections(model, place, allow_lost, options)
            chosen[i] = place
        else:
            place.kept = "not asked for"
    if any(place.kept for place in chosen.values()):
        raise ValueError(_refusal(chosen))
    if not chosen:
        names = ", ".join(place.names[0] for place in places)
        raise ValueError(f"layers and where leave nothing to replace; the model has {names}")
    before = sum(p.numel() for p in model.parameters())
    there = {name: place for place in chosen.values() for name in place.names[:1]}
    already = [name for name, place in there.items() if isinstance(place.attention, Swapped)]
    new = [_build(place.attention, options, device="meta") for name, place in there.items() if name not in already]
    report = SwapReport(
        list(there),
        {place.names[0]: place.kept for place in places if place.kept},
        {name: place.lost for name, place in there.items() if place.lost},
        before,
        before + sum(p.numel() for module in new for p in module.parameters()),
        already,
    )
    return report, list(chosen.values())


def _refusal(chosen: Mapping[int, Place]) -> str:
    reasons = "\n".join(f"  {place.names[0]}: {place.kept}" for place in chosen.values() if place.kept)
    others = [i for i, place in chosen.items() if not place.kept]
    hint = f"\nlayers={others} leaves these out; so does a `where` that is False for them" if others else ""
    return f"nothing was replaced, because\n{reasons}{hint}"


def _places(model: nn.Module) -> list[Place]:
    """All layers that have an adapter, in the model's order; a module under several names is one layer."""
    found: dict[int, Place] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if adapter_of(module) is not None:
            found.setdefault(id(module), Place([], module)).names.append(name)
    return list(found.values())


def _indices(layers: Iterable[int], count: int) -> set[int]:
    listed = isinstance(layers, Iterable) and not isinstance(layers, str)
    given: list[Any] = list(layers) if listed else [layers]
    for i in given:
        if not listed or isinstance(i, bool) or not hasattr(i, "__index__"):
            raise TypeError(f"layers must be whole numbers, such as [0, 2, -1]; got {i!r}")
        if not -count <= operator.index(i) < count:
            raise ValueError(f"layers must be from {-count} to {count - 1}; got {i}")
    return {operator.index(i) % count for i in given}


def _objections(model: nn.Module, place: Place, allow_lost: bool, options: dict[str, Any]) -> str:
    """What stands against replacing a layer; empty if nothing does."""
    attention = place.attention
    if isinstance(attention, Swapped):
        if "retention" not in attention._modules:
            return "its child `retention` is gone; call restore_attention first"
        there = attention.retention.options
        other = there != _build(attention, options, device="meta").options
        return f"has retention already, with other options, {there}; restore_attention first" if other else ""
    adapter = _adapter(attention)
    place.lost = adapter.lost(attention)
    reasons = adapter.why_not(attention, model)
    if _weight(attention) is None:
        reasons = [*reasons, "has no floating-point parameters, as when it is quantised; replace first, then quantise"]
    if options.get("window") and not options.get("causal") and adapter.both_ways(attention):
        reasons = [*reasons, "sees both ways, and a window looks back; leave window out, or pass causal=True"]
    if place.lost and not allow_lost:
        reasons = [*reasons, f"would lose {', '.join(place.lost)}; pass allow_lost=True if that may be"]
    return "; ".join(reasons)


def _build(attention: nn.Module, options: dict[str, Any], device: Any = None) -> HostedRetention:
    """What the layer gets, on its device, in its dtype and mode."""
    weight = _weight(attention)
    heads = _adapter(attention).heads(attention)
    built = HostedRetention(heads, **options, device=device or weight.device, dtype=weight.dtype)
    return built.train(attention.training)


def _weight(attention: nn.Module) -> Any:
    """A parameter of the host, for its device and dtype; None if all are quantised."""
    host = (p for name, p in attention.named_parameters() if not name.startswith("retention."))
    return next((p for p in host if p.is_floating_point()), None)


def _fresh_weights(attention: nn.Module, model: nn.Module) -> dict[str, Any]:
    twin = copy.deepcopy(attention)
    _adapter(attention).reset(twin, model)
    return twin.state_dict()


def _adapter(attention: nn.Module) -> Adapter:
    found = adapter_of(attention)
    assert found is not None  # `_places` finds no others
    return found


def _nothing_found(model: nn.Module) -> str:
    alike = {type(m).__name__: n for n, m in model.named_modules() if "attention" in type(m).__name__.lower()}
    there = ", ".join(f"{kind} (as {name})" for kind, name in alike.items()) or "none"
    return (
        f"no attention of {type(model).__name__} has an adapter; modules that look like attention: {there}. "
        "retention.integrations.swap.register_adapter(CLASS, ADAPTER) adds one"
    )

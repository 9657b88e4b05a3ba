"""Replace the attention layers of an existing model with retention, and restore them.

A replaced attention module stays the same object and keeps its projections under their names. It gets a new child,
`retention`, and a class derived from its own whose forward runs that child. Checkpoints, optimisers, hooks and LoRA
keep working.
"""

from __future__ import annotations

import copy
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from retention.former import former_options
from retention.options import check_choice, check_flags, check_is, shown

from .adapter import Adapter, full_name
from .calibration import calibrate
from .retention import FORMER, HostedRetention
from .swapped import Swapped, adapter_of, replaced_by, swapped_class
from .transaction import all_or_nothing, kept_random_state
from .whole import whole_models

__all__ = ["SwapReport", "plan_replacement", "replace_attention", "restore_attention"]


@dataclass
class _Place:
    """An attention layer of a model: all its names, why it is kept (empty: it is not), and its lost features."""

    names: list[str]
    attention: nn.Module
    kept: str = ""
    lost: list[str] = field(default_factory=list)


@dataclass
class SwapReport:
    """The layers that `replace_attention` replaced or would replace, and the number of parameters.

    `str()` of a report gives one line per fact.

    Attributes:
        replaced: names of the layers with retention after the call, those in `already` included.
        kept: the reason why each other attention layer keeps its attention, by the layer's name.
        lost: features of the attention that retention does not have, by the layer's name.
        parameters_before, parameters_after: numbers of parameters of the model.
        already: names of the layers in `replaced` that had retention before the call.
        state_bytes: memory in bytes of the state of one sequence, of all layers in `replaced` together, for the parts
            "window", "sinks" and "retention". Layers that see both ways have no state.
    """

    replaced: list[str]
    kept: dict[str, str]
    lost: dict[str, list[str]]
    parameters_before: int
    parameters_after: int
    already: list[str] = field(default_factory=list)
    state_bytes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"retention in {len(self.replaced)} layers: {', '.join(self.replaced) or 'none'}"]
        lines += [f"already there, and left as they are: {', '.join(self.already)}"] if self.already else []
        lines += [f"kept {name}: {why}" for name, why in self.kept.items()]
        lines += [f"lost in {name}: {', '.join(what)}" for name, what in self.lost.items()]
        parts = ", ".join(f"{part} {_kilobytes(size)}" for part, size in self.state_bytes.items() if size)
        lines += [f"state of a sequence: {_kilobytes(sum(self.state_bytes.values()))}: {parts}"] if parts else []
        return "\n".join([*lines, f"parameters: {self.parameters_before:,} before, {self.parameters_after:,} after"])


@former_options(FORMER)
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
    """Replace attention layers of `model` with retention, in place.

    Projections, norms and biases keep their weights. Retention only approximates the softmax, so train the model
    further; see `recover`.

    Args:
        model: a model, a part of one, or a wrapper around one (DistributedDataParallel, PEFT, torch.compile).
        layers: indices of the layers to replace, counted from 0 over all layers that have an adapter; negative ones
            count from the end. Default: all.
        where: a function of a layer's name and module that returns True for the layers to replace. A layer must satisfy
            both `layers` and `where`. Default: all.
        init: "copy" keeps the layers' weights; "fresh" draws new ones and overwrites the old ones.
        calibrate_on: a calibration batch, as keyword arguments of `model`. The model runs it once, in evaluation mode
            and with attention still in effect; then each new head is scaled to the root mean square of its attention's
            output. Not with init="fresh". Default: no calibration.
        allow_lost: also replace layers with features that retention does not have, such as a sliding window. Default
            False.
        options: options of `HostedRetention`, the same for all layers.
    Returns: a report. A layer that already has retention with the same options is not changed.
    Raises: TypeError or ValueError for a wrong argument, if no layer matches, or if a chosen layer cannot be replaced
        or has retention with other options. The message names the reason and the model's attention layers.

    If the call fails, even by Ctrl-C, the model is unchanged. Torch's random state does not change, except with
    init="fresh".

    Example:
        batch = tokenizer("Some text of the model's domain.", return_tensors="pt")
        print(replace_attention(model, layers=[1, 2, 3], calibrate_on=batch))
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


@former_options(FORMER)
def plan_replacement(
    model: nn.Module,
    *,
    layers: Iterable[int] | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    allow_lost: bool = False,
    **options: Any,
) -> SwapReport:
    """Report what `replace_attention` would do, without changing the model.

    Args and Raises are those of `replace_attention`.
    Returns: the report that `replace_attention` would return.
    Example:
        print(plan_replacement(model, layers=[1, 2, 3], window=64))
    """
    return _planned(model, layers, where, allow_lost, options)[0]


def restore_attention(model: nn.Module) -> list[str]:
    """Replace the retention in `model` by the original attention again, in place.

    Projections keep the weights that training or init="fresh" gave them; the parameters of retention are dropped.

    Args:
        model: a model, a part of one, or a wrapper around one.
    Returns: the names of the restored layers.
    Raises: ValueError if no layer of the model was replaced. If the call fails, the model is unchanged.
    Example:
        replace_attention(model)
        restore_attention(model)  # the model computes its attention as before
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
    """Refuse DistributedDataParallel: it averages gradients only of parameters that it saw at construction."""
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
) -> tuple[SwapReport, list[_Place]]:
    check_is("model", model, nn.Module, "an nn.Module")
    check_flags(allow_lost=allow_lost)
    if where is not None and not callable(where):
        raise TypeError(f"where must be a function of a layer's name and module; got where {shown(where)}")
    places = _places(model)
    if not places:
        raise ValueError(_nothing_found(model))
    wanted = range(len(places)) if layers is None else _indices(layers, len(places))
    chosen: dict[int, _Place] = {}
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
    stateful = [place.attention for place in there.values() if _has_state(place.attention, options)]
    parts = [_build(attention, options, device="meta").state_bytes() for attention in stateful]
    report = SwapReport(
        list(there),
        {place.names[0]: place.kept for place in places if place.kept},
        {name: place.lost for name, place in there.items() if place.lost},
        before,
        before + sum(p.numel() for module in new for p in module.parameters()),
        already,
        {part: sum(sizes[part] for sizes in parts) for part in (parts[0] if parts else ())},
    )
    return report, list(chosen.values())


def _refusal(chosen: Mapping[int, _Place]) -> str:
    reasons = "\n".join(f"  {place.names[0]}: {place.kept}" for place in chosen.values() if place.kept)
    others = [i for i, place in chosen.items() if not place.kept]
    hint = f"\nlayers={others} leaves these out; so does a `where` that is False for them" if others else ""
    return f"nothing was replaced, because\n{reasons}{hint}"


def _places(model: nn.Module) -> list[_Place]:
    """Return all layers that have an adapter, in the model's order; a module with several names is one layer."""
    found: dict[int, _Place] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if adapter_of(module) is not None:
            found.setdefault(id(module), _Place([], module)).names.append(name)
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


def _objections(model: nn.Module, place: _Place, allow_lost: bool, options: dict[str, Any]) -> str:
    """Return the reasons why a layer cannot be replaced, as one text; empty if there are none."""
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
    looks_back = options.get("window") or options.get("sinks")
    if looks_back and not options.get("causal") and adapter.both_ways(attention):
        reasons = [*reasons, "sees both ways, and window and sinks look back; leave them out, or pass causal=True"]
    if place.lost and not allow_lost:
        reasons = [*reasons, f"would lose {', '.join(place.lost)}; pass allow_lost=True if that may be"]
    return "; ".join(reasons)


def _build(attention: nn.Module, options: dict[str, Any], device: Any = None) -> HostedRetention:
    """Build the retention of a layer, on the layer's device, in its dtype and training mode."""
    weight = _weight(attention)
    heads = _adapter(attention).heads(attention)
    built = HostedRetention(heads, **options, device=device or weight.device, dtype=weight.dtype)
    return built.train(attention.training)


def _has_state(attention: nn.Module, options: dict[str, Any]) -> bool:
    return bool(options.get("causal")) or not _adapter(attention).both_ways(attention)


def _kilobytes(size: int) -> str:
    return f"{size / 1000:,.1f} kB"


def _weight(attention: nn.Module) -> Any:
    """Return a floating-point parameter of the original layer; None if there is none, as in quantised layers."""
    host = (p for name, p in attention.named_parameters() if not name.startswith("retention."))
    return next((p for p in host if p.is_floating_point()), None)


def _fresh_weights(attention: nn.Module, model: nn.Module) -> dict[str, Any]:
    twin = copy.deepcopy(attention)
    _adapter(attention).reset(twin, model)
    return twin.state_dict()


def _adapter(attention: nn.Module) -> Adapter:
    found = adapter_of(attention)
    assert found is not None  # `_places` returns only layers with an adapter
    return found


# Names that libraries give to classes of attention, among them convit's MHSA and mmseg's WindowMSA.
_ALIKE = re.compile(r"attention|attn|mhs?a|msa(?![a-z])", re.IGNORECASE)


def _nothing_found(model: nn.Module) -> str:
    alike: dict[str, str] = {}  # the first module of each class
    for name, module in model.named_modules():
        if _ALIKE.search(type(module).__name__):
            alike.setdefault(full_name(type(module)), name)
    there = ", ".join(f"{kind} (as {name})" if name else kind for kind, name in alike.items()) or "none"
    return (
        f"no attention of {type(model).__name__} has an adapter; modules that look like attention: {there}. "
        "retention.integrations.swap.register_adapter(CLASS, ADAPTER) adds one"
    )

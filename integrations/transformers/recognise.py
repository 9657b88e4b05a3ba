"""Reads the sizes of an attention layer of transformers, and the reasons against replacing it.

The classes differ in projections, norms, rotation and names, but all pass q, k and v to the function that
`config._attn_implementation` names. A class is recognised by the names in the code of its forward. Further features are
read from the arguments and strings of that forward, and from the layer's children, attributes and config. Any unknown
feature is a reason against replacing the layer.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from torch import nn

from ..swap import Heads, Swapped
from .compat import INPUT, LAYER_ARGUMENTS, OTHER_TOKENS

__all__ = [
    "UnreadableError",
    "added_to_scores",
    "cap_of",
    "doubts_of_class",
    "doubts_of_layer",
    "goes_by_interface",
    "is_cross_attention",
    "odd_layer_type",
    "read_heads",
    "shares_keys",
    "window_of",
]

_PROJECTIONS = (  # of q, k and v
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("linear_q", "linear_k", "linear_v"),
)
_FUSED = ("qkv_proj", "qkv", "query_key_value", "c_attn", "Wqkv")
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # multi-head latent attention
_OUTPUTS = (
    "o_proj",
    "out_proj",
    "o",
    "out_lin",
    "linear_out",
    "dense",
    "c_proj",
    "projection",
    "projection_layer",
    "proj",
    "Wo",
)
_OUTPUT_GATES = ("gate_proj", "g_proj")
_HARMLESS_PARTS = ("norm", "_ln", "drop", "rotary")  # parts of names: norms; dropout; rotary embeddings
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_WINDOWS = ("sliding_window", "attention_window_size")
_SHARES_KEYS = ("is_kv_shared_layer", "store_full_length_kv")
_CAP = "attn_logit_softcapping"
_FULL, _WINDOWED = "full_attention", "sliding_attention"  # values in config.layer_types

# Keywords of attention functions that retention has no counterpart for, and their descriptions.
_ADDED = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias of positions that is added to the scores",
    "indices": "a choice of keys by an indexer",
    "block_indices": "a choice of blocks of keys by an indexer",
}


class UnreadableError(ValueError):
    """The sizes of a layer's heads cannot be read; the message is the reason."""


# --- the class --------------------------------------------------------------------------------------------------------


def goes_by_interface(kind: type[nn.Module]) -> bool:
    """Tell whether a class takes its attention function from transformers' `AttentionInterface`."""
    code = _code(kind)
    return code is not None and {"get_interface", "_attn_implementation"} <= set(code.co_names)


def doubts_of_class(kind: type[nn.Module]) -> list[str]:
    """List the unknown arguments of a class's forward, as reasons against replacing its layers.

    Args:
        kind: a class for which `goes_by_interface` is True.
    """
    code = _code(kind)
    assert code is not None  # `goes_by_interface` is True
    parameters = list(inspect.signature(inspect.unwrap(kind.forward)).parameters.values())[1:]
    named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if named[:1] != [INPUT]:
        return [f"takes {named[0] if named else 'nothing'} first and not {INPUT}, so its tokens are not known"]
    unknown = [name for name in named if name not in LAYER_ARGUMENTS]
    found = [f"takes {_listed(unknown)}, and what that does is not known"] if unknown else []
    if not any(p.kind is p.VAR_KEYWORD for p in parameters) or not _merges_keywords(code):
        found.append("hands no keywords on to the attention function, which then cannot know the input of the layer")
    return found


def _hands_over(kind: type[nn.Module], name: str) -> bool:
    """Tell whether the code of a class's forward contains the string `name`, such as a keyword that it passes on."""
    code = _code(kind)
    return code is not None and name in set(_strings(code.co_consts))


def _host(attention: Any) -> type[nn.Module]:
    """The class of a layer, or its original class if it was replaced."""
    return attention.host if isinstance(attention, Swapped) else type(attention)


def _code(kind: type[nn.Module]) -> CodeType | None:
    return getattr(inspect.unwrap(kind.forward), "__code__", None)


def _merges_keywords(code: CodeType) -> bool:
    return any(step.opname == "DICT_MERGE" for step in dis.get_instructions(code))


def _strings(values: Iterable[Any]) -> Iterator[str]:
    """The strings among constants and in tuples of constants, which hold the names of keywords."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple):
            yield from _strings(value)


# --- the layer --------------------------------------------------------------------------------------------------------


def doubts_of_layer(attention: Any) -> list[str]:
    """List the children and parameters of a layer that are not known to be harmless, as reasons."""
    known = {name for names in (*_PROJECTIONS, _FUSED, _LATENT, _OUTPUTS, _OUTPUT_GATES) for name in names}
    parts = [
        name for name in attention._modules if name not in known and not any(p in name.lower() for p in _HARMLESS_PARTS)
    ]
    own = [name for name, p in attention._parameters.items() if p is not None]
    unknown = [name for name in [*parts, *own] if name not in _ADDED]
    return [f"has {_listed(unknown)}, and what that does is not known"] if unknown else []


def added_to_scores(attention: Any) -> list[str]:
    """Describe what the layer adds to its scores, and how it selects keys, such as attention sinks."""
    kind = _host(attention)
    found = [what for name, what in _ADDED.items() if _hands_over(kind, name) and not _says_none(attention, name)]
    found += [what for name, what in _ADDED.items() if _is_there(getattr(attention, name, None))]
    return list(dict.fromkeys(found))


def _says_none(attention: Any, name: str) -> bool:
    """Tell whether a layer of a class with attention sinks has none itself."""
    return _ADDED[name] == _ADDED["sinks"] and hasattr(attention, "sinks") and not _is_there(attention.sinks)


def _is_there(value: Any) -> bool:
    return value is not None and value is not False


def is_cross_attention(attention: Any, model: nn.Module) -> bool:
    """Tell whether the layer attends to other tokens than its own.

    The layer's `is_cross_attention` decides; without it, its class, its arguments and its name in `model` do.
    """
    said = getattr(attention, "is_cross_attention", None)
    if said is not None:
        return bool(said)
    if "cross" in type(attention).__name__.lower():
        return True
    parameters = inspect.signature(inspect.unwrap(type(attention).forward)).parameters
    others = [parameters[name] for name in OTHER_TOKENS if name in parameters]
    if not others:
        return False
    if any(other.default is other.empty for other in others):
        return True
    names = {name for name, module in model.named_modules(remove_duplicate=False) if module is attention}
    ends = {end for name in names for end in name.split(".")[-2:]}
    if any("cross" in end or end.startswith(("encoder_attn", "encoder_attention")) for end in ends):
        return True
    decoding = getattr(attention, "is_decoder", False) and not getattr(attention, "is_causal", True)
    return bool(decoding) and not any("self" in end for end in ends)


def shares_keys(attention: Any) -> bool:
    """Tell whether the layer uses the keys and values of another layer, or lends its own."""
    return any(getattr(attention, name, False) for name in _SHARES_KEYS)


def odd_layer_type(attention: Any) -> str:
    """Return the layer's type in its config, if it is neither full nor sliding attention; else ""."""
    kind = _layer_type(attention)
    return "" if kind in (None, _FULL, _WINDOWED) else str(kind)


def window_of(attention: Any) -> int | None:
    """Return the size of the layer's sliding window in tokens; None if it sees all earlier tokens."""
    for name in _WINDOWS:
        if hasattr(attention, name):
            return getattr(attention, name) or None
    if _layer_type(attention) == _FULL:
        return None
    config = getattr(attention, "config", None)
    return next((value for name in _WINDOWS if (value := getattr(config, name, None))), None)


def cap_of(attention: Any) -> float | None:
    """Return the soft cap of the layer's scores; None without one."""
    if hasattr(attention, _CAP):
        return getattr(attention, _CAP) or None
    return getattr(attention.config, _CAP, None) if _hands_over(_host(attention), "softcap") else None


def _layer_type(attention: Any) -> Any:
    types = getattr(getattr(attention, "config", None), "layer_types", None)
    index = getattr(attention, "layer_idx", None)
    if not isinstance(types, list | tuple) or not isinstance(index, int) or not 0 <= index < len(types):
        return None
    return types[index]


# --- its heads --------------------------------------------------------------------------------------------------------


def read_heads(attention: Any) -> Heads:
    """Return the sizes of a layer's heads, read from the widths of its projections.

    Raises: UnreadableError if the projections are unknown or contradict each other.
    """
    parts = attention._modules
    separate = next((names for names in _PROJECTIONS if all(parts.get(name) is not None for name in names)), None)
    fused = next((name for name in _FUSED if parts.get(name) is not None), None)
    if parts.get("kv_b_proj") is not None:
        heads = _latent_heads(attention)
    elif separate is not None:
        heads = _separate_heads(attention, *separate)
    elif fused is not None:
        heads = _fused_heads(attention, fused)
    else:
        raise UnreadableError(f"has no projections of q, k and v that are known; its parts are {_listed(parts)}")
    _check(heads, attention)
    return heads


def _separate_heads(attention: Any, q: str, k: str, v: str) -> Heads:
    (dim, width), (_, k_width), (_, v_width) = (_sizes(attention, name) for name in (q, k, v))
    key_dim = _first(attention, _HEAD_SIZES) or _quotient(width, _declared_heads(attention), q, "heads")
    num_kv_heads = _quotient(k_width, key_dim, k, "channels a head")
    value_dim = _quotient(v_width, num_kv_heads, v, "heads")
    output = _output_width(attention)
    num_heads = _quotient(output or width, value_dim if output else key_dim, "the output" if output else q, "channels")
    # q_proj is twice as wide if it also computes a gate per channel.
    if width not in (num_heads * key_dim, 2 * num_heads * key_dim):
        raise UnreadableError(f"has {q} {width} wide, which is not {num_heads} heads of {key_dim}")
    return Heads(dim, num_heads, num_kv_heads, key_dim, value_dim)


def _fused_heads(attention: Any, name: str) -> Heads:
    """The heads of a layer with one projection for q, k and v, in any order."""
    (dim, width), num_heads = _sizes(attention, name), _declared_heads(attention)
    if num_heads is None:
        raise UnreadableError(f"does not say how many heads {name} is for")
    key_dim = _first(attention, _HEAD_SIZES) or _quotient(dim, num_heads, INPUT, "heads")
    of_keys = _quotient(width - num_heads * key_dim, 2 * key_dim, name, "channels of k and v a head")
    return Heads(dim, num_heads, of_keys, key_dim, key_dim)


def _latent_heads(attention: Any) -> Heads:
    """The heads of multi-head latent attention: each has its own keys and values, of different sizes."""
    key_dim, value_dim = (_first(attention, (name,)) for name in ("qk_head_dim", "v_head_dim"))
    there = {name for name, part in attention._modules.items() if part is not None}
    first, last = ("q_a_proj", "q_b_proj") if "q_a_proj" in there else ("q_proj", "q_proj")
    if key_dim is None or value_dim is None or not {first, last} <= there:
        raise UnreadableError("makes keys of latent vectors, and has no qk_head_dim, v_head_dim or q_proj that say how")
    num_heads = _quotient(_sizes(attention, last)[1], key_dim, last, "channels a head")
    return Heads(_sizes(attention, first)[0], num_heads, num_heads, key_dim, value_dim)


def _check(heads: Heads, attention: Any) -> None:
    declared, output = _first(attention, _HEAD_COUNTS), _output_width(attention)
    if declared is not None and declared != heads.num_heads:
        raise UnreadableError(f"says that it has {declared} heads, and its projections are for {heads.num_heads}")
    if output is not None and output != heads.num_heads * heads.value_dim:
        raise UnreadableError(f"has an output of {output} channels, not {heads.num_heads} heads of {heads.value_dim}")
    if heads.num_kv_heads < 1 or heads.num_heads % heads.num_kv_heads:
        raise UnreadableError(
            f"has {heads.num_heads} heads of q and {heads.num_kv_heads} of k, which do not go together"
        )


def _declared_heads(attention: Any) -> int | None:
    return _first(attention, _HEAD_COUNTS) or _first(getattr(attention, "config", None), _HEAD_COUNTS)


def _output_width(attention: Any) -> int | None:
    """The input width of the output projection; None if the layer has no such projection."""
    name = next((name for name in _OUTPUTS if attention._modules.get(name) is not None), None)
    return None if name is None else _sizes(attention, name)[0]


def _sizes(attention: Any, name: str) -> tuple[int, int]:
    """(input width, output width) of a projection: torch's Linear, transformers' Conv1D, or a wrapper of these."""
    part = attention._modules[name]
    for first, second in (("in_features", "out_features"), ("nx", "nf")):
        if isinstance(getattr(part, first, None), int) and isinstance(getattr(part, second, None), int):
            return getattr(part, first), getattr(part, second)
    raise UnreadableError(f"has {name} of class {type(part).__name__}, whose sizes are not known")


def _first(thing: Any, names: Iterable[str]) -> int | None:
    found = (getattr(thing, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _quotient(whole: int, part: int | None, name: str, unit: str) -> int:
    if part is None or whole % part:
        raise UnreadableError(f"has {name} {whole} wide, and that is not divided by {part} {unit}")
    return whole // part


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"

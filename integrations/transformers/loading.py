"""Loads saved models with replaced layers, by `load_swapped` or by transformers' Auto classes."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from ..files import listed, one_line, read_json, refused
from ..swap import replace_attention
from ..swap.retention import FORMER, HostedRetention
from ..swap.swapped import Swapped
from .replaced_config import MARK, MODEL_TYPE, marked_class, marked_layers, name_in_base_model
from .tensor_parallel import plan_of_replaced

__all__ = ["RetentionInAttentionConfig", "load_swapped", "register_auto_classes"]

_MOST = 10_000  # largest number of layers in a model, and of decays of a head
_OPTIONS = inspect.signature(HostedRetention).parameters.keys() - {"heads", "device", "dtype"} | FORMER.keys()
_CHILD = ".retention."  # part of the names of retention's own parameters


class _Rebuilt:
    """Mixin of a model class that replaces the layers listed in the config when it builds a model.

    Attributes:
        host_model: the class of the built model, which is that of the model before saving.
    """

    host_model: type[PreTrainedModel]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        model.__class__ = self.host_model
        _replace_again(model, marked_layers(config))
        _plan_heads(model)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model; arguments and result are those of the host class.

        Raises: ValueError if tensors of the replaced layers are missing, left over or of a wrong shape.
        """
        found = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        model, info = found
        _check_tensors(folder, info)
        return (model, info) if output_loading_info else model


class RetentionInAttentionConfig(PreTrainedConfig):
    """Reads the config.json of a model with replaced layers; returns a config of the model's own class, marked."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the model's config from the dict that `MarkedConfig` writes.

        Raises: ValueError if config_dict is anything else.
        """
        kind = _of_type(config_dict, "attention_model_type", str)
        host = _of_type(config_dict, "attention_config", dict)
        layers = _of_type(config_dict, "retention_layers", dict)
        for name in layers:
            _check_layer(name, _of_type(layers, name, dict))
        layers = {name: _of_any_version(layers[name]) for name in layers}
        kept = {name: config_dict[name] for name in ("architectures", "dtype") if name in config_dict}
        host_class = _config_class(kind)
        with refused(f"attention_config has an option that no {kind} has"):
            found = host_class.from_dict({**kept, **host}, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        _check_at_most("num_hidden_layers", getattr(config.get_text_config(), "num_hidden_layers", None))
        setattr(config, MARK, layers)
        config.__class__ = marked_class(host_class)
        register_auto_classes(host_class)
        return found


def load_swapped(folder: str | Path, **kwargs: Any) -> Any:
    """Load a model with replaced layers that `save_pretrained` has written.

    `AutoModelForCausalLM.from_pretrained` and the other Auto classes load it too; this function takes the model class
    from the config.

    Args:
        folder: a folder, or a name on the Hugging Face Hub.
        kwargs: keyword arguments of `from_pretrained`.
    Returns: the model.
    Raises: ValueError if the model has no replaced layers, if its class is not part of transformers, or if tensors of
        the replaced layers are missing, left over or of a wrong shape.
    Example:
        replace_attention(model)
        model.save_pretrained("runs/swapped")
        model = load_swapped("runs/swapped")
    """
    if os.path.lexists(file := Path(folder, "config.json")):
        read_json(file)
    config: Any = AutoConfig.from_pretrained(folder)
    if not marked_layers(config):
        raise ValueError(
            f"the model in {folder} has no layers that were replaced; use from_pretrained of its own class"
        )
    name = (config.architectures or [""])[0]
    if not hasattr(transformers, name):
        raise ValueError(
            f"the model in {folder} is a {name!r}, which transformers does not have; build it, call replace_attention "
            f"with the options in its config.json, and load its state dict"
        )
    return _rebuilt_class(getattr(transformers, name)).from_pretrained(folder, **{"config": config, **kwargs})


@cache
def _rebuilt_class(host_model: Any) -> Any:
    """Return the class that builds models of class `host_model` with replaced layers."""
    own = {"host_model": host_model, "__module__": __name__, "config_class": marked_class(host_model.config_class)}
    return type(host_model.__name__, (_Rebuilt, host_model), own)  # transformers looks classes up by name


@cache
def register_auto_classes(host_class: Any) -> None:
    """Let each Auto class that knows a config class also build its models with replaced layers."""
    marked = marked_class(host_class)
    for name in dir(transformers):
        auto = getattr(transformers, name) if name.startswith("AutoModel") else None
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is not None and host_class in mapping and marked not in mapping:
            found = mapping[host_class]
            rebuilt = tuple(map(_rebuilt_class, found)) if isinstance(found, tuple) else _rebuilt_class(found)
            mapping.register(marked, rebuilt)


def _of_type(options: dict[str, Any], name: str, kind: type) -> Any:
    value = options.get(name)
    if not isinstance(value, kind):
        got = one_line(repr(value)) if name in options else "nothing"
        raise ValueError(f"the config of a model with replaced layers must have {name!r}, a {kind.__name__}; got {got}")
    return value


def _of_any_version(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a layer by their names of today; a file of the first version has no importance of keys."""
    return {"key_importance": False} | {FORMER.get(name, name): value for name, value in options.items()}


def _check_layer(name: str, options: dict[str, Any]) -> None:
    if unknown := sorted(options.keys() - _OPTIONS):
        raise ValueError(f"{name} has options that no replaced layer has: {listed(unknown)}; correct or remove them")
    for option in ("num_decays", "scales"):
        _check_at_most(f"{option} of {name}", options.get(option))


def _check_at_most(name: str, count: Any) -> None:
    """Refuse counts over 10,000: a file of a few bytes could ask for a model that takes hours to build."""
    if isinstance(count, int) and count > _MOST:
        raise ValueError(f"{name} must be at most {_MOST:,}; got {count}")


def _config_class(model_type: str) -> Any:
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"attention_model_type must be one that the installed transformers has; got {model_type!r}")
    return CONFIG_MAPPING[model_type]


def _replace_again(model: PreTrainedModel, layers: dict[str, dict[str, Any]]) -> None:
    there = {id(module): name_in_base_model(name, model) for name, module in model.named_modules()}
    missing = sorted(set(layers) - set(there.values()))
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no layers {', '.join(missing)}, which its config says are replaced"
        )
    alike: dict[str, list[str]] = {}
    for name, options in layers.items():
        alike.setdefault(repr(sorted(options.items())), []).append(name)
    for names in alike.values():
        chosen = {i for i, name in there.items() if name in names}
        with refused(f"the config has options for {names[0]} that cannot be"):
            replace_attention(model, where=_one_of(chosen), allow_lost=True, **layers[names[0]])


def _plan_heads(model: Any) -> None:
    """Enter the replaced layers in the model's plan of tensor parallel."""
    for name, module in model.named_modules():
        if isinstance(module, Swapped):
            layer = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            model._tp_plan |= plan_of_replaced(layer, module.retention, model._tp_plan)


def _one_of(chosen: set[int]) -> Callable[[str, nn.Module], bool]:
    return lambda _, module: id(module) in chosen


def _check_tensors(folder: Any, info: dict[str, Any]) -> None:
    lines = [
        f"{kind}: {', '.join(sorted(keys))}"
        for kind in ("missing_keys", "unexpected_keys")
        if (keys := [key for key in info[kind] if _CHILD in key])
    ]
    lines += [f"of another shape: {key}" for key, *_ in info["mismatched_keys"] if _CHILD in key]
    if lines:
        raise ValueError(
            f"the weights in {folder} do not fit the replaced layers that its config names\n" + "\n".join(lines)
        )


AutoConfig.register(MODEL_TYPE, RetentionInAttentionConfig)

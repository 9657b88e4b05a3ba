"""Keeps the configs of models in step with the layers that have retention."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..swap import Swapped
from .loading import register_auto_classes
from .replaced_config import MARK, MarkedConfig, marked_class, name_in_base_model

__all__ = ["update_marks"]


def update_marks(whole: nn.Module) -> None:
    """Let the config of each model in `whole` list the model's layers with retention.

    Configs are replaced by new ones rather than changed, as another model may share them.
    """
    models = [module for module in whole.modules() if isinstance(module, PreTrainedModel)]
    copies: dict[int, Any] = {}
    for config in {id(model.config): model.config for model in models}.values():
        sharing = [model for model in models if model.config is config]
        layers: dict[str, dict[str, Any]] = {}
        for model in _outermost(sharing):
            named = ((name_in_base_model(name, model), module) for name, module in model.named_modules())
            layers |= {name: cast(Any, module).retention.options for name, module in named if _is_replaced(module)}
        if layers or isinstance(config, MarkedConfig):
            _mark(copy.deepcopy(config, copies), layers)
            for model in sharing:
                _set_stateful(model, bool(layers))
    for module in whole.modules():
        for name in ("config", "host_config"):
            new = copies.get(id(vars(module).get(name)))
            if isinstance(new, PreTrainedConfig):
                setattr(module, name, new)
    for model in models:
        _upload_by_config(model)


def _is_replaced(module: nn.Module) -> bool:
    """Tell whether a module is a replaced layer of a transformers model."""
    return isinstance(module, Swapped) and "retention" in module._modules and hasattr(module, "host_config")


def _outermost(models: list[PreTrainedModel]) -> list[PreTrainedModel]:
    inner = {id(module) for model in models for module in model.modules() if module is not model}
    return [model for model in models if id(model) not in inner]


def _mark(config: Any, layers: dict[str, dict[str, Any]]) -> None:
    host_class: Any = config.host_class if isinstance(config, MarkedConfig) else type(config)
    if layers:
        setattr(config, MARK, layers)
        config.__class__ = marked_class(host_class)
        register_auto_classes(host_class)
    elif isinstance(config, MarkedConfig):
        delattr(config, MARK)
        cast(Any, config).__class__ = host_class


def _upload_by_config(model: PreTrainedModel) -> None:
    """Let the marked config upload the model, with a card that tells how to load it; else undo that."""
    upload = "_upload_modified_files"
    if isinstance(model.config, MarkedConfig):
        vars(model)[upload] = model.config._upload_modified_files
    else:
        vars(model).pop(upload, None)


def _set_stateful(model: PreTrainedModel, stateful: bool) -> None:
    """Mark a model as stateful, so that `generate` refuses methods that take tokens back, or unmark it."""
    if stateful and not model._is_stateful:
        model._is_stateful = True
    elif not stateful:
        vars(model).pop("_is_stateful", None)

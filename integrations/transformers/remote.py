"""The names that the code file of a saved model imports from this library under trust_remote_code=True."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

from ..files import one_line
from .configuration import RetNetConfig
from .replaced_config import MODEL_TYPE

__all__ = ["Config"]


class Config:
    """Loads the config of a saved RetNet or of a model with replaced layers."""

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> Any:
        """Load the config in `folder`; arguments as those of transformers.

        Raises: ValueError if the config's model_type is not one of this library's.
        """
        config_dict, kwargs = RetNetConfig.get_config_dict(folder, **kwargs)
        kind, ours = config_dict.get("model_type"), (RetNetConfig.model_type, MODEL_TYPE)
        if kind not in ours:
            raise ValueError(f"model_type must be {' or '.join(ours)}, whose code this is; got {one_line(repr(kind))}")
        return CONFIG_MAPPING[kind].from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing, as `SaysHowToLoad.register_for_auto_class`."""

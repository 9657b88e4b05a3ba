"""What a folder's own code file takes from the library under trust_remote_code=True."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

from ..files import one_line
from .modeling import RetNetConfig
from .replaced_config import MODEL_TYPE


class Config:
    """The config of whatever model of ours is in the folder."""

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> Any:
        config_dict, kwargs = RetNetConfig.get_config_dict(folder, **kwargs)
        kind, ours = config_dict.get("model_type"), (RetNetConfig.model_type, MODEL_TYPE)
        if kind not in ours:
            raise ValueError(f"model_type must be {' or '.join(ours)}, whose code this is; got {one_line(repr(kind))}")
        return CONFIG_MAPPING[kind].from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing, as in `SaysHowToLoad`."""

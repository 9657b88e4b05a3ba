"""What a folder's own code file takes from the library under trust_remote_code=True."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig


class Config:
    """The config of whatever model of ours is in the folder."""

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> Any:
        config_dict, kwargs = PreTrainedConfig.get_config_dict(folder, **kwargs)
        return CONFIG_MAPPING[config_dict["model_type"]].from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing, as in `SaysHowToLoad`."""

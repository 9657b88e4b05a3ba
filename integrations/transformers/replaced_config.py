"""The config of a model with replaced layers, which lists them; only readers that know retention accept its file."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .sharing import SaysHowToLoad

__all__ = ["MARK", "MODEL_TYPE", "MarkedConfig", "marked_class", "marked_layers", "name_in_base_model"]

MARK = "retention_in_attention"  # the config's attribute for {layer name in the base model: options}
MODEL_TYPE = "retention_in_attention"  # model_type in config.json
_KEPT = ("architectures", "dtype", "transformers_version")  # stay at the top level of config.json


class MarkedConfig(SaysHowToLoad):
    """Mixin of the config class of a model with replaced layers.

    Attributes:
        host_class: the original class of the config.
        retention_in_attention: the options of each replaced layer, by its name in the base model.
    """

    host_class: type[PreTrainedConfig]
    retention_in_attention: dict[str, dict[str, Any]]

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle cannot import a class that is created at run time
        return _blank, (self.host_class,), vars(self)

    def file_contents(self, host: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of config.json.

        Their hidden_size is a text, so that transformers' own config classes fail with a message that tells how to load
        the model.
        """
        layers = host.pop(MARK)
        kept: dict[str, Any] = {name: host.pop(name) for name in _KEPT if name in host}
        return {
            **kept,
            "model_type": MODEL_TYPE,
            "attention_model_type": host.pop("model_type"),
            "attention_config": host,
            "retention_layers": layers,
            "hidden_size": "in attention_config; import retention.integrations.transformers, load with AutoModel",
        }


@cache
def marked_class(host_class: Any) -> type[PreTrainedConfig]:
    """Return the class for configs of class `host_class` when the model has replaced layers."""
    own = {"host_class": host_class, "__module__": __name__}
    return type(f"Retention{host_class.__name__}", (MarkedConfig, host_class), own)


def marked_layers(config: Any) -> dict[str, dict[str, Any]]:
    """Return the options of each replaced layer, by its name in the base model; {} if no layer is replaced."""
    return getattr(config, MARK, {}) if isinstance(config, MarkedConfig) else {}


def name_in_base_model(name: str, model: PreTrainedModel) -> str:
    """Return a layer's name in the base model, which is the same with every head."""
    return name.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else name


def _blank(host_class: Any) -> Any:
    kind = marked_class(host_class)
    return kind.__new__(kind)

"""The config of a model with replaced layers: it names them, and its file is opened only by what knows of retention."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .sharing import SaysHowToLoad

MARK = "retention_in_attention"  # the attribute that holds {name of a layer in the base model: its options}
MODEL_TYPE = "retention_in_attention"  # in config.json
_KEPT = ("architectures", "dtype", "transformers_version")  # stand in config.json where transformers has them


class MarkedConfig(SaysHowToLoad):
    """Mixed into the class of the config of a model with replaced layers. `host_class` is the class that it had."""

    host_class: type[PreTrainedConfig]
    retention_in_attention: dict[str, dict[str, Any]]

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle does not find a class that was made
        return _blank, (self.host_class,), vars(self)

    def file_contents(self, host: dict[str, Any]) -> dict[str, Any]:
        """What stands in config.json. Read by a config class of transformers it is an error, and says what to do."""
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
    """The class of the config of a model with replaced layers, whose config was a `host_class`."""
    own = {"host_class": host_class, "__module__": __name__}
    return type(f"Retention{host_class.__name__}", (MarkedConfig, host_class), own)


def marked_layers(config: Any) -> dict[str, dict[str, Any]]:
    """The options of each replaced layer, by its name in the base model; empty if none is."""
    return getattr(config, MARK, {}) if isinstance(config, MarkedConfig) else {}


def name_in_base_model(name: str, model: PreTrainedModel) -> str:
    """The name in the base model, which is the same with every head."""
    return name.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else name


def _blank(host_class: Any) -> Any:
    kind = marked_class(host_class)
    return kind.__new__(kind)

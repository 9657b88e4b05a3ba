"""`RetNetConfig`, the options of a RetNet in transformers, and their checks."""

from __future__ import annotations

import copy
import inspect
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from retention.backends import FORMS
from retention.ffn import BACKENDS as FFN_BACKENDS
from retention.former import current_options, former_options, warn_of_former
from retention.layer import MultiScaleRetention
from retention.model import FORMER as FORMER_OF_BACKBONE
from retention.model import FORMER_FLAGS, RetNetBackbone
from retention.options import check_choice, check_eps, check_factor, check_flags, check_is, check_whole

from ..files import listed, one_line, refused
from .cache import LAYER_TYPE
from .compat import CACHE
from .sharing import SaysHowToLoad
from .tensor_parallel import plan_of_retnet

__all__ = ["FORMER", "FORMER_FORM", "RetNetConfig"]

# Former names of options, and the new ones: of a call of the model, and of its config.
FORMER_FORM = {"forward_mode": "form"}
FORMER = FORMER_OF_BACKBONE | FORMER_FORM

_BACKBONE_OPTIONS = inspect.signature(RetNetBackbone).parameters.keys() - {"device", "dtype"}
_LAYER_OPTIONS = inspect.signature(MultiScaleRetention).parameters.keys() - {"dim", "num_heads", "device", "dtype"}

# Limits of sizes in a file: a file of a few bytes could ask for a model that takes hours to build.
_MOST_MODULES, _WIDEST = 10_000, 2**24
_SIZES = {
    **dict.fromkeys(("num_layers", "num_heads", "moe_top_k"), (1, _MOST_MODULES)),
    **dict.fromkeys(("moe_every", "moe_num_experts"), (0, _MOST_MODULES)),
    "vocab_size": (0, _WIDEST),
    "num_labels": (0, 2**20),
    **dict.fromkeys(("dim", "ffn_dim", "decoder_value_embed_dim", "recurrent_chunk_size"), (1, _WIDEST)),
}
_LAYER_SIZES = dict.fromkeys(("key_dim", "value_dim", "chunk_size"), (1, _WIDEST))

_Config = TypeVar("_Config", bound=type)


def _with_former_options(config: _Config) -> _Config:
    """Let a class of configs take its options by their former names too, as keywords and as attributes."""
    cls: Any = config
    cls.__init__ = former_options(FORMER, FORMER_FLAGS)(cls.__init__)
    for former in FORMER:
        setattr(cls, former, _former_attribute(former))
    return config


def _former_attribute(former: str) -> property:
    """Return a property that reads and sets an option by its former name."""
    new, values = FORMER[former], FORMER_FLAGS.get(former)

    def read(config: RetNetConfig) -> Any:
        warn_of_former({former: None}, FORMER)
        value = getattr(config, new)
        return value if values is None else value == values[True]

    def write(config: RetNetConfig, value: Any) -> None:
        warn_of_former({former: value}, FORMER)
        setattr(config, new, current_options({former: value}, FORMER, FORMER_FLAGS)[new])

    return property(read, write)


@_with_former_options
@strict
class RetNetConfig(SaysHowToLoad, PreTrainedConfig):
    """The options of a RetNet model: those of `RetNetBackbone` under the same names, and those of the heads.

    Names of transformers (hidden_size, num_hidden_layers, ...) and of other RetNets (decoder_embed_dim, use_lm_decay,
    ...) are accepted too.

    Args:
        vocab_size: number of tokens; 0 builds a model without an embedding, which takes inputs_embeds.
        dim, num_layers, num_heads: width, number of blocks, heads per block.
        ffn_dim to moe_top_k: as in `RetNetBackbone`.
        retention: further options of `MultiScaleRetention`, the same for all blocks, such as {"decay": "log_linear"}.
        form: "parallel", "chunkwise" or "recurrent", with the same result; "auto" leaves it to each layer.
        output_retentions: return the retention scores; in the parallel form only.
        use_cache: return the cache, except in training.
        tie_word_embeddings: the language-model head uses the embedding's weight.
        lm_head_bias: the language-model head has a bias.
        z_loss_coeff: factor of the mean of log^2 Z in the loss, Z the sum of the softmax (PaLM, arXiv:2204.02311).
        router_aux_loss_coef: factor of the loss that balances experts.
        initializer_range: standard deviation of the embedding's initial weights; default dim^-0.5.
        pad_token_id, bos_token_id, eos_token_id: special tokens, for `generate` and for sequence classification.
    Raises: TypeError or ValueError that names the option.
    Example:
        config = RetNetConfig(vocab_size=256, dim=64, num_layers=2, num_heads=4, retention={"decay": "log_linear"})
        model = RetNetForCausalLM(config)
    """

    model_type = "retention"
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_dim",
        "decoder_embed_dim": "dim",
        "decoder_layers": "num_layers",
        "decoder_retention_heads": "num_heads",
        "decoder_ffn_embed_dim": "ffn_dim",
        "decoder_normalize_before": "norm_before",
        "layernorm_eps": "norm_eps",
        "forward_impl": "form",
    }

    vocab_size: int = 256
    dim: int = 256
    num_layers: int = 6
    num_heads: int = 4
    ffn_dim: int | None = None
    gated: bool = True
    ffn_bias: bool = False
    activation: str = "gelu"
    activate_output: bool = False
    ffn_backend: str = "torch"
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_before: bool = True
    final_norm: bool = True
    deepnorm: bool = False
    subln: bool | str = False
    norm_embedding: bool = False
    scale_embedding: bool = False
    dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path_rate: float = 0.0
    moe_every: int = 0
    moe_num_experts: int = 0
    moe_top_k: int = 2
    retention: dict[str, Any] | None = None
    form: str = "auto"
    output_retentions: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    z_loss_coeff: float = 0.0
    router_aux_loss_coef: float = 0.01
    initializer_range: float | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # describes the file, not the model; each file is written with its own
        lm_decay = kwargs.pop("use_lm_decay", None)
        others = {
            "decay": None if lm_decay is None else "log_linear" if lm_decay else "paper",
            "value_dim": kwargs.pop("decoder_value_embed_dim", None),
            "chunk_size": kwargs.pop("recurrent_chunk_size", None),
        }
        width = kwargs.get("hidden_size", self.dim)
        if self.dim not in (width, type(self).dim):  # dim at its default counts as not given
            raise ValueError(f"dim and hidden_size are one; got dim {self.dim}, hidden_size {width}; pass one of them")
        check_whole("dim", self.dim)
        check_whole("num_layers", self.num_layers)
        for name in kwargs.keys() & self.attribute_map.keys():  # transformers computes with them before they are set
            if self.attribute_map[name] in ("dim", "num_layers"):
                check_whole(name, kwargs[name])
        super().__post_init__(**kwargs)  # may set dim, under the name hidden_size
        check_whole("vocab_size", self.vocab_size, 0)
        check_whole("moe_every", self.moe_every, 0)
        check_is("retention", self.retention, dict | None, "options of MultiScaleRetention by name, or None")
        check_flags(use_cache=self.use_cache, output_retentions=self.output_retentions)
        check_flags(tie_word_embeddings=self.tie_word_embeddings, lm_head_bias=self.lm_head_bias)
        for name in ("pad_token_id", "bos_token_id"):
            check_whole(name, getattr(self, name), -1, optional=True)
        for eos in self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]:
            check_whole("eos_token_id", eos, -1, optional=True)
        check_choice("form", self.form, (*FORMS, "auto"))
        for name in ("z_loss_coeff", "router_aux_loss_coef"):
            check_eps(name, getattr(self, name))
        if self.initializer_range is None:
            self.initializer_range = self.dim**-0.5
        check_factor("initializer_range", self.initializer_range)
        given = {name: value for name, value in others.items() if value is not None}
        if self.retention is not None or given:
            options = copy.deepcopy({**(self.retention or {}), **given})
            self.retention = {name: x.tolist() if isinstance(x, Tensor) else x for name, x in options.items()}
        self._check_options()
        self.base_model_tp_plan = plan_of_retnet(self)  # type: ignore[misc]

    def backbone_options(self) -> dict[str, Any]:
        """Return the options of `RetNetBackbone`, by name."""
        return {name: getattr(self, name) for name in _BACKBONE_OPTIONS}

    def _check_options(self) -> None:
        """Raises: ValueError or TypeError that names an option which `RetNetBackbone` refuses."""
        options = self.backbone_options()
        # The backend may be registered later.
        given = {name: x for name, x in (self.retention or {}).items() if name != "backend"}
        check_choice("ffn_backend", self.ffn_backend, FFN_BACKENDS)
        options |= {"num_layers": 1, "moe_every": min(self.moe_every, 2), "ffn_backend": "torch", "retention": given}
        RetNetBackbone(**options, device="meta")  # one block without experts, on a device without memory

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config from a dict, such as the contents of config.json; as in transformers, with stricter checks.

        Raises: ValueError for a config of another model, an option of a wrong type, an unknown option of `retention`,
            or an impossible size.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"model_type must be {cls.model_type!r}; this config is of a {one_line(repr(kind))}; a RetNet of "
                "another library is loaded by retention.integrations.checkpoints.load or `retention convert`"
            )
        warn_of_former(kwargs, FORMER)
        kwargs = current_options(kwargs, FORMER, FORMER_FLAGS)
        with refused("the config makes no RetNet"):
            config_dict = current_options(config_dict, FORMER, FORMER_FLAGS)  # a file of an earlier version
        layer = config_dict.get("retention") or {}
        if not isinstance(layer, dict):
            raise ValueError(
                f"retention must hold options of the layer, by name; got retention {one_line(repr(layer))}"
            )
        if unknown := sorted(layer.keys() - _LAYER_OPTIONS):
            raise ValueError(f"retention has options that no RetNet has: {listed(unknown)}; correct or remove them")
        if fixed := [name for name in config_dict if _is_computed(cls, name)]:
            raise ValueError(f"{listed(fixed)} follow from the other options and cannot be set; remove them")
        _check_sizes({cls.attribute_map.get(name, name): x for name, x in config_dict.items()}, _SIZES)
        _check_sizes(layer, _LAYER_SIZES)
        with refused("the config makes no RetNet"):
            return super().from_dict(config_dict, **kwargs)

    @classmethod
    def strictly_from(cls, options: dict[str, Any], source: object) -> RetNetConfig:
        """Build the config from a dict and refuse unknown options, which `from_dict` keeps.

        Args:
            options: the contents of a config.json.
            source: the place of the options, for errors.
        Raises: ValueError as `from_dict`, and for unknown options.
        """
        with refused(f"{source} has an option that cannot be"):
            config: RetNetConfig = cls.from_dict(dict(options))
        if unknown := sorted(config.to_dict().keys() - cls().to_dict().keys()):
            raise ValueError(f"{source} has options that no RetNet has: {listed(unknown)}; correct or remove them")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return all options; the width appears as `dim` and as `hidden_size`, for other libraries."""
        return {**super().to_dict(), "hidden_size": self.dim}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the options that are written to files; the width appears as `dim` only."""
        return {name: value for name, value in super().to_diff_dict().items() if name != "hidden_size"}

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer, which transformers' caches and masks read."""
        return [LAYER_TYPE] * self.num_layers

    @property
    def head_dim(self) -> int:
        """The number of values in each head's state, as the head size for caches that are allocated early."""
        options = self.retention or {}
        key_dim, value_dim = options.get("key_dim") or self.dim, options.get("value_dim") or 2 * self.dim
        return key_dim // self.num_heads * (value_dim // self.num_heads + bool(options.get("score_norm")))

    def validate_layer_type(self) -> None:
        """Do nothing: the check of transformers knows only its own layer types."""


def _is_computed(cls: type, name: str) -> bool:
    found = getattr(cls, name, None)
    return isinstance(found, property) and found.fset is None


def _check_sizes(options: dict[str, Any], sizes: dict[str, tuple[int, int]]) -> None:
    for name, (least, most) in sizes.items():
        value = options.get(name)
        if value is not None and not (type(value) is int and least <= value <= most):
            raise ValueError(f"{name} must be an integer from {least} to {most:,}; got {name} {one_line(repr(value))}")


AutoConfig.register(RetNetConfig.model_type, RetNetConfig)

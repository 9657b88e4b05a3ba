"""RetNet in the interface of transformers: config, base model and causal language model around `retention.model`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from retention.errors import ShapeError
from retention.layer import MultiScaleRetention
from retention.model import FeedForward, RetNetBackbone, stream
from retention.state import RetentionState


@strict
class RetNetConfig(PreTrainedConfig):
    """The options of `retention.RetNet` under the same names, so that `RetNetConfig(**PRESETS["small"])` works.

    retention: further options of `MultiScaleRetention`, for all blocks. initializer_range: standard deviation of the
    embedding's weights; default dim^-0.5.
    """

    model_type = "retention"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_dim",
    }

    vocab_size: int = 256
    dim: int = 256
    num_layers: int = 6
    num_heads: int = 4
    ffn_dim: int | None = None
    gated_ffn: bool = True
    norm: str = "rms"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    retention: dict[str, Any] | None = None
    tie_word_embeddings: bool = True
    initializer_range: float | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # may set dim, under the name hidden_size
        if self.initializer_range is None:
            self.initializer_range = self.dim**-0.5
        if self.retention is not None:
            lists = {name: x.tolist() if isinstance(x, Tensor) else x for name, x in self.retention.items()}
            self.retention = copy.deepcopy(lists)


class RetNetPreTrainedModel(PreTrainedModel):
    config: RetNetConfig
    config_class = RetNetConfig
    base_model_prefix = "model"
    _no_split_modules = ["RetNetBlock"]  # noqa: RUF012

    def post_init(self) -> None:
        for module in self.modules():
            if isinstance(module, MultiScaleRetention | FeedForward):
                for child in module.children():
                    child.initialised_by_parent = True  # type: ignore[assignment]
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MultiScaleRetention | FeedForward):
            module.reset_parameters()
        elif not getattr(module, "initialised_by_parent", False):
            super()._init_weights(module)


class RetNetModel(RetNetPreTrainedModel):
    """Hidden states of token indices."""

    def __init__(self, config: RetNetConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.backbone = RetNetBackbone(
            config.dim,
            config.num_layers,
            config.num_heads,
            ffn_dim=config.ffn_dim,
            gated_ffn=config.gated_ffn,
            norm=config.norm,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
            retention=config.retention,
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: list[RetentionState] | None = None,
        return_state: bool = False,
    ) -> Any:
        """attention_mask (B, T): 0 = padding. state, return_state: as `retention.RetNet`; gives (hidden, state)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given; got both or none")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = None if attention_mask is None else _padding(attention_mask, x)
        x, after = self.backbone(self.dropout(x), mask=mask, state=state, return_state=return_state)
        return (x, after) if return_state else BaseModelOutput(last_hidden_state=x)


class RetNetForCausalLM(RetNetPreTrainedModel):
    """RetNet with a language-model head and loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RetNetConfig):
        super().__init__(config)
        self.model = RetNetModel(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> CausalLMOutput:
        """labels (B, T): as input_ids, shifted here; -100 is ignored."""
        x = self.model(input_ids, attention_mask, inputs_embeds).last_hidden_state
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    def stream(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
        """Yield the tokens that follow, one (B, 1) at a time; options as `retention.model.stream`."""
        return stream(self._prompt, self._step, input_ids, max_new_tokens, **options)

    def _prompt(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, list[RetentionState]]:
        x, state = self.model(tokens, mask, return_state=True)
        return self.lm_head(x[:, -1:]), state

    def _step(self, tokens: Tensor, state: list[RetentionState]) -> Tensor:
        return self.lm_head(self.model.backbone.step(self.model.embed_tokens(tokens), state))


def _padding(attention_mask: Tensor, x: Tensor) -> Tensor:
    if attention_mask.shape != x.shape[:2]:
        raise ShapeError(
            f"attention_mask must be (batch, length) {tuple(x.shape[:2])}; got {tuple(attention_mask.shape)}"
        )
    return attention_mask.bool()


AutoConfig.register("retention", RetNetConfig)
AutoModel.register(RetNetConfig, RetNetModel)
AutoModelForCausalLM.register(RetNetConfig, RetNetForCausalLM)

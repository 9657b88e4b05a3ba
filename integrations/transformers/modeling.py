"""RetNet as a transformers model: base model and heads around `retention.model.RetNetBackbone`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)

from retention.arguments import check_input, check_token_ids
from retention.backends import FORMS
from retention.ffn import FeedForward, MixtureOfExperts
from retention.former import former_options
from retention.layer import MultiScaleRetention
from retention.model import BlockOutput, RetNetBackbone, RetNetBlock
from retention.options import check_choice, check_is, check_whole, shown
from retention.sharding import refuse, whole_length

from .cache import cache_layer, packed_borders, token_mask
from .compat import (
    CACHE,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
    as_output,
    cache_by_any_name,
    cache_of,
    can_return_tuple,
    check_keywords,
)
from .configuration import FORMER_FORM, RetNetConfig
from .parts import check_parts

__all__ = [
    "CheckpointedBackbone",
    "CheckpointedBlock",
    "RetNetCausalLMOutput",
    "RetNetConfig",
    "RetNetForCausalLM",
    "RetNetForSequenceClassification",
    "RetNetForTokenClassification",
    "RetNetModel",
    "RetNetModelOutput",
    "RetNetPreTrainedModel",
    "shifted",
]

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass
class RetNetModelOutput(BaseModelOutputWithPast):
    """Output of `RetNetModel`.

    Attributes:
        retentions: the scores of each block, (B, num_heads, T, T), with output_retentions.
        aux_loss: the loss that balances experts, or None.
    Further attributes are those of transformers' `BaseModelOutputWithPast`.
    """

    retentions: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None


@dataclass
class RetNetCausalLMOutput(CausalLMOutputWithPast):
    """Output of `RetNetForCausalLM`.

    Attributes:
        loss: cross-entropy plus z-loss and aux_loss, each times its factor.
        retentions, aux_loss: as in `RetNetModelOutput`.
    Further attributes are those of transformers' `CausalLMOutputWithPast`.
    """

    retentions: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None


class CheckpointedBlock(GradientCheckpointingLayer, RetNetBlock):
    """A `RetNetBlock` that transformers' gradient checkpointing finds by its class."""


class CheckpointedBackbone(RetNetBackbone):
    """A `RetNetBackbone` whose gradient checkpointing is that of transformers, block by block."""

    block_class = CheckpointedBlock

    def _run(self, block: nn.Module, x: Tensor, **options: Any) -> BlockOutput:
        return block(x, **options)


class RetNetPreTrainedModel(PreTrainedModel):
    """Base class of the RetNet models: initialisation, and the attributes that transformers reads."""

    config: RetNetConfig
    config_class = RetNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CheckpointedBlock}  # noqa: RUF012
    _no_split_modules = ["CheckpointedBlock"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _is_stateful = True  # `generate` then refuses methods that take tokens back

    def post_init(self) -> None:
        """Mark the modules that their parent initialises; then run transformers' own post_init."""
        for module in self.modules():
            if isinstance(module, MultiScaleRetention | FeedForward | MixtureOfExperts):
                for child in module.children():
                    child.initialised_by_parent = True  # type: ignore[assignment]
        super().post_init()

    def _upload_modified_files(self, *args: Any, **options: Any) -> Any:
        """Upload by the config, which writes a model card that tells how to load the model."""
        return self.config._upload_modified_files(*args, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MultiScaleRetention | FeedForward | MixtureOfExperts):
            module.reset_parameters()
        elif not getattr(module, "initialised_by_parent", False):
            super()._init_weights(module)


class RetNetModel(RetNetPreTrainedModel):
    """RetNet without a head: token indices or embeddings in, hidden states out.

    Args:
        config: a `RetNetConfig`.
    Raises: TypeError if config is not one.
    """

    def __init__(self, config: RetNetConfig):
        check_is("config", config, RetNetConfig, "a RetNetConfig")
        super().__init__(config)
        self.embed_tokens = (
            nn.Embedding(config.vocab_size, config.dim, config.pad_token_id) if config.vocab_size else None
        )
        self.backbone = CheckpointedBackbone(**config.backbone_options())
        self.post_init()

    @cache_by_any_name
    @former_options(FORMER_FORM)
    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_retentions: bool | None = None,
        output_attentions: bool | None = None,
        form: str | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> RetNetModelOutput:
        """Compute the hidden states of input_ids or inputs_embeds; give exactly one of them.

        Shapes: input_ids (B, T) int64; inputs_embeds (B, T, dim). Returns last_hidden_state (B, T, dim).
        Args:
            attention_mask: (B, T), or with a cache (B, tokens so far + T); 0 = padding, left or right.
            cache: the cache that an earlier call returned; this call continues its sequences and updates it. It may be
                passed under the name that any release of transformers uses; `compat.CACHE` is that of the installed
                one.
            position_ids, cu_seq_lens_q, seq_idx: borders of packed sequences, see `packed_borders`. Positions have no
                other effect: time counts real tokens.
            cu_seq_lens_k, max_length_q, max_length_k: ignored; collators pass them.
            use_cache: return the cache. Default: config.use_cache, but False in training.
            output_hidden_states: True for the states of all layers, or a list of layer indices; the others are None
                then.
            output_retentions: return the retention scores, which only the parallel form has.
            output_attentions: must be false, as there are no attention weights.
            form: overrides config.form in this call.
            kwargs: keywords that transformers passes to any model, such as token_type_ids; ignored.
        Returns: a `RetNetModelOutput`.
        Raises: ShapeError or ValueError for arguments that do not fit; TypeError for an unknown keyword.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given; got both or none")
        check_keywords(self, kwargs)
        if inputs_embeds is not None:
            check_input("inputs_embeds", inputs_embeds, self.config.dim)
        elif self.embed_tokens is not None:
            check_token_ids(input_ids, self.config.vocab_size, name="input_ids")
        for name, flag in (("use_cache", use_cache), ("output_retentions", output_retentions)):
            check_choice(name, flag, (True, False, None))
        check_choice("form", form, (*FORMS, "auto", None))
        check_is("cache", cache, Cache | None, "a transformers.Cache, or None")
        self._refuse_what_retention_has_not(output_attentions, **kwargs)
        x = self._embedded(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        mask = token_mask(attention_mask, x, cache is not None)
        packed_rows = 1 if cu_seq_lens_q is None else x.shape[0]
        check_parts(position_ids, seq_idx, mask=mask, packed_rows=packed_rows)
        borders = None
        if attention_mask is None and cache is None:
            borders = packed_borders(x, cu_seq_lens_q, position_ids, seq_idx)
        elif cu_seq_lens_q is not None:
            raise ValueError("packed sequences go without attention_mask and cache; got cu_seq_lens_q with them")
        if borders is not None:
            use_cache = False  # packed sequences are not the rows of the batch
        elif use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        return self._run(
            x,
            mask,
            borders,
            cache,
            form or self.config.form,
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            self.config.output_retentions if output_retentions is None else output_retentions,
        )

    def _refuse_what_retention_has_not(
        self,
        output_attentions: bool | None,
        is_causal: bool | None = None,
        output_router_logits: bool | None = None,
        **_: Any,
    ) -> None:
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("retention has no attention weights; pass output_retentions=True for its scores")
        if is_causal is False:
            raise ValueError("RetNet is causal, and its state knows one direction; got is_causal=False")
        if output_router_logits and self.config.moe_every:
            raise ValueError("the experts' logits are not kept, only aux_loss is; got output_router_logits=True")

    def _embedded(self, input_ids: Tensor | None) -> Tensor:
        if self.embed_tokens is None:
            raise ValueError("this model has no embedding (vocab_size 0); pass inputs_embeds instead of input_ids")
        return self.embed_tokens(input_ids)

    def _run(
        self,
        x: Tensor,
        mask: Tensor | None,
        borders: Tensor | None,
        cache: Cache | None,
        form: str,
        hidden_states: bool | list[int] | None,
        retentions: bool,
    ) -> RetNetModelOutput:
        layers = [] if cache is None else [cache_layer(cache, i) for i in range(self.config.num_layers)]
        state: Any = None
        if layers and layers[0].is_initialized:
            state = [layer.state_for(b.retention) for layer, b in zip(layers, self.backbone.blocks, strict=True)]
        one_token = x.shape[1] == 1 and form in ("auto", "recurrent") and not torch.is_grad_enabled()
        if state is not None and one_token and not retentions:
            out = self.backbone.step(x, state, mask=mask)
        else:
            out = self.backbone(
                x if borders is None else x.view(1, -1, x.shape[-1]),
                mask=mask,
                cu_seqlens=borders,
                state=state,
                return_state=cache is not None,
                return_layers=bool(hidden_states),
                return_scores=retentions,
                form=None if form == "auto" else form,  # each layer's own form
            )
        for layer, after in zip(layers, out.state or [], strict=True):
            layer.store(after, whole_length(x.shape[1]))
        *inner, last = (_as_batch(y, x) for y in (*(out.layers or [])[:-1], out.hidden))
        return RetNetModelOutput(
            last_hidden_state=last,
            hidden_states=_chosen((*inner, last), hidden_states) if hidden_states else None,
            retentions=tuple(out.scores or ()) if retentions else None,
            aux_loss=out.aux_loss,
            **as_output(cache),
        )


def _as_batch(y: Tensor, x: Tensor) -> Tensor:
    """Return y in the shape of x; y itself if it has that shape, as a view of it would receive no gradient."""
    return y if y.shape == x.shape else y.view_as(x)


def _chosen(layers: tuple[Tensor, ...], which: bool | list[int]) -> tuple[Any, ...]:
    if isinstance(which, bool):
        return layers
    wanted = {range(len(layers))[i] for i in which}
    return tuple(layer if i in wanted else None for i, layer in enumerate(layers))


def _takes_also(other: Callable[..., Any]) -> Callable[[_F], _F]:
    """Decorate a function that hands its keyword arguments on, so that its signature shows those of `other`.

    transformers reads it: `generate` refuses other arguments, and the Trainer drops other columns of a dataset.
    """

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        *own, rest = signature.parameters.values()  # rest: **kwargs
        named = {p.name for p in own} | {rest.name}
        more = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(other).parameters.values()]
        shown = [*own, *(p for p in more if p.name not in named), rest]
        function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        return function

    return decorate


class RetNetForCausalLM(RetNetPreTrainedModel, GenerationMixin):
    """RetNet with a language-model head and its loss.

    Args:
        config: a `RetNetConfig`.
    Example:
        model = RetNetForCausalLM(RetNetConfig(vocab_size=256, dim=64, num_layers=2, num_heads=4))
        loss = model(input_ids, labels=input_ids).loss
        tokens = model.generate(input_ids, max_new_tokens=20)
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: RetNetConfig):
        super().__init__(config)
        self.model = RetNetModel(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @cache_by_any_name
    @can_return_tuple  # type: ignore[untyped-decorator]
    @_takes_also(RetNetModel.forward)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> RetNetCausalLMOutput:
        """Compute logits, and the loss if there are labels.

        Further keyword arguments are those of `RetNetModel.forward`.

        Shapes: returns logits (B, T, vocab_size), or fewer with logits_to_keep.
        Args:
            labels: (B, T) int64, the tokens of input_ids; the loss shifts them by one. -100 is ignored.
            logits_to_keep: number of logits to compute, counted from the end; 0 for all; or a tensor of indices.
            num_items_in_batch: divisor of the loss. Default: the number of labels.
            shift_labels: (B, T) int64, by keyword: labels that are already shifted; replaces `labels`.
        Returns: a `RetNetCausalLMOutput`.
        Raises: as `RetNetModel.forward`; TypeError unless labels are an int64 tensor of two dimensions.
        """
        if labels is not None and not (isinstance(labels, Tensor) and labels.dim() == 2 and labels.dtype == torch.long):
            raise TypeError(f"labels must be an int64 tensor (batch, length); got labels {shown(labels)}")
        if not isinstance(logits_to_keep, Tensor):
            check_whole("logits_to_keep", logits_to_keep, 0)
        # shift_labels is no parameter: the Trainer takes each parameter with "label" in its name for a required label.
        shift_labels = kwargs.pop("shift_labels", None)
        check_parts(labels=labels if shift_labels is None else None)
        out = self.model(input_ids, attention_mask, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        targets = shifted(labels) if shift_labels is None else shift_labels
        loss = None if targets is None else self._loss(logits, targets, num_items_in_batch, out.aux_loss)
        return RetNetCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            retentions=out.retentions,
            aux_loss=out.aux_loss,
            **as_output(cache_of(out)),
        )

    @former_options(FORMER_FORM)
    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        refuse("generate", "leave the context to decode")
        return super().generate(*args, **kwargs)

    def _loss(self, logits: Tensor, targets: Tensor, items: Tensor | int | None, aux_loss: Tensor | None) -> Tensor:
        """The loss of logits with targets (B, T), the token that each logit predicts; -100 is ignored."""
        options = dict(vocab_size=self.config.vocab_size, shift_labels=targets, num_items_in_batch=items)
        loss = self.loss_function(logits=logits, labels=None, **options)
        counted = targets.to(logits.device) != -100
        count = counted.sum() if items is None else torch.as_tensor(items, device=loss.device)
        if self.config.z_loss_coeff:
            log_z = logits.float().logsumexp(-1)[counted]
            loss = loss + self.config.z_loss_coeff * log_z.square().sum() / count
        if aux_loss is not None:
            loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device) * (counted.sum() / count)
        return loss


def shifted(labels: Tensor | None) -> Tensor | None:
    """Return the labels shifted by one token; the last one is -100."""
    return None if labels is None else nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


class RetNetForSequenceClassification(GenericForSequenceClassification, RetNetPreTrainedModel):
    """RetNet with a linear head on the last real token of each sequence."""

    accepts_loss_kwargs = False  # the loss is a mean; the Trainer divides it by the number of accumulated batches

    @functools.wraps(GenericForSequenceClassification.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        refuse("the last token of each sequence", "classify outside, or use RetNetForTokenClassification")
        return super().forward(*args, **kwargs)


class RetNetForTokenClassification(GenericForTokenClassification, RetNetPreTrainedModel):
    """RetNet with a linear head on every token."""

    accepts_loss_kwargs = False


AutoModel.register(RetNetConfig, RetNetModel)
AutoModelForCausalLM.register(RetNetConfig, RetNetForCausalLM)
AutoModelForSequenceClassification.register(RetNetConfig, RetNetForSequenceClassification)
AutoModelForTokenClassification.register(RetNetConfig, RetNetForTokenClassification)

"""Every public door of the integrations refuses what does not fit, before any computation, by the argument's name."""

import copy
import itertools
import math

import doors
import pytest
import torch
import transformers
from doors import DIM, HEADS, IDS, VOCAB, B, Door, T, X, cases, check_refusals

from retention import MultiScaleRetention
from retention.integrations import timm as timm_retention
from retention.integrations import torchscale
from retention.integrations.nanogpt import NanoGPTAttention
from retention.integrations.swap import (
    Heads,
    HostedRetention,
    plan_replacement,
    register_adapter,
    replace_attention,
    restore_attention,
)
from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM, register_attn_implementation
from retention.integrations.transformers.training.distill import recover, replace_in_parts

# Wrong for any number of heads.
NO_DECAY = ["fast", "", 5, None, True, b"ab", [0.1, -0.1], [math.nan] * 2, ["a", "b"], [False, False], {0: -0.1}]
HOSTED = dict(
    num_decays=doors.MAYBE_WHOLE,
    decay=[x for x in NO_DECAY if x is not None],
    learnable_decay=doors.FLAG,
    features=doors.FLAG,
    key_importance=[x for x in doors.FLAG if x is not None],
    window=doors.MAYBE_WHOLE,
    sinks=doors.COUNT,
    gate=doors.NAME,
    causal=["no", 1, 0, False, [True]],
    grid_decay=doors.FLAG,
    backend=[*doors.NAME, None],
    form=[*doors.NAME, None],
    chunk_size=doors.MAYBE_WHOLE,
)
COUNTS_OF_CONFIG = [True, -2, 1.5, "2", math.nan, [2]]


def their_config():
    return torchscale.RetNetConfig(
        vocab_size=VOCAB,
        decoder_embed_dim=DIM,
        decoder_retention_heads=HEADS,
        decoder_layers=1,
        decoder_ffn_embed_dim=8,
    )


def llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=DIM, intermediate_size=8, num_hidden_layers=2, num_attention_heads=HEADS
    )
    return transformers.LlamaForCausalLM(config).eval()


def integration_doors():
    numbers = itertools.count()
    heads = Heads(DIM, HEADS, HEADS, 8, 8)
    hosted = HostedRetention(heads).eval()
    q = torch.randn(B, HEADS, T, 8)
    causal_lm = RetNetForCausalLM(RetNetConfig(vocab_size=VOCAB, dim=DIM, num_layers=1, num_heads=HEADS)).eval()
    decoder = torchscale.RetNetDecoder(their_config()).eval()
    encoder = torch.nn.MultiheadAttention(DIM, HEADS, batch_first=True).eval()
    replace_attention(encoder)
    swapped = llama()
    replace_attention(swapped)
    replacing = dict(
        model=[None, "model", transformers.LlamaForCausalLM],
        layers=["0", 1, [0.5], [True], ["0"], [2], [-3]],
        where=[3, "layers.0", [0]],
        allow_lost=doors.FLAG,
        **{
            name: [x for x in values if not (name == "decay" and isinstance(x, list | torch.Tensor) and len(x) == 4)]
            for name, values in HOSTED.items()
        },
    )
    config = {name: values for name, values in doors.BACKBONE.items() if name not in ("device", "dtype")}
    config |= dict(
        vocab_size=doors.COUNT,
        num_heads=doors.WHOLE,
        form=[*doors.NAME, None],
        use_cache=doors.FLAG,
        lm_head_bias=doors.FLAG,
    )
    config |= dict(
        tie_word_embeddings=doors.FLAG,
        output_retentions=doors.FLAG,
        z_loss_coeff=doors.EPS,
        router_aux_loss_coef=doors.EPS,
    )
    config |= dict(initializer_range=[x for x in doors.FACTOR if x is not None], bos_token_id=["a", True, 1.5])
    theirs = dict.fromkeys(("decoder_embed_dim", "decoder_layers", "decoder_retention_heads"), doors.WHOLE)
    theirs |= dict.fromkeys(("dropout", "layernorm_eps", "drop_path_rate"), doors.EPS)
    theirs |= dict.fromkeys(("subln", "deepnorm", "chunkwise_recurrent", "no_scale_embedding"), doors.FLAG)
    theirs |= dict(vocab_size=COUNTS_OF_CONFIG, recurrent_chunk_size=doors.COUNT, activation_fn=[None, 3, ["gelu"]])
    ids = [x for x in doors.IDS_WRONG if x is not None]
    recovering = dict(model=swapped, train_data=[], valid_data=[], out="runs")
    return {
        "Heads": Door(
            Heads,
            lambda: dict(dim=DIM, num_heads=2, num_kv_heads=2, key_dim=8, value_dim=8),
            dict.fromkeys(("dim", "num_heads", "num_kv_heads", "key_dim", "value_dim"), doors.WHOLE),
        ),
        "HostedRetention": Door(
            HostedRetention,
            lambda: dict(heads=heads, num_decays=1),
            dict(HOSTED, heads=[None, 3, (DIM, 2)], device=doors.DEVICE, dtype=doors.DTYPE),
        ),
        "HostedRetention.forward": Door(
            hosted.forward,
            lambda: dict(x=X, q=q, k=q, v=q, scale=0.5),
            dict(
                x=[*doors.INPUT[:8], *doors.INPUT[12:13]],
                **{name: [None, 3, q.tolist(), q.long(), q[0], q[..., :-1]] for name in "qkv"},
                scale=[*doors.SCALE, None],
                causal=doors.FLAG,
                mask=doors.MASK,
                cu_seqlens=doors.FORWARD["cu_seqlens"],
                state=[{}, 3, [], q],
                return_state=doors.FLAG,
                prefix=doors.COUNT,
            ),
        ),
        "replace_attention": Door(
            replace_attention,
            lambda: dict(model=llama(), num_decays=1),
            dict(replacing, init=[*doors.NAME, None], calibrate_on=[3, [IDS], IDS]),
            hides=tuple(HOSTED),
        ),
        "plan_replacement": Door(
            plan_replacement, lambda: dict(model=llama(), num_decays=1), replacing, hides=tuple(HOSTED)
        ),
        "restore_attention": Door(
            restore_attention, lambda: dict(model=copy.deepcopy(swapped)), dict(model=[None, "model", 3])
        ),
        "register_adapter": Door(
            register_adapter,
            lambda: dict(attention=f"tests.{next(numbers)}", adapter=NanoGPTAttention()),
            dict(attention=[None, 3, torch.nn.Linear(2, 2), int], adapter=[None, "adapter", NanoGPTAttention]),
        ),
        "register_attn_implementation": Door(
            register_attn_implementation,
            lambda: dict(name="retention"),
            dict(
                name=[None, 3, ["retention"]],
                decay=NO_DECAY,
            ),
        ),
        "RetNetConfig": Door(
            RetNetConfig, lambda: dict(dim=DIM, num_heads=HEADS, num_layers=2), config, hides=tuple(config)
        ),
        "RetNetForCausalLM": Door(
            RetNetForCausalLM, lambda: dict(config=RetNetConfig(dim=DIM, num_heads=HEADS)), dict(config=[None, 3, {}])
        ),
        "RetNetForCausalLM.forward": Door(
            causal_lm.forward,
            lambda: dict(input_ids=IDS),
            dict(
                input_ids=ids,
                attention_mask=[3, "x", [[1] * T] * B, torch.ones(B, T - 1), torch.ones(T), torch.tensor(1)],
                labels=[3, "x", IDS.tolist(), IDS.float(), IDS[0]],
                use_cache=["no", 1],
                logits_to_keep=[True, -1, 1.5, "a"],
                output_retentions=["no", 1],
                form=doors.NAME,
            ),
            hides=("name",),
        ),
        "RetNetForCausalLM.forward on embeddings": Door(
            causal_lm.forward,
            lambda: dict(inputs_embeds=X),
            dict(inputs_embeds=[*doors.INPUT[1:8], *doors.INPUT[9:13]]),
        ),
        "torchscale.RetNetConfig": Door(torchscale.RetNetConfig, dict, theirs),
        "torchscale.RetNetDecoder": Door(
            torchscale.RetNetDecoder, lambda: dict(args=their_config()), dict(args=[None, 3, {}, object()])
        ),
        "torchscale.RetNetDecoder.forward": Door(
            decoder.forward,
            lambda: dict(prev_output_tokens=IDS),
            dict(
                prev_output_tokens=doors.IDS_WRONG[:9],
                incremental_state=[3, [], "x"],
                features_only=doors.FLAG,
                token_embeddings=doors.INPUT[1:8],
            ),
        ),
        "torch's MultiheadAttention": Door(
            encoder.forward,
            lambda: dict(query=X, key=X, value=X),
            dict(
                key_padding_mask=[3, "x", torch.ones(B, T).long(), torch.ones(B, T - 1).bool(), torch.ones(T).bool()],
                attn_mask=[3, "x", torch.ones(T, T).long(), torch.ones(T, T - 1), torch.ones(T).bool()],
            ),
        ),
        "timm's retention_layer": Door(timm_retention.retention_layer, dict, HOSTED, hides=tuple(HOSTED)),
        "timm's Pyramid": Door(
            timm_retention.pyramid.Pyramid,
            lambda: dict(dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1)),
            dict(
                softmax=doors.FLAG,
                in_chans=doors.WHOLE,
                num_classes=doors.COUNT,
                drop_rate=doors.RATE,
                drop_path_rate=doors.RATE,
                proj_drop_rate=doors.RATE,
                conv_head=doors.FLAG,
                use_aux_head=doors.FLAG,
                feature_norms=doors.FLAG,
                by_axis=[True, (True,) * 4, (1,) * 4],
                img_size=[True, 0, -8, 1.5, "8", (8,), (8, 0), (8, 8, 8), (8.0, 8)],
                device=doors.DEVICE,
                dtype=doors.DTYPE,
                gate=doors.NAME,
                gates=[None],
            ),
            hides=("gate", "gates"),
        ),
        "recover": Door(
            recover,
            lambda: recovering,
            dict(
                model=[None, 3, MultiScaleRetention(DIM, HEADS)],
                out=[None, 3],
                teacher=[3, "teacher"],
                transfer_steps=doors.COUNT,
                tuning_steps=doors.COUNT,
                batch=doors.WHOLE,
                transfer_lr=[x for x in doors.FACTOR if x is not None],
                tuning_lr=[x for x in doors.FACTOR if x is not None],
                label_weight=doors.EPS,
            ),
            runs=False,
        ),
        "replace_in_parts": Door(
            replace_in_parts,
            lambda: dict(recovering, model=llama(), parts=[[0], [1]]),
            dict(parts=[None, 3, "01", [0, 1]], out=[None, 3], options=[3, "a", []]),
            runs=False,
        ),
    }


DOORS = integration_doors()


@pytest.mark.slow
@pytest.mark.parametrize(("door", "name"), cases(DOORS))
def test_what_does_not_fit_is_refused_by_name_before_any_computation(door, name):
    check_refusals(DOORS[door], name)


@pytest.mark.parametrize("door", [name for name, door in DOORS.items() if door.runs])
def test_what_fits_is_taken(door):
    DOORS[door].call(**DOORS[door].valid())

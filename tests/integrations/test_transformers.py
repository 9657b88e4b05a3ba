"""RetNet in transformers' interface."""

import inspect
import json
import math
from functools import partial

import peft
import pytest
import torch
from hosts import build
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from retention import RetNet, ShapeError
from retention.integrations.swap import replace_attention
from retention.integrations.transformers import (
    RetNetConfig,
    RetNetForCausalLM,
    RetNetForSequenceClassification,
    RetNetForTokenClassification,
    RetNetModel,
)
from retention.integrations.transformers.compat import CACHE, GradientCheckpointingLayer
from retention.integrations.transformers.decoding import stream
from retention.model import PRESETS

SMALL = dict(vocab_size=256, dim=16, num_layers=2, num_heads=2)


def make(**options):
    torch.manual_seed(0)
    return RetNetForCausalLM(RetNetConfig(**SMALL, **options)).eval()


# --- the model --------------------------------------------------------------------------------------------------------


def test_is_the_same_function_as_retnet():
    model, plain = make(retention={"decay": "log_linear"}), RetNet(256, 16, 2, 2, retention={"decay": "log_linear"})
    names = {"model.embed_tokens": "embedding", "model.backbone": "backbone", "lm_head": "head"}
    weights = {}
    for name, value in model.state_dict().items():
        old = next(old for old in names if name.startswith(old))
        weights[names[old] + name[len(old) :]] = value
    plain.load_state_dict(weights)
    tokens = torch.randint(256, (2, 7))
    assert torch.equal(model(tokens).logits, plain.eval()(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_round_trip(tmp_path, dtype):
    """Decays are no buffers, so loading cannot leave them uninitialised, nor half precision round them."""
    model = make(retention={"learnable_decay": True, "norm_affine": "shared"})
    torch.nn.init.constant_(model.model.backbone.blocks[1].retention.decay.shift, -2.0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    assert isinstance(loaded, RetNetForCausalLM)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tokens = torch.randint(256, (2, 7))
    want = model.to(dtype)(tokens).logits
    torch.testing.assert_close(loaded.eval()(tokens).logits, want)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "RetNetModel"


@pytest.mark.slow
def test_how_the_feed_forward_runs_is_an_option_of_the_config_and_not_of_the_weights(tmp_path):
    model, tokens = make(activation="silu"), torch.randint(256, (2, 7))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, ffn_backend="xformers", output_loading_info=True)
    assert not any(info.values())
    assert [block.ffn.backend for block in loaded.model.backbone.blocks] == ["xformers"] * 2
    torch.testing.assert_close(loaded.eval()(tokens).logits, model(tokens).logits)
    loaded.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.ffn_backend == "xformers"


def test_initialisation_is_the_layers_own():
    model = RetNetForCausalLM(RetNetConfig(dim=256, num_layers=1))
    block = model.model.backbone.blocks[0]
    bound = 2**-2.5 * math.sqrt(6 / (256 + 256))  # Xavier, gain 2^-2.5
    assert block.retention.q_proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert model.lm_head.weight.std().item() == pytest.approx(256**-0.5, rel=0.03)


def test_a_head_of_somebody_elses_is_initialised_when_it_is_new(tmp_path):
    class Classifier(RetNetForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.score = torch.nn.Linear(16, 3)
            self.post_init()

    make().save_pretrained(tmp_path)
    loaded = Classifier.from_pretrained(tmp_path)
    assert loaded.score.weight.std().item() == pytest.approx(16**-0.5, rel=0.3)
    assert not loaded.score.bias.any()


def test_config_goes_by_its_own_names_and_those_of_transformers():
    config = RetNetConfig(hidden_size=64, num_hidden_layers=3, retention={"decay": torch.tensor([-1.0] * 4)})
    assert (config.dim, config.num_layers) == (64, 3)
    assert config.initializer_range == pytest.approx(1 / 8)
    assert config.retention == {"decay": [-1.0] * 4}
    config = RetNetConfig(**PRESETS["tiny"])
    config.retention["rotary"] = None
    assert PRESETS["tiny"]["retention"]["rotary"] == "rope"


def test_loss_is_the_shifted_cross_entropy_and_ignores_padding():
    model, tokens = make(), torch.randint(256, (1, 9))
    out = model(tokens, labels=tokens)
    want = torch.nn.functional.cross_entropy(out.logits[0, :-1], tokens[0, 1:])
    torch.testing.assert_close(out.loss, want)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], 1)
    mask = (torch.arange(13) >= 4).long()[None]
    labels = padded.masked_fill(mask == 0, -100)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 4:], out.logits)
    labels[:, 4] = -100
    torch.testing.assert_close(model(padded, attention_mask=mask, labels=labels).loss, want)


def test_streaming_is_recurrent_and_matches_the_full_forward():
    model, tokens = make(), torch.randint(256, (2, 5))
    new = torch.cat(list(stream(model, tokens, 6, temperature=0)), 1)
    whole = torch.cat([tokens, new], 1)
    assert torch.equal(model(whole).logits[:, 4:-1].argmax(-1), new)


def test_bad_input_is_named():
    model = make()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(TypeError, match="attn_mask"):
        model(torch.zeros(1, 3, dtype=torch.long), attn_mask=torch.ones(1, 3))
    with pytest.raises(ShapeError, match=r"attention_mask must be \(batch, length\) \(1, 3\); got \(1, 4\)"):
        model(torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_the_decays_exact(tmp_path, dtype):
    model = make(retention={"decay": [-(2.0**-12), -(2.0**-13)]})
    model.save_pretrained(tmp_path)
    loaded = RetNetForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    retention = loaded.model.backbone.blocks[0].retention
    assert retention.q_proj.weight.dtype == dtype
    assert retention.decay(torch.device("cpu")).tolist() == [-(2.0**-12), -(2.0**-13)]


def test_config_understands_the_options_of_other_retnets():
    config = RetNetConfig(
        decoder_embed_dim=64,
        decoder_value_embed_dim=96,
        decoder_layers=3,
        decoder_retention_heads=2,
        decoder_ffn_embed_dim=80,
        use_lm_decay=True,
        recurrent_chunk_size=32,
        forward_impl="chunkwise",
    )
    assert (config.dim, config.num_layers, config.num_heads, config.ffn_dim) == (64, 3, 2, 80)
    assert config.retention == {"decay": "log_linear", "value_dim": 96, "chunk_size": 32}
    assert config.form == "chunkwise"
    block = RetNetForCausalLM(config).model.backbone.blocks[0]
    assert (block.ffn.fc1.out_features, block.retention.value_dim, block.retention.chunk_size) == (80, 96, 32)
    assert RetNetConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


FORMER_WORDS = dict(use_glu=False, activation_fn="relu", layernorm_embedding=True, no_scale_embedding=False)
FORMER_WORDS |= dict(moe_freq=2, moe_expert_count=3, moe_top1_expert=True, forward_mode="chunkwise")
NEW_WORDS = dict(gated=False, activation="relu", norm_embedding=True, scale_embedding=True)
NEW_WORDS |= dict(moe_every=2, moe_num_experts=3, moe_top_k=1, form="chunkwise")


def test_a_saved_config_of_an_earlier_version_opens(tmp_path):
    config = RetNetConfig(**NEW_WORDS)
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = {name: value for name, value in json.loads(file.read_text()).items() if name not in NEW_WORDS}
    file.write_text(json.dumps(saved | FORMER_WORDS))
    assert RetNetConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()  # a warning would be an error
    assert AutoConfig.from_pretrained(tmp_path).backbone_options() == config.backbone_options()
    assert RetNetConfig.strictly_from(json.loads(file.read_text()), file).to_dict() == config.to_dict()
    file.write_text(json.dumps(saved | FORMER_WORDS | {"gated": True}))
    with pytest.raises(ValueError, match="use_glu is a former name of gated; got both"):
        RetNetConfig.from_pretrained(tmp_path)


def test_former_names_of_options_of_a_config_work_with_a_warning(tmp_path):
    with pytest.warns(DeprecationWarning, match="is deprecated and will be removed in 0.2; use "):
        config = RetNetConfig(**FORMER_WORDS)
    assert config.to_dict() == RetNetConfig(**NEW_WORDS).to_dict()
    RetNetConfig().save_pretrained(tmp_path)
    with pytest.warns(DeprecationWarning, match="is deprecated and will be removed in 0.2; use "):
        assert RetNetConfig.from_pretrained(tmp_path, **FORMER_WORDS).to_dict() == config.to_dict()
    with pytest.raises(TypeError, match="use_glu is a former name of gated; got both"):
        RetNetConfig(use_glu=True, gated=True)


def test_the_former_name_of_the_form_of_a_call_works_with_a_warning():
    model, tokens = make(retention={"form": "chunkwise"}), torch.randint(256, (1, 5))
    for call in (model, model.model, partial(model.generate, max_new_tokens=2, do_sample=False)):
        with pytest.warns(DeprecationWarning, match="the option forward_mode is deprecated .*; use form"):
            call(tokens, forward_mode="parallel")
        with pytest.raises(TypeError, match="forward_mode is a former name of form; got both"):
            call(tokens, forward_mode="parallel", form="parallel")
    with (
        pytest.warns(DeprecationWarning, match="use form"),
        pytest.raises(ValueError, match="form must be one of .*; got form 'serial'"),
    ):
        model(tokens, forward_mode="serial")


def test_former_names_of_attributes_of_a_config_work_with_a_warning():
    config, wanted = RetNetConfig(), RetNetConfig(**NEW_WORDS)
    for name, value in FORMER_WORDS.items():
        with pytest.warns(DeprecationWarning, match=f"{name} is deprecated"):
            setattr(config, name, value)
        with pytest.warns(DeprecationWarning, match=f"{name} is deprecated"):
            assert getattr(config, name) == value
    assert config.to_dict() == wanted.to_dict()


def test_the_width_has_the_name_that_other_libraries_look_for(tmp_path):
    config = RetNetConfig(dim=64)
    assert config.to_dict()["hidden_size"] == 64
    assert RetNetConfig(**config.to_dict()).dim == 64
    config.save_pretrained(tmp_path)
    assert "hidden_size" not in (tmp_path / "config.json").read_text()  # one name, should one edit it
    assert RetNetConfig.from_pretrained(tmp_path, dim=32).dim == 32
    with pytest.raises(ValueError, match="dim and hidden_size are one; got dim 32, hidden_size 64"):
        RetNetConfig(**config.to_dict() | {"dim": 32})


def test_the_default_config_runs():
    assert RetNetForCausalLM(RetNetConfig())(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 256)


OPTIONS = [
    {"deepnorm": True, "dropout": 0.1, "activation_dropout": 0.1, "drop_path_rate": 0.2},
    {"gated": False, "subln": True, "ffn_bias": True, "lm_head_bias": True, "tie_word_embeddings": False},
    {"norm_embedding": True, "scale_embedding": True, "z_loss_coeff": 1e-2, "activation": "silu"},
    {"moe_every": 2, "moe_num_experts": 4},
    {"moe_every": 1, "moe_num_experts": 2, "moe_top_k": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_every_option_trains_every_parameter_and_survives_saving(tmp_path, options):
    model, tokens = make(**options), torch.randint(256, (3, 20))
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded, info = RetNetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)


def test_z_loss_is_the_mean_of_the_squared_log_of_the_softmax_sum():
    plain, model, tokens = make(), make(z_loss_coeff=0.1), torch.randint(256, (2, 9))
    labels = tokens.masked_fill(torch.arange(9) < 3, -100)
    out = model(tokens, labels=labels)
    log_z = out.logits[:, 2:-1].exp().sum(-1).log()
    torch.testing.assert_close(out.loss, plain(tokens, labels=labels).loss + 0.1 * (log_z**2).mean())


@pytest.mark.parametrize("given", [True, False])
def test_labels_that_are_shifted_already_take_the_place_of_labels(given):
    """Under context parallelism each process has a part, with the next part's first token as its last label."""
    model, tokens = make(z_loss_coeff=0.1), torch.randint(256, (2, 9))
    shifted = torch.cat([tokens[:, 1:], torch.tensor([[7], [-100]])], dim=1)
    other = {"labels": torch.randint(256, (2, 9))} if given else {}
    out = model(tokens, shift_labels=shifted, **other)
    log_z, counted = out.logits.exp().sum(-1).log(), shifted != -100
    entropy = torch.nn.functional.cross_entropy(out.logits[counted], shifted[counted])
    torch.testing.assert_close(out.loss, entropy + 0.1 * (log_z[counted] ** 2).mean())
    items = model(tokens, shift_labels=shifted, **other, num_items_in_batch=torch.tensor(34)).loss
    torch.testing.assert_close(items, out.loss / 2)


def test_the_experts_loss_is_added():
    model, tokens = make(moe_every=2, moe_num_experts=4), torch.randint(256, (2, 9))
    out = model(tokens, labels=tokens)
    assert out.aux_loss.item() > 0.9
    # A step of several batches or processes divides each by all tokens, and adds them up.
    half = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(2 * 2 * 8)).loss
    torch.testing.assert_close(half, out.loss / 2)
    model.config.router_aux_loss_coef = 0.0
    torch.testing.assert_close(out.loss - 0.01 * out.aux_loss, model(tokens, labels=tokens).loss)


def test_loss_is_divided_by_the_items_of_all_accumulated_batches():
    model, tokens = make(z_loss_coeff=0.1), torch.randint(256, (2, 9))
    mean, parts = (
        model(tokens, labels=tokens).loss,
        model(tokens, labels=tokens, num_items_in_batch=torch.tensor(32)).loss,
    )
    torch.testing.assert_close(parts, mean / 2)


def test_right_padding_in_training_is_each_row_alone():
    model, tokens = make(), torch.randint(256, (2, 9))
    labels = tokens.clone()
    labels[0, 5:] = -100
    mask = (labels != -100).long()
    out = model(tokens, attention_mask=mask, labels=labels)
    alone = [model(tokens[:1, :5]), model(tokens[1:])]
    torch.testing.assert_close(out.logits[0, :5], alone[0].logits[0])
    nll = [
        torch.nn.functional.cross_entropy(a.logits[0, :-1], row[1 : a.logits.shape[1]], reduction="none")
        for a, row in zip(alone, tokens, strict=True)
    ]
    torch.testing.assert_close(out.loss, torch.cat(nll).mean())


PACKED = [
    {},
    {"return_flash_attn_kwargs": True, "return_position_ids": False},
    {"return_seq_idx": True, "return_position_ids": False},
]


@pytest.mark.parametrize("options", PACKED, ids=lambda options: "-".join(options) or "position_ids")
def test_packed_batches_of_the_flattening_collator_are_each_sequence_alone(options):
    model = make()
    rows = [torch.randint(256, (n,)).tolist() for n in (70, 3, 129)]
    batch = DataCollatorWithFlattening(**options)([{"input_ids": row} for row in rows])
    out = model(**batch)
    alone = [model(torch.tensor([row])).logits[0] for row in rows]
    torch.testing.assert_close(out.logits[0], torch.cat(alone), rtol=1e-4, atol=1e-5)
    nll = [
        torch.nn.functional.cross_entropy(a[:-1], torch.tensor(row[1:]), reduction="sum")
        for a, row in zip(alone, rows, strict=True)
    ]
    torch.testing.assert_close(out.loss, sum(nll) / sum(len(row) - 1 for row in rows))
    assert CACHE not in out


@pytest.mark.slow
def test_the_trainer_takes_packed_batches_and_accumulates_them_exactly(tmp_path):
    """The same step from one batch of four as from four of one, although they differ in length."""
    rows = [{"input_ids": torch.randint(256, (n,)).tolist()} for n in (30, 3, 70, 9)]
    weights = []
    for batch, accumulated in ((4, 1), (1, 4)):
        model = make()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            lr_scheduler_type="constant",
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, DataCollatorWithFlattening(), train_dataset=rows)
        trainer.train()
        weights.append(model.model.embed_tokens.weight)
    torch.testing.assert_close(*weights)
    assert not torch.allclose(weights[0], make().model.embed_tokens.weight)
    logits = trainer.predict(rows[:1]).predictions
    assert logits.shape == (1, 30, 256)  # without the cache


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "label"), [(RetNetForSequenceClassification, 1), (RetNetForTokenClassification, [0, 1, 2] * 3)]
)
def test_the_trainer_trains_classifiers_and_accumulates_their_batches(tmp_path, head, label):
    """The same step from one batch of four as from four of one, as the loss is a mean."""
    rows = [{"input_ids": torch.randint(1, 256, (9,)).tolist(), "labels": label} for _ in range(4)]
    weights = []
    for batch, accumulated in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = head(RetNetConfig(**SMALL, num_labels=3, pad_token_id=0))
        model.train = lambda mode=True, model=model: model  # no dropout
        before = model.score.weight.clone()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            lr_scheduler_type="constant",
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model.eval(), arguments, train_dataset=rows)
        trainer.train()
        weights.append(model.score.weight.detach())
        assert not torch.allclose(weights[-1], before)
    torch.testing.assert_close(*weights)
    assert trainer.predict(rows[:1]).predictions.shape[-1] == 3


def test_several_packed_rows():
    model, tokens = make(), torch.randint(256, (2, 10))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]])
    logits = model(tokens, position_ids=positions).logits
    for row, start, end in ((0, 0, 4), (0, 4, 10), (1, 0, 8), (1, 8, 10)):
        torch.testing.assert_close(logits[row, start:end], model(tokens[row : row + 1, start:end]).logits[0])
    torch.testing.assert_close(model(tokens, position_ids=torch.arange(10)[None]).logits, model(tokens).logits)


@pytest.mark.parametrize("packed", [False, True])
def test_returned_hidden_states_are_those_of_the_graph(packed):
    model, tokens = make(), torch.randint(256, (1, 9))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]]) if packed else None
    out = model(tokens, position_ids=positions, output_hidden_states=True)
    for x in out.hidden_states:
        x.retain_grad()
    out.logits[0, 4].sum().backward()
    for x in out.hidden_states:
        assert x.grad[0, 4].any()
        assert not x.grad[0, 5:].any()


def test_hidden_states_of_some_layers():
    model, tokens = make(), torch.randint(256, (2, 9))
    everything = model(tokens, output_hidden_states=True).hidden_states
    first, middle, last = model(tokens, output_hidden_states=[0, -1]).hidden_states
    assert middle is None
    assert torch.equal(first, everything[0])
    assert torch.equal(last, everything[-1])
    with pytest.raises(IndexError):
        model(tokens, output_hidden_states=[3])


def test_outputs_that_are_asked_for():
    model, tokens = make(), torch.randint(256, (2, 9))
    out = model(tokens, output_hidden_states=True, output_retentions=True)
    assert [x.shape for x in out.hidden_states] == [(2, 9, 16)] * 3
    torch.testing.assert_close(out.hidden_states[0], model.model.embed_tokens(tokens))
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    for block, scores, x in zip(model.model.backbone.blocks, out.retentions, out.hidden_states[:-1], strict=True):
        assert torch.equal(scores, block.retention.scores(block.retention_norm(x)))
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, out.logits[:, -2:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([1, 5])).logits, out.logits[:, [1, 5]])
    assert len(model(tokens, return_dict=False)) == 2  # logits and cache
    for options in ({"form": "chunkwise"}, {CACHE: out[CACHE]}):
        with pytest.raises(ValueError, match="scores exist only in the parallel form"):
            model(tokens, output_retentions=True, **options)


def test_what_retention_cannot_do_is_refused():
    tokens = torch.randint(256, (2, 9))
    for model, options in ((make(), {"output_attentions": True}), (make(output_attentions=True), {})):
        with pytest.raises(ValueError, match="no attention weights; pass output_retentions=True"):
            model(tokens, **options)
    make(output_attentions=True)(tokens, output_attentions=False)
    with pytest.raises(ValueError, match="got is_causal=False"):
        make()(tokens, is_causal=False)
    with pytest.raises(ValueError, match="only aux_loss is; got output_router_logits=True"):
        make(moe_every=1, moe_num_experts=2)(tokens, output_router_logits=True)


def test_the_language_model_takes_the_arguments_of_the_base_model_and_no_others():
    base, lm = (inspect.signature(kind.forward).parameters for kind in (RetNetModel, RetNetForCausalLM))
    assert set(lm) == {*base, "labels", "logits_to_keep", "num_items_in_batch"}
    model, tokens = make(), torch.randint(256, (2, 9))
    embedded = model.model.embed_tokens(tokens)
    torch.testing.assert_close(model(inputs_embeds=embedded, form="recurrent").logits, model(tokens).logits)
    assert model.generate(tokens, max_new_tokens=1, do_sample=False, form="chunkwise").shape == (2, 10)
    with pytest.raises(ValueError, match="not used by the model: .'forward_mod'"):
        model.generate(tokens, max_new_tokens=1, forward_mod="chunkwise")
    with pytest.raises(TypeError, match="unexpected keyword arguments: forward_mod"):
        model(tokens, forward_mod="chunkwise")


KEYWORDS = {
    "cache_position": torch.arange(9),
    "token_type_ids": torch.zeros(2, 9, dtype=torch.long),
    "tokenizer": object(),
    "output_router_logits": True,
    "is_causal": True,
    "num_items_in_batch": torch.tensor(16),
    "max_length_q": 9,
}


@pytest.mark.slow
@pytest.mark.parametrize("keyword", KEYWORDS)
@pytest.mark.parametrize(
    "head", [RetNetModel, RetNetForCausalLM, RetNetForSequenceClassification, RetNetForTokenClassification]
)
def test_keywords_for_any_model_are_taken_as_llama_takes_them(head, keyword):
    options, tokens = {keyword: KEYWORDS[keyword]}, torch.randint(256, (2, 9))
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    llama(tokens, **options)
    model = head(RetNetConfig(**SMALL, pad_token_id=0)).eval()
    assert torch.equal(model(tokens, **options)[0], model(tokens)[0])


@pytest.mark.parametrize(
    "head", [RetNetModel, RetNetForCausalLM, RetNetForSequenceClassification, RetNetForTokenClassification]
)
def test_a_keyword_that_no_model_has_is_an_error(head):
    with pytest.raises(TypeError, match="unexpected keyword arguments: attn_mask, tokeniser"):
        head(RetNetConfig(**SMALL))(torch.zeros(1, 3, dtype=torch.long), attn_mask=None, tokeniser=None)


@pytest.mark.skipif(CACHE == "past_key_values", reason="there is no older name")
def test_the_old_name_of_the_cache_is_taken_with_a_warning():
    model, tokens = make(), torch.randint(256, (2, 9))
    old = {"past_key_values": model(tokens[:, :5])[CACHE]}
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated; use `cache` instead"):
        logits = model(tokens[:, 5:], **old).logits
    torch.testing.assert_close(logits, model(tokens).logits[:, 5:])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, tokens = make(moe_every=2, moe_num_experts=2), torch.randint(256, (2, 70))
    grads = []
    for enabled in (False, True):
        if enabled:
            new_name = hasattr(model, "activation_checkpointing_enable")  # not in 5.16
            enable = model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        model.train().zero_grad()
        runs = []
        inside = model.model.backbone.blocks[0].retention  # hooks of the block itself run once from 5.24 on
        handle = inside.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        model(tokens, labels=tokens).loss.backward()
        handle.remove()
        assert len(runs) == 1 + enabled  # once more in the backward pass
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def checkpointed(model):
    new_name = hasattr(model, "activation_checkpointing_enable")  # not in 5.16
    (model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable)()
    return model


def test_gradient_checkpointing_is_done_by_transformers_layer_by_layer():
    """Its own tests and options go by that class."""
    model = make()
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert layers == list(model.model.backbone.blocks)
    assert all(type(layer).__name__ in model._no_split_modules for layer in layers)
    assert not any(layer.gradient_checkpointing for layer in layers)
    checkpointed(model)
    assert all(layer.gradient_checkpointing for layer in layers)


@pytest.mark.parametrize("begun_with_gradients", [True, False])
def test_gradient_checkpointing_goes_on_from_a_cache(begun_with_gradients):
    tokens, grads = torch.randint(256, (2, 30)), []
    for model in (make().train(), checkpointed(make()).train()):
        with torch.set_grad_enabled(begun_with_gradients):
            cache = model(tokens[:, :10], use_cache=True)[CACHE]
        for part in (tokens[:, 10:20], tokens[:, 20:]):
            loss = model(part, labels=part, **{CACHE: cache}, use_cache=True).loss
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_embeddings_can_be_resized():
    model, tokens = make(), torch.randint(256, (2, 9))
    want = model(tokens).logits
    model.resize_token_embeddings(300, mean_resizing=False)
    assert model.config.vocab_size == 300
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(tokens).logits[..., :256], want)


def test_layers_can_be_spread_over_devices(tmp_path):
    model, tokens = make(retention={"learnable_decay": True}), torch.randint(256, (2, 9))
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.backbone": "cpu", "model.backbone.blocks.1": "disk"}
    places |= {f"model.backbone.{name}": "cpu" for name in ("blocks.0", "norm", "dropout", "embedding_norm")}
    del places["model.backbone"]
    loaded = RetNetForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "disk")
    kwargs = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.eval().generate(tokens, **kwargs), model.generate(tokens, **kwargs))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_lora_trains_the_projections_only():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model, tokens = make(), torch.randint(256, (2, 9))
    want = model(tokens).logits
    model = peft.get_peft_model(model, config)
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(trained) == 2 * 2 * 2
    assert all("lora_" in name for name in trained)
    assert not torch.allclose(model(tokens).logits, want)
    assert model.generate(input_ids=tokens, max_new_tokens=3).shape == (2, 12)


def grown(model, tokens, mask, new):
    """tokens and the likeliest to follow, one whole pass for each."""
    for _ in range(new):
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return tokens


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # peft 0.21 has no other name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("family", ["RetNet", "replaced Llama", "Llama"])
@pytest.mark.parametrize("padded", [False, True])
def test_prompt_tuning_trains_and_generates(family, padded):
    model = make(tie_word_embeddings=False) if family == "RetNet" else build("Llama")
    if family == "replaced Llama":
        replace_attention(model)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(model, config).eval()
    tokens, mask = torch.randint(3, 99, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 1 - padded
    model(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
    (prompt,) = (p for p in model.parameters() if p.requires_grad)
    assert prompt.grad.any()
    torch.nn.init.normal_(prompt)
    if f'"{CACHE}"' not in inspect.getsource(peft.PeftModelForCausalLM.prepare_inputs_for_generation):
        pytest.skip("this peft looks for the cache under another name, and puts the prompt before every token")
    with torch.no_grad():
        want = grown(model, tokens, mask, 4)
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(input_ids=tokens, attention_mask=mask, **options), want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification_reads_the_last_real_token(side):
    torch.manual_seed(0)
    model = RetNetForSequenceClassification(RetNetConfig(**SMALL, num_labels=3, pad_token_id=0)).eval()
    rows = [torch.randint(1, 256, (n,)) for n in (9, 4)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    out = model(ids, attention_mask=(ids != 0).long(), labels=torch.tensor([0, 2]))
    for row, logits in zip(rows, out.logits, strict=True):
        torch.testing.assert_close(logits, model(row[None]).logits[0])
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 2])))


def test_token_classification():
    model = RetNetForTokenClassification(RetNetConfig(**SMALL, num_labels=3)).eval()
    tokens = torch.randint(256, (2, 9))
    out = model(tokens, labels=tokens % 3)
    assert out.logits.shape == (2, 9, 3)
    torch.testing.assert_close(
        out.loss, torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), tokens.flatten() % 3)
    )


def test_auto_classes_know_every_head(tmp_path):
    make().save_pretrained(tmp_path)
    for auto, ours in (
        (AutoModelForSequenceClassification, RetNetForSequenceClassification),
        (AutoModelForTokenClassification, RetNetForTokenClassification),
    ):
        assert isinstance(auto.from_pretrained(tmp_path, num_labels=3), ours)


def test_a_model_without_an_embedding_takes_inputs_embeds(tmp_path):
    model = RetNetModel(RetNetConfig(**SMALL | {"vocab_size": 0})).eval()
    x = torch.randn(2, 5, 16)
    model.save_pretrained(tmp_path)
    loaded = RetNetModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(inputs_embeds=x).last_hidden_state, model(inputs_embeds=x).last_hidden_state)
    with pytest.raises(ValueError, match="no embedding .*; pass inputs_embeds"):
        model(torch.zeros(1, 3, dtype=torch.long))

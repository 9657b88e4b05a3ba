"""A model is opened from a folder or a GGUF file, with its tokenizer."""

import json

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from retention.cli import app
from retention.integrations.swap import Swapped
from retention.integrations.transformers.training import codec
from retention.integrations.transformers.training.opening import open_model

HEADS, KEY_HEADS = 4, 2
NAMES = {  # of a Llama's weights, in GGUF files
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture
def llama(tokenizer):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=64)
    heads = dict(num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **heads)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def gguf_file(llama, tokenizer, tmp_path):
    """The model and its tokenizer as llama.cpp's converter writes them, in float32."""
    file = tmp_path / "tiny.gguf"
    writer, config = gguf.GGUFWriter(file, "llama"), llama.config
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    names = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(names) - 1))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, weight in tensors(llama):
        writer.add_tensor(name, weight.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tensors(llama):
    yield "token_embd.weight", llama.model.embed_tokens.weight
    yield "output_norm.weight", llama.model.norm.weight
    for i, layer in enumerate(llama.model.layers):
        for ours, theirs in NAMES.items():
            weight, heads = layer.get_submodule(ours).weight, {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(theirs)
            if heads:  # llama.cpp rotates neighbouring channels, transformers those of the two halves
                halves = weight.unflatten(0, (heads, 2, -1))
                weight = halves.transpose(1, 2).reshape(weight.shape)
            yield f"blk.{i}.{theirs}.weight", weight


@pytest.mark.slow
def test_a_gguf_file_opens_as_a_plain_model_of_its_class_with_its_tokenizer(llama, tokenizer, gguf_file, tmp_path):
    model, found = open_model(str(gguf_file))
    assert type(model) is LlamaForCausalLM
    ids = torch.tensor([tokenizer("7 squared is 49.")["input_ids"]])
    torch.testing.assert_close(model(ids).logits, llama(ids).logits)
    assert found.encode(["7 squared is 49."]) == [ids[0].tolist()]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(again(ids).logits, llama(ids).logits)


@pytest.mark.slow
def test_the_command_replaces_the_attention_of_a_gguf_file(gguf_file, text, tmp_path):
    few = [
        "--transfer-steps",
        "2",
        "--tuning-steps",
        "2",
        "--batch",
        "2",
        "--context",
        "32",
        "--window",
        "8",
        "--sample",
        "5",
    ]
    words = ["swap", gguf_file, text, "--out", tmp_path / "out", *few, "--device", "cpu", "--sample", "5"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    model, found = open_model(str(tmp_path / "out"))
    assert all(isinstance(layer.self_attn, Swapped) for layer in model.model.layers)
    assert found.encode(["49"]) == open_model(str(gguf_file))[1].encode(["49"])


def test_a_gguf_file_without_the_library_or_that_is_none_is_refused(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(ValueError, match=r"broken.gguf holds no language model that transformers can read"):
        open_model(str(tmp_path / "broken.gguf"))
    with pytest.raises(ValueError, match=r"no such file: .*absent.gguf"):
        open_model(str(tmp_path / "absent.gguf"))
    with pytest.raises(ValueError, match=r"it has no config.json; name its file: .*broken.gguf"):
        open_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"broken.gguf holds no tokenizer that transformers can read"):
        codec.load_codec(str(tmp_path / "broken.gguf"))
    monkeypatch.setattr(codec, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r'tiny.gguf needs gguf; pip install "multiscale-retention\[gguf\]"'):
        open_model(str(gguf_file))

"""Small models of transformers with attention, one of each family, and a batch for them."""

import pytest
import torch
import transformers

SIZES = dict(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=300,
    initializer_range=0.5,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = {"num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 16}  # not hidden_size / num_attention_heads
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.5}
FAMILIES = {
    "GPT2": {},
    "GPT2-scaled": {"scale_attn_by_inverse_layer_idx": True},
    "GPTNeoX": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    "GPTNeoX-serial": {"use_parallel_residual": False},
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": None},
    "Mistral-window": {**GROUPED, "sliding_window": 8},
    "Mixtral": {**GROUPED, "num_local_experts": 2},
    "Qwen2": GROUPED,
    "Qwen3": WIDE,
    "Gemma": WIDE,
    "Gemma2": {**WIDE, "sliding_window": 8},
    "Gemma3": {**WIDE, "sliding_window": 8},
    "OPT": OPT,
    "OPT-post": {**OPT, "do_layer_norm_before": False},
    "Phi": {},
}
MORE = {
    "Phi3": {**GROUPED, "sliding_window": None},
    "Olmo2": GROUPED,
    "Cohere": GROUPED,
    "Starcoder2": GROUPED,
    "Starcoder2-window": {**GROUPED, "sliding_window": 8},
    "Granite": GROUPED,
    "SmolLM3": {**GROUPED, "no_rope_layers": [1, 0]},  # a layer without rotation
    "Qwen3Moe": {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Glm": WIDE,
    "DeepseekV3": {  # keys and values of different sizes, from latent vectors
        "first_k_dense_replace": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    },
    "Falcon": {},
    "Falcon-grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "Falcon-plain": {"multi_query": False},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "GPTJ": {"rotary_dim": 4},
}
VISION = dict(image_size=12, patch_size=3, num_channels=1)
ENCODERS = {
    "Bert": SIZES,
    "XLMRoberta": SIZES,
    "ViT": SIZES | VISION,
    "DeiT": SIZES | VISION,
    "Whisper": dict(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=5,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64,
        max_source_positions=15, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2, init_std=0.5,
        decoder_start_token_id=1,
    ),
}  # fmt: skip
NAMES = {  # in the README, where it is not that of the class
    "GPT2": "GPT-2",
    "GPTNeoX": "GPT-NeoX",
    "Gemma2": "Gemma 2",
    "Gemma3": "Gemma 3",
    "Phi3": "Phi-3",
    "Olmo2": "OLMo 2",
    "Starcoder2": "StarCoder2",
    "Qwen3Moe": "Qwen3-MoE",
    "Glm": "GLM",
    "DeepseekV3": "DeepSeek-V3",
    "GPTNeo": "GPT-Neo",
    "GPTJ": "GPT-J",
    "Bert": "BERT",
    "XLMRoberta": "XLM-R",
    "Whisper": "Whisper's encoder",
}
LENGTHS = (100, 70, 7)


def each(families, quick):
    """A test for each of the families; those that are not `quick` are slow, by their number."""
    cases = [family if family in quick else pytest.param(family, marks=pytest.mark.slow) for family in families]
    return pytest.mark.parametrize("family", cases)


def build(family):
    """A model of one of FAMILIES, MORE or ENCODERS, with weights from seed 0."""
    torch.manual_seed(0)
    name = family.partition("-")[0]
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    if name in ENCODERS:
        return getattr(transformers, f"{name}Model")(config(**ENCODERS[name])).eval()
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, name + head)(config(**SIZES | (FAMILIES | MORE)[family])).eval()


def documented_names():
    """The families as the documents call them, in the order of the tables."""
    families = (family.partition("-")[0] for family in (*FAMILIES, *MORE, *ENCODERS))
    return list(dict.fromkeys(NAMES.get(family, family) for family in families))


def padded():
    """Prompts, and all of them as one batch with padding on the left."""
    rows = [torch.randint(3, 99, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = (torch.arange(100) >= 100 - torch.tensor(LENGTHS)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return rows, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

"""Small models of transformers with attention, one of each family, and a batch for them."""

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
LENGTHS = (100, 70, 7)


def build(family):
    torch.manual_seed(0)
    name = family.partition("-")[0]
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, name + head)(config(**SIZES | FAMILIES[family])).eval()


def padded():
    """Prompts, and all of them as one batch with padding on the left."""
    rows = [torch.randint(3, 99, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = (torch.arange(100) >= 100 - torch.tensor(LENGTHS)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return rows, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

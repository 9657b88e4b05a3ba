"""Models of transformers with a sequence in parts equal those on one process: losses and gradients."""

import tempfile
from copy import deepcopy
from pathlib import Path

import processes
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from retention.distributed import context_parallel, tensor_parallel
from retention.errors import ShapeError
from retention.integrations.swap import Heads, HostedRetention, replace_attention
from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM, RetNetForSequenceClassification

pytestmark = pytest.mark.slow  # they start processes

TOTAL = 13  # parts of 7 and 6 tokens


def close(got, wanted, bound=1e-10):
    error = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
    assert error < bound, error.item()


def check_loss(world, model, tokens, whole=None, part=None):
    """Compare logits, loss and all gradients of a causal language model.

    whole, part: further arguments of the call with the whole sequence, and of that with a part.
    """
    model.double().train()
    out = model(tokens, labels=tokens, num_items_in_batch=tokens.numel(), **(whole or {}))
    out.loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    own, positions = tokens.clone(), torch.arange(tokens.shape[1])[None]
    shift_labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    with context_parallel(world.all, buffers=[own, shift_labels, positions], buffer_seq_dims=[1, 1, 1]) as shard:
        options = dict(num_items_in_batch=tokens.numel(), position_ids=positions, labels=own, shift_labels=shift_labels)
        found = model(own, **options, **(part or {}))
        found.loss.backward()
    close(found.logits, out.logits[:, shard.start : shard.start + shard.length])
    # transformers computes losses in float32
    close(world.sum(found.loss), out.loss, 1e-6)
    for name, p in model.named_parameters():
        if name in wanted:
            close(world.sum(torch.zeros_like(p) if p.grad is None else p.grad), wanted[name], 1e-6)


def retnet(**options):
    torch.manual_seed(1)
    retention = {"learnable_decay": True}
    return RetNetForCausalLM(
        RetNetConfig(vocab_size=40, dim=16, num_layers=2, num_heads=2, retention=retention, **options)
    )


def llama(kv_heads=1, **options):
    torch.manual_seed(1)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2 * kv_heads)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=kv_heads, **sizes))
    replace_attention(model, **options)
    return model


def retnets(world):
    tokens = torch.randint(40, (2, TOTAL))
    check_loss(world, retnet(), tokens)
    check_loss(world, retnet(z_loss_coeff=0.1), tokens)
    borders = torch.tensor([0, 4, 9, TOTAL], dtype=torch.int32)
    check_loss(world, retnet(), tokens[:1], dict(cu_seq_lens_q=borders), dict(cu_seq_lens_q=borders))


def replaced_layers(world):
    tokens = torch.randint(40, (2, TOTAL))
    check_loss(world, llama(), tokens)
    check_loss(world, llama(features=False), tokens)
    for sizes in (dict(window=3), dict(window=4, sinks=2), dict(window=9, sinks=8), dict(sinks=9)):
        check_loss(world, llama(**sizes), tokens)


def windows_with_padding(world):
    """The first and the last real tokens of parts, some of which have none, and gradients through them."""
    torch.manual_seed(1)
    heads = Heads(dim=8, num_heads=4, num_kv_heads=2, key_dim=6, value_dim=3)
    layer = HostedRetention(heads, window=4, sinks=3, dtype=torch.float64)
    x, q, k, v = (
        torch.randn(2, *shape, dtype=torch.float64) for shape in ((13, 8), (4, 13, 6), (2, 13, 6), (2, 13, 3))
    )
    weights = torch.randn(2, 13, 4, 3, dtype=torch.float64)
    for lengths in ((7, 6), (2, 11), (12, 1)):
        for mask in (None, torch.rand(2, 13) > 0.4, torch.arange(13).expand(2, -1) >= 7):
            whole = [z.clone().requires_grad_() for z in (q, k, v)]
            out, after = layer(x, *whole, scale=0.4, mask=mask, return_state=True)
            (out * weights).sum().backward()
            own = slice(sum(lengths[: world.rank]), sum(lengths[: world.rank + 1]))
            parts = [z[:, :, own].clone().requires_grad_() for z in (q, k, v)]
            with context_parallel(world.all, length=lengths[world.rank]):
                options = dict(mask=None if mask is None else mask[:, own], return_state=True)
                found, state = layer(x[:, own], *parts, scale=0.4, **options)
                (found * weights[:, own]).sum().backward()
            for name in ("kv", "keys", "values", "time"):
                close(getattr(state, name).double(), getattr(after, name).double())
            close(found, out[:, own])
            for y, z in zip(parts, whole, strict=True):
                close(y.grad, z.grad[:, :, own])
    with context_parallel(world.all, length=13 * world.rank), pytest.raises(ValueError, match=r"got lengths \[0, 13\]"):
        layer(*(z[:, :, : 13 * world.rank] if z is not x else z[:, : 13 * world.rank] for z in (x, q, k, v)), scale=0.4)


def heads_in_parts(world):
    """Losses, gradients and generated tokens of a model whose heads are divided."""
    model, tokens = retnet().double(), torch.randint(40, (2, TOTAL))
    divided = tensor_parallel(deepcopy(model), world.all)
    for each in (model, divided):
        each(tokens, labels=tokens).loss.backward()
    for (name, p), q in zip(model.named_parameters(), divided.parameters(), strict=True):
        close(q.grad.full_tensor() if isinstance(q.grad, DTensor) else q.grad, p.grad, 1e-6)  # losses are float32
        assert isinstance(q, DTensor) == (("retention" in name and "norm" not in name) or "ffn." in name), name
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    found, wanted = (each.eval().generate(tokens, **options) for each in (divided, model))
    assert found.tolist() == wanted.tolist()


def saved(world, model):
    """A folder that the first process has written for all."""
    folders = [tempfile.mkdtemp() if world.rank == 0 else None]
    torch.distributed.broadcast_object_list(folders)
    if world.rank == 0:
        model.save_pretrained(folders[0])
    processes.wait()
    return Path(folders[0])


def check_loaded(world, model, **options):
    """Compare a model that every process loads by its own heads, of transformers' tensor parallel, with the whole."""
    for p in model.parameters():
        if not p.numel() or p.std() == 0 or not p.std().isfinite():
            torch.nn.init.normal_(p, std=0.1)  # a mixture of heads would not show where all have the same
    folder = saved(world, model)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    divided = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)
    tokens = torch.randint(40, (2, TOTAL))
    found, wanted = (each(tokens, labels=tokens) for each in (divided, whole))
    close(found.logits, wanted.logits)
    found.loss.backward()
    wanted.loss.backward()
    for (name, p), q in zip(whole.named_parameters(), divided.parameters(), strict=True):
        close(q.grad.full_tensor() if isinstance(q.grad, DTensor) else q.grad, p.grad, 1e-6)  # losses are float32
        if isinstance(whole, RetNetForCausalLM) or "layers." in name:  # other hosts decide on their embeddings
            assert isinstance(q, DTensor) == ("norm" not in name or "retention.norm" in name), name
    words = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert divided.eval().generate(tokens, **words).tolist() == whole.eval().generate(tokens, **words).tolist()
    divided.save_pretrained(folder / "again")
    processes.wait()
    again = AutoModelForCausalLM.from_pretrained(folder / "again", dtype=torch.float64)
    assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))


def heads_loaded_in_parts(world):
    retention = {"learnable_decay": True, "norm_affine": "channel", "num_kv_heads": 2, "bias": True}
    sizes = dict(vocab_size=40, dim=16, num_layers=2, num_heads=4)
    check_loaded(world, RetNetForCausalLM(RetNetConfig(**sizes, retention=retention)), tp_plan="auto")
    others = dict(retention={"norm_affine": "shared", "gate": None}, gated=False, tie_word_embeddings=False)
    check_loaded(world, RetNetForCausalLM(RetNetConfig(**sizes, **others)), distributed_config={"tp_size": 2})


def heads_of_replaced_layers_loaded_in_parts(world):
    for options in (dict(window=4, sinks=2), dict(features=False, gate=None)):
        check_loaded(world, llama(kv_heads=2, **options), tp_plan="auto")
    folder = saved(world, llama(kv_heads=1))
    with pytest.raises(ShapeError, match="must divide num_kv_heads; got 1 heads, 2 processes"):
        AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")


def refused(world):
    """Every process refuses what would be computed from its own part alone."""
    model, ids = retnet(), torch.ones(2, 4, dtype=torch.long)
    start = 4 * world.rank
    classifier = RetNetForSequenceClassification(RetNetConfig(vocab_size=40, dim=16, num_layers=1, num_heads=2))
    calls = {
        "pass shift_labels": lambda: model(ids, labels=ids),
        "got 9 among": lambda: model(ids, position_ids=torch.tensor([[start, 9, start + 2, start + 3]])),
        "got 77 among": lambda: llama()(ids, position_ids=torch.arange(77, 81)[None]),
        "pass cu_seq_lens_q": lambda: model(ids, seq_idx=torch.zeros(2, 4, dtype=torch.int32)),
        "packed batch of 2 rows": lambda: model(ids, cu_seq_lens_q=torch.tensor([0, 8, 16])),
        "matrix of all scores": lambda: model(ids, output_retentions=True),
        "last token of each": lambda: classifier(ids),
        "generate has no meaning": lambda: model.generate(ids, max_new_tokens=2),
    }
    with context_parallel(world.all, length=4):
        for message, call in calls.items():
            with pytest.raises(ValueError, match=message):
                call()


CASES = [
    retnets,
    replaced_layers,
    windows_with_padding,
    heads_in_parts,
    heads_loaded_in_parts,
    heads_of_replaced_layers_loaded_in_parts,
    refused,
]


@pytest.fixture(scope="module")
def errors(request):
    return processes.run(
        processes.selected(request, CASES), 2, preload=["torch", "retention.integrations.transformers"]
    )


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_parts_equal_the_whole(errors, case):
    assert not errors[case], errors[case]

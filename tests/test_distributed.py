"""Retention over several processes equals that of one: outputs, states and gradients."""

import tempfile
from copy import deepcopy

import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.traffic import Traffic
from retention import MultiScaleRetention, RetNet, ShapeError, retain, step
from retention.distributed import context_parallel, tensor_parallel
from retention.functional import scores
from retention.state import RetentionState

pytestmark = pytest.mark.slow  # they start processes

EVEN, UNEVEN, EMPTY = (8, 8, 8, 8), (5, 13, 1, 9), (0, 7, 0, 4)
DECAY = torch.tensor([0.7, 0.9, 1.0, 0.99], dtype=torch.float64).log()


def close(got, wanted, bound=1e-10):
    """Compare relative to the largest value."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    if wanted.numel():
        error = (got.double() - wanted.double()).abs().max() / wanted.abs().max().clamp(min=1e-3)
        assert error < bound, error.item()


def part_of(x, lengths, rank, dim):
    return x.detach().narrow(dim, sum(lengths[:rank]), lengths[rank]).clone().requires_grad_(x.requires_grad)


def check_retain(
    mesh,
    lengths,
    *,
    kv_heads=4,
    mask=None,
    state=False,
    bound=1e-10,
    dtype=torch.float64,
    tolerance=0.0,
    decay=DECAY,
    norms=True,
    **options,
):
    """Compare retention in parts with that of the whole: outputs, states, and gradients of all inputs."""
    length, rank, n = sum(lengths), mesh.get_local_rank(), mesh.size()
    batch = 1 if "cu_seqlens" in options else 2

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

    q, k, v = leaf(batch, 4, length, 6), leaf(batch, kv_heads, length, 6), leaf(batch, kv_heads, length, 3)
    log_decay = decay.clone().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    before = None
    if state:
        sums = (leaf(batch, 4, 6, 3), torch.tensor([3, 5]), leaf(batch, 4, 6) if options.get("score_norm") else None)
        before = RetentionState(*sums)
    loss_of_out, loss_of_state = torch.randn(batch, 4, length, 3), torch.randn(batch, 4, 6, 3)

    def loss_of(found, weights, share):
        out, after = found if isinstance(found, tuple) else (found, None)
        loss = (out.double() * weights).sum()
        return loss if after is None else loss + share * (after.kv * loss_of_state).sum()

    whole = retain(q, k, v, log_decay, mask=mask, state=before, **options)
    loss_of(whole, loss_of_out, 1).backward()
    shared = [log_decay] if before is None else [log_decay, before.kv] + [before.k_sum] * (before.k_sum is not None)
    wanted = [x.grad for x in shared]
    for x in shared:
        x.grad = None

    parts = [part_of(x, lengths, rank, 2) for x in (q, k, v)]
    own_mask = None if mask is None else part_of(mask, lengths, rank, 1)
    with context_parallel(mesh, length=lengths[rank], tolerance=tolerance):
        found = retain(*parts, log_decay, mask=own_mask, state=before, **options)
        loss_of(found, part_of(loss_of_out, lengths, rank, 2), 1 / n).backward()

    out, after = found if isinstance(found, tuple) else (found, None)
    whole_out = whole[0] if isinstance(whole, tuple) else whole
    close(out, part_of(whole_out, lengths, rank, 2), bound)
    if after is not None:
        close(after.kv, whole[1].kv, bound)
        assert after.time.tolist() == whole[1].time.tolist()
        if after.k_sum is not None:
            close(after.k_sum, whole[1].k_sum, bound)
    for x, y in zip((q, k, v), parts, strict=True):
        close(y.grad, part_of(x.grad, lengths, rank, 2), bound)
    for x, grad in zip(shared, wanted, strict=True):
        total = torch.zeros_like(x) if x.grad is None else x.grad.clone()
        torch.distributed.all_reduce(total, group=mesh.get_group())
        close(total, grad, bound)


def holes(length):
    mask = torch.rand(2, length) > 0.4
    mask[1, : length // 2] = False  # a part without a real token
    return mask


# --- the cases, which every process runs ------------------------------------------------------------------------------


def causal(world):
    for lengths in (EVEN, UNEVEN, EMPTY):
        check_retain(world.all, lengths)


def two_parts_in_two_groups(world):
    check_retain(world.square["cp"], (3, 8))


def both_ways(world):
    for lengths in (EVEN, UNEVEN, EMPTY):
        check_retain(world.all, lengths, causal=False)


def both_ways_masked_packed_and_normalised(world):
    packed = torch.tensor([0, 3, 6, 6, 19, 28], dtype=torch.int32)
    check_retain(world.all, UNEVEN, causal=False, mask=holes(28), decay_norm=True, score_norm=True)
    check_retain(world.all, UNEVEN, causal=False, cu_seqlens=packed, decay_norm=True, score_norm=True)


def grouped_heads(world):
    check_retain(world.all, UNEVEN, kv_heads=2)
    check_retain(world.all, UNEVEN, kv_heads=1, causal=False)


def masks(world):
    check_retain(world.all, UNEVEN, mask=holes(28))
    check_retain(world.all, UNEVEN, mask=holes(28), decay_norm=True)


def packed_sequences(world):
    for borders in ([0, 28], [0, 5, 18, 28], [0, 2, 2, 11, 18, 27, 28], list(range(29))):
        check_retain(world.all, UNEVEN, cu_seqlens=torch.tensor(borders), decay_norm=True, score_norm=True)


def states(world):
    check_retain(world.all, UNEVEN, state=True)
    check_retain(world.all, UNEVEN, state=True, return_state=True)
    check_retain(world.all, UNEVEN, return_state=True)
    check_retain(world.all, UNEVEN, state=True, return_state=True, mask=holes(28), decay_norm=True, score_norm=True)


def normalisers(world):
    check_retain(world.all, UNEVEN, score_norm=True)
    check_retain(world.all, UNEVEN, decay_norm=True)


def forms(world):
    for form in ("parallel", "recurrent", "chunkwise"):
        check_retain(world.all, UNEVEN, form=form, chunk_size=4)


def single_precision(world):
    check_retain(world.all, UNEVEN, dtype=torch.float32, bound=1e-5)
    check_retain(world.all, UNEVEN, dtype=torch.float32, bound=1e-5, causal=False, mask=holes(28))


def half_precision(world):
    check_retain(world.all, UNEVEN, dtype=torch.bfloat16, bound=2**-7)


def only_neighbours_within_a_tolerance(world):
    """With gamma^7 below the tolerance only neighbours exchange; without, the result is exact."""
    fast = torch.full((4,), 0.02, dtype=torch.float64).log()
    for causal in (True, False):
        with Traffic() as traffic:
            check_retain(world.all, (7, 9, 7, 8), decay=fast, causal=causal, tolerance=1e-10)
        assert traffic.calls["send"]
        assert not traffic.calls["_allgather_base_"]
        with Traffic() as traffic:
            check_retain(world.all, (7, 9, 4, 8), decay=fast, causal=causal, tolerance=1e-10)
        assert (traffic.calls["_allgather_base_"], traffic.calls["send"]) == (2, 0)
    check_retain(world.all, (7, 9, 7, 8), decay=fast, tolerance=1e-10, cu_seqlens=torch.tensor([0, 12, 20, 31]))


def check_model(world, model, inputs, lengths, call, bound=1e-10):
    """Compare the outputs and the gradients of all parameters; `call` runs the model on inputs (B, T, ...)."""
    model.zero_grad()
    whole = call(model, *inputs)
    weights = torch.randn_like(whole)
    (whole * weights).sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    rank = world.all.get_local_rank()
    parts = [None if x is None else part_of(x, lengths, rank, 1) for x in inputs]
    with context_parallel(world.all, length=lengths[rank]):
        out = call(model, *parts)
        (out * part_of(weights, lengths, rank, 1)).sum().backward()
    close(out, part_of(whole, lengths, rank, 1), bound)
    for name, p in model.named_parameters():
        close(world.sum(torch.zeros_like(p) if p.grad is None else p.grad), wanted[name], bound)


def layers(world):
    for options in (
        dict(learnable_decay=True),
        dict(rotary="xpos", interleaved=False),
        dict(rotary="rope", num_kv_heads=2, decay_norm=True, score_norm=True),
        dict(causal=False, norm="rms"),
    ):
        torch.manual_seed(1)
        layer = MultiScaleRetention(16, 4, dtype=torch.float64, **options)
        x, mask = torch.randn(2, 28, 16, dtype=torch.float64), holes(28)
        check_model(world, layer, [x], UNEVEN, lambda m, x: m(x))
        check_model(world, layer, [x[:, :11]], EMPTY, lambda m, x: m(x))
        check_model(world, layer, [x, mask], UNEVEN, lambda m, x, mask: m(x, mask=mask) * mask[..., None])
        packed = torch.tensor([0, 4, 12, 28], dtype=torch.int32)
        check_model(world, layer, [x[:1]], UNEVEN, lambda m, x, p=packed: m(x, cu_seqlens=p))


def language_models(world):
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = RetNet(50, 16, 3, 2, dtype=torch.float64, retention={"learnable_decay": True}).train()
        model.backbone.gradient_checkpointing = checkpointing
        tokens, mask = torch.randint(50, (2, 28)), holes(28)
        check_model(world, model, [tokens], UNEVEN, lambda m, x: m(x))
        check_model(world, model, [tokens[:, :11]], EMPTY, lambda m, x: m(x))
        check_model(world, model, [tokens, mask], UNEVEN, lambda m, x, mask: m(x, mask=mask) * mask[..., None])


def prefill_and_decode(world):
    """The states of a prompt in parts are those of the whole, on every process, and `step` goes on from them."""
    torch.manual_seed(1)
    model = RetNet(50, 16, 2, 2, dtype=torch.float64).eval()
    tokens, rank = torch.randint(50, (1, 28)), world.rank
    with torch.no_grad():
        logits, states = model(tokens, return_state=True)
        with context_parallel(world.all, length=UNEVEN[rank]):
            _, found = model(part_of(tokens, UNEVEN, rank, 1), return_state=True)
        for state, wanted in zip(found, states, strict=True):
            close(state.kv, wanted.kv)
        following = logits[:, -1:].argmax(-1)
        close(model.step(following, found), model.step(following, states))


def buffers_are_split_and_restored(world):
    tokens, kept = torch.arange(10)[None], torch.arange(20).view(10, 2)
    with context_parallel(
        world.all, buffers=[tokens, kept], buffer_seq_dims=[1, 0], no_restore_buffers={kept}
    ) as shard:
        assert (shard.lengths, shard.total) == ((3, 3, 2, 2), 10)
        assert tokens.tolist() == [list(range(shard.start, shard.start + shard.length))]
        assert kept[:, 0].tolist() == [2 * i for i in tokens[0].tolist()]
    assert tokens.tolist() == [list(range(10))]
    assert len(kept) == shard.length


def bytes_do_not_grow_with_length(world):
    """Forward and backward gather B * H * K * V numbers and a header of B + 1 integers each way, at any length."""
    found = []
    for length in (4, 64):
        q = torch.randn(2, 3, length, 5, requires_grad=True)
        v = torch.randn(2, 3, length, 7, requires_grad=True)
        with context_parallel(world.all, length=length), Traffic() as traffic:
            retain(q, q, v, DECAY[:3].float()).sum().backward()
        found.append((traffic.calls["_allgather_base_"], sum(traffic.bytes.values())))
    states = 2 * 3 * 5 * 7 * 4
    assert found == [(2, 2 * states + (1 + 2) * 8)] * 2, found


class Order(TorchDispatchMode):
    """The order in which exchanges begin and backends run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith(("c10d::", "retention::")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def exchanges_begin_before_the_computation(world):
    """So the states travel while the backend computes the part, forward and backward."""
    q = torch.randn(1, 4, 8, 4, requires_grad=True)
    with context_parallel(world.all, length=8), Order() as order:
        retain(q, q, q, DECAY.float(), form="chunkwise").sum().backward()
    gather = "c10d::_allgather_base_"
    assert order.names == [gather, "retention::chunkwise", gather, "retention::chunkwise_backward"], order.names


def refused_before_communication(world):
    """All processes raise, and none has sent anything."""
    x, d, rank = torch.randn(1, 4, 4, 4), DECAY.float(), world.rank
    state = retain(x, x, x, d, return_state=True)[1]
    packed = torch.tensor([0, 7, 16])
    model = RetNet(50, 16, 1, 2)
    calls = {
        "grid": lambda: retain(x, x, x, d, causal=False, grid=(2, 2)),
        "score_norm 'absolute'": lambda: retain(x, x, x, d, score_norm="absolute"),
        "matrix of all scores": lambda: scores(x, x, d),
        "a state of packed": lambda: retain(x, x, x, d, cu_seqlens=packed, return_state=True),
        "end at the length 16": lambda: retain(x, x, x, d, cu_seqlens=torch.tensor([0, 4])),
        r"lengths \[4, 4, 4, 4\] .* got length 3 on rank": lambda: retain(*[x[:, :, 1:]] * 3, d),
        "step of one token": lambda: step(*[x[:, :, :1]] * 3, d, state),
        "torch.func": lambda: torch.func.grad(lambda y: retain(y, x, x, d).sum())(x),
        "got length 2 on rank": lambda: model(torch.ones(1, 2, dtype=torch.long), mask=torch.ones(1, 2) > 0),
        "active already": lambda: context_parallel(world.all, length=4).__enter__(),
    }
    with context_parallel(world.all, length=4), Traffic() as traffic:
        for message, call in calls.items():
            with pytest.raises(ValueError, match=message):
                call()
    assert not traffic.calls, traffic.calls
    for message, options in {
        "one dimension": dict(mesh=world.square, length=4),
        "length .* or buffers": dict(mesh=world.all),
        "one number of tokens": dict(mesh=world.all, buffers=[x[0], x[0, 0, :2]], buffer_seq_dims=[0, 0]),
        "dimension per buffer": dict(mesh=world.all, buffers=[x]),
        "tolerance must be a number": dict(mesh=world.all, length=4, tolerance=1.0),
        "length must be": dict(mesh=world.all, length=-1),
        "tolerance must be the same": dict(mesh=world.all, length=4, tolerance=0.1 * rank),
    }.items():
        with pytest.raises(ValueError, match=message), context_parallel(**options):
            pass
    assert retain(x, x, x, d).shape == x.shape  # outside, as ever


def other_options_on_one_rank(world):
    """Calls that do not belong together are noticed on every process, and none hangs."""
    x = torch.randn(1, 4, 4, 4)
    with context_parallel(world.all, length=4), pytest.raises(ValueError, match="all ranks must ask for the same"):
        retain(x, x, x, DECAY.float(), scale=2.0 if world.rank == 2 else 1.0)


def check_divided(world, model, divide, run, share=1.0, bound=1e-10):
    """Compare the gradients of a model with those of a copy that `divide` distributes.

    run: the forward and backward pass of the model (None) and of the copy (world).
    share: the factor of the gradients of the copy.
    """
    model.zero_grad()
    run(model, None)
    wanted = {name: p.grad for name, p in model.named_parameters()}
    copy = deepcopy(model)
    copy.zero_grad()
    run(divide(copy), world)
    for name, p in copy.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        close(share * grad, wanted[name], bound)
    return copy


def language_loss(model, tokens):
    logits = model(tokens[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


SMALL = dict(vocab_size=50, dim=16, num_layers=2, num_heads=4, dtype=torch.float64)


def tensor_parallel_heads(world):
    mesh, tokens = world.square["cp"], torch.randint(50, (2, 12))
    for options in (
        dict(retention={"learnable_decay": True, "norm_affine": "channel", "bias": True, "num_kv_heads": 2}),
        dict(retention={"learnable_decay": True, "norm_affine": "shared", "rotary": "xpos"}, tie_embeddings=False),
        dict(retention={"decay_norm": True, "score_norm": True, "norm": "rms"}, gated=False, ffn_bias=True, subln=True),
        dict(moe_every=1, moe_num_experts=3, gated=False),
    ):
        torch.manual_seed(1)
        model = RetNet(**SMALL, **options)
        copy = check_divided(
            world, model, lambda m: tensor_parallel(m, mesh), lambda m, _: language_loss(m, tokens).backward()
        )
        assert copy.backbone.blocks[0].retention.num_heads == 2
        assert (copy.head.weight is copy.embedding.weight) == (model.head.weight is model.embedding.weight)
        with torch.no_grad():
            states = [m(tokens, return_state=True)[1] for m in (model, copy)]
            following = [m.step(tokens[:, :1], state) for m, state in zip((model, copy), states, strict=True)]
        close(following[1], following[0])


def heads_that_cannot_be_divided(world):
    model = RetNet(50, 16, 1, 4, retention={"num_kv_heads": 2})
    with pytest.raises(ShapeError, match="must divide num_kv_heads; got 2 heads, 4 processes"):
        tensor_parallel(model, world.all)
    assert not isinstance(model.head.weight, DTensor)
    with pytest.raises(ValueError, match="without one"):
        tensor_parallel(torch.nn.Linear(2, 2), world.all)
    divided = tensor_parallel(model, world.square["cp"])
    with pytest.raises(ValueError, match="divided already"):
        tensor_parallel(divided, world.square["cp"])


def sharded(model, mesh, checkpointing=False):
    """The model with its parameters sharded block by block."""
    model.backbone.gradient_checkpointing = checkpointing
    for block in model.backbone.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fully_sharded_blocks(world):
    """Each process has its rows of the batch; with checkpointing the blocks are computed again."""
    torch.manual_seed(1)
    model, tokens = RetNet(**SMALL, retention={"learnable_decay": True}), torch.randint(50, (4, 12))

    def run(m, world):
        language_loss(m, tokens if world is None else tokens[world.rank, None]).backward()

    for checkpointing in (False, True):
        check_divided(world, model, lambda m, c=checkpointing: sharded(m, world.all, c), run)


def all_on_two_by_two(world):
    """Heads over one dimension; the sequence and the parameters over the other."""
    torch.manual_seed(1)
    model, tokens = RetNet(**SMALL, retention={"learnable_decay": True}), torch.randint(50, (1, 14))
    parts, heads = world.square["dp"], world.square["cp"]

    def run(m, world):
        if world is None:
            return language_loss(m, tokens).backward()
        x, labels = tokens[:, :-1].clone(), tokens[:, 1:].clone()
        with context_parallel(parts, buffers=[x, labels], buffer_seq_dims=[1, 1]) as shard:
            total = torch.nn.functional.cross_entropy(m(x).flatten(0, 1), labels.flatten(), reduction="sum")
            (total / shard.total).backward()

    # fully_shard takes the mean of the gradients; the losses of the parts are to be added.
    check_divided(world, model, lambda m: sharded(tensor_parallel(m, heads), parts), run, share=2.0)


def meta_device_and_checkpoints(world):
    """A model is made without memory, initialised in parts, saved by four processes and loaded by two."""
    model = sharded(RetNet(**SMALL, device="meta"), world.all)
    model.to_empty(device="cpu")
    model.reset_parameters()
    weight = model.backbone.blocks[0].retention.q_proj.weight
    assert weight.to_local().shape == (4, 16)
    bound = 2**-2.5 * (6 / 32) ** 0.5  # Xavier of the layer, not that of nn.Linear
    assert 0.8 * bound < weight.full_tensor().abs().max() <= bound
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder[0])
    group = world.square["cp"]
    other = sharded(RetNet(**SMALL), group)
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder[0], process_group=group.get_group())
    set_model_state_dict(other, state["model"])
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor()), name


CASES = [
    causal,
    two_parts_in_two_groups,
    both_ways,
    both_ways_masked_packed_and_normalised,
    grouped_heads,
    masks,
    packed_sequences,
    states,
    normalisers,
    forms,
    single_precision,
    half_precision,
    only_neighbours_within_a_tolerance,
    layers,
    language_models,
    prefill_and_decode,
    buffers_are_split_and_restored,
    bytes_do_not_grow_with_length,
    exchanges_begin_before_the_computation,
    refused_before_communication,
    other_options_on_one_rank,
    tensor_parallel_heads,
    heads_that_cannot_be_divided,
    fully_sharded_blocks,
    all_on_two_by_two,
    meta_device_and_checkpoints,
]


@pytest.fixture(scope="module")
def errors(request):
    return processes.run(processes.selected(request, CASES), 4, preload=["torch", "retention.distributed"])


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_parts_equal_the_whole(errors, case):
    assert not errors[case], errors[case]


def raises_on_one_rank(world):
    x = torch.randn(1, 4, 4, 4)
    with context_parallel(world.all, length=4):
        retain(x[:, :, world.rank :], x[:, :, world.rank :], x[:, :, world.rank :], DECAY.float())


def test_a_process_that_refuses_ends_the_group():
    """The other process waits for its state; it does not wait forever."""
    error = processes.run([raises_on_one_rank], 2, preload=[])["raises_on_one_rank"]
    assert "rank 1: " in error
    assert "each call has the tokens of its own part" in error
    assert "got length 3 on rank 1" in error

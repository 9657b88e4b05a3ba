"""Retention over several processes equals that of one: outputs, states and gradients."""

import multiprocessing

import processes
import pytest
import torch

from retention import MultiScaleRetention, RetNet, ShapeError, retain
from retention.distributed import context_parallel
from retention.state import RetentionState

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
]


@pytest.fixture(scope="module")
def errors():
    multiprocessing.set_forkserver_preload(["torch", "retention.distributed"])
    return processes.run(CASES, 4)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_parts_equal_the_whole(errors, case):
    assert not errors[case], errors[case]

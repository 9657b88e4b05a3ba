"""A state can be kept, moved, chosen from and put in another order."""

import torch

from retention import RetentionState, initial_state, retain

DECAY = torch.tensor([-0.1, -0.2])


def some_state():
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    return retain(q, k, v, DECAY, score_norm=True, return_state=True, mask=torch.arange(5) >= torch.tensor([[0], [2]]))[
        1
    ]


def same(a, b):
    return torch.equal(a.kv, b.kv) and torch.equal(a.time, b.time) and torch.equal(a.k_sum, b.k_sum)


def test_save_and_load_with_weights_only(tmp_path):
    state = some_state()
    torch.save([state], tmp_path / "state.pt")
    assert same(torch.load(tmp_path / "state.pt", weights_only=True)[0], state)


def test_indexing_takes_rows_in_any_order_and_keeps_the_batch():
    state = some_state()
    beams = state[torch.tensor([1, 1, 0])]
    assert beams.time.tolist() == [3, 3, 5]
    assert torch.equal(beams.kv[2], state.kv[0])
    assert torch.equal(beams.k_sum[0], state.k_sum[1])
    assert same(state[0], state[:1])
    assert same(state[-1], state[[1]])
    assert len(beams) == 3
    assert initial_state(2, 2, 4, 3)[[0]].k_sum is None


def test_a_reordered_state_continues_the_rows_it_was_taken_from():
    q, k, v = torch.randn(3, 2, 2, 8, 4)
    _, state = retain(*(x[:, :, :5] for x in (q, k, v)), DECAY, return_state=True)
    whole = retain(q, k, v, DECAY)
    order = [1, 0, 1]
    out = retain(*(x[order, :, 5:] for x in (q, k, v)), DECAY, state=state[order])
    torch.testing.assert_close(out, whole[order, :, 5:])


def test_moving_cloning_and_detaching_copy_every_tensor():
    state = some_state()
    assert state.to("meta").k_sum.device.type == "meta"
    copy = state.clone()
    copy.kv.zero_()
    copy.time.zero_()
    assert state.kv.any()
    assert state.time.any()
    state.kv.requires_grad_()
    assert not state.detach().kv.requires_grad


def test_dtype_is_float32_at_least():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert initial_state(1, 1, 2, 2, dtype=dtype).kv.dtype == wide
        x = torch.randn(1, 1, 3, 2, dtype=dtype)
        assert retain(x, x, x, DECAY[:1], return_state=True)[1].kv.dtype == wide


def test_pytrees_see_the_tensors():
    leaves = torch.utils._pytree.tree_leaves(some_state())
    assert len(leaves) == 3
    assert isinstance(torch.utils._pytree.tree_map(torch.clone, some_state()), RetentionState)


def test_copying_overwrites_the_tensors_in_place():
    state, other = some_state(), some_state()
    kv = state.kv
    assert not same(state, other)
    assert state.copy_(other) is state
    assert same(state, other)
    assert state.kv is kv

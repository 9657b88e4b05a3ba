import math

import pytest
import torch

from retention import decay
from retention.constants import as_tensor


def test_paper_schedule():
    gammas = [math.exp(x) for x in decay.log_decays("paper", 3)]
    assert gammas == pytest.approx([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128])


def test_log_linear_schedule():
    gammas = [math.exp(x) for x in decay.log_decays("log_linear", 3)]
    assert gammas == pytest.approx([1 - 1 / 32, 1 - math.exp((math.log(1 / 32) + math.log(1 / 512)) / 2), 1 - 1 / 512])
    assert decay.log_decays("log_linear", 1) == pytest.approx([math.log(1 - 1 / 32)])
    assert decay.log_decays("log_linear", 2) == pytest.approx([math.log(1 - 1 / 32), math.log(1 - 1 / 512)])


def test_log_linear_with_other_ends():
    gammas = [math.exp(x) for x in decay.log_linear(3, 1 / 2, 1 / 8)]
    assert gammas == pytest.approx([1 / 2, 3 / 4, 7 / 8])


def test_short_schedule():
    assert decay.log_decays("short", 8) == decay.log_linear(8, 1 / 2, 1 / 128)
    with pytest.raises(TypeError, match="decay must be a name, a tensor or a sequence of log-decays; got decay 0.9"):
        decay.log_decays(0.9, 2)


def test_slow_heads_keep_a_decay():
    """In float32, 1 - 2^-25 is 1: computed that way head 20 would not decay at all."""
    values = decay.log_decays("paper", 48)
    assert all(x < 0 for x in values)
    assert as_tensor(values, torch.device("cpu"), torch.float32)[20].item() == pytest.approx(-(2.0**-25))


def test_own_values_are_taken_as_they_are():
    assert decay.log_decays([-0.5, 0.0], 2) == (-0.5, 0.0)
    assert decay.log_decays(torch.tensor([-0.5, -1.0]), 2) == (-0.5, -1.0)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("fast", "decay must be one of 'paper', 'log_linear', 'short' or 2 log-decays; got decay 'fast'"),
        ([-1.0], r"decay must hold one log-decay per head, \(2,\); got decay \(1,\)"),
        (torch.zeros(2, 2), r"got decay \(2, 2\)"),
        ([-1.0, 0.9], r"finite and at most 0; got 0.9; pass log\(gamma\)"),
        ([-1.0, -math.inf], "finite and at most 0; got -inf"),
        ([-1.0, math.nan], "finite and at most 0; got nan"),
    ],
)
def test_wrong_schedules_are_named(schedule, message):
    with pytest.raises(ValueError, match=message):
        decay.log_decays(schedule, 2)


@pytest.mark.parametrize("length", [3, 65])  # kept, and too long for that
def test_decay_matrix(length):
    rate = as_tensor((math.log(0.5), math.log(0.25)), torch.device("cpu"), torch.float64)
    for causal in (True, False):
        matrix = decay.decay_matrix(rate, length, causal)
        for head, gamma in enumerate((0.5, 0.25)):
            want = [[gamma ** abs(n - m) if n >= m or not causal else 0 for m in range(length)] for n in range(length)]
            torch.testing.assert_close(matrix[head], torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("log_decay", [0.0, -1e-12, -1e-7, -1e-4, -1e-3, -0.03, -0.5, -1.0, -2.0, -20.0, -80.0])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 31, 1000, 2000])
def test_geometric_sum_and_its_gradient(log_decay, count, dtype, bound):
    x = torch.tensor(log_decay, dtype=dtype, requires_grad=True)
    got = decay.geometric_sum(x, torch.tensor(count, dtype=dtype))
    got.backward()
    weights = [math.exp(i * x.item()) for i in range(count)]
    assert got.item() == pytest.approx(math.fsum(weights), rel=bound)
    assert x.grad.item() == pytest.approx(math.fsum(i * w for i, w in enumerate(weights)), rel=bound, abs=bound / 10)


@pytest.mark.parametrize("shift", [0.7, 20.0, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learnable_decay_far_beyond_its_bound_is_the_bound(shift, dtype):
    layer = decay.HeadDecay([math.log(0.5)], 1, learnable=True)
    with torch.no_grad():
        layer.shift.fill_(shift)
    found = layer(torch.device("cpu"), dtype)
    assert found.item() == pytest.approx(math.log1p(-math.exp(-1e-4)), rel=1e-3)
    found.backward()
    assert layer.shift.grad.item() == pytest.approx(-1e4, rel=1e-2)


def test_a_learnable_decay_comes_back_from_its_bound():
    """Above the bound the decay is that at the bound, and the gradient goes on."""
    layer = decay.HeadDecay([math.log(0.5)], 1, learnable=True)
    with torch.no_grad():
        layer.shift.fill_(2.0)  # 1 - gamma would be 3.7
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    assert layer(torch.device("cpu")).exp().item() == pytest.approx(1e-4, rel=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        (layer(torch.device("cpu")).exp() - 0.9).square().sum().backward()
        assert layer.shift.grad.isfinite().all()
        optimizer.step()
    assert layer(torch.device("cpu")).exp().item() == pytest.approx(0.9, abs=0.05)

import pytest
import torch

from retention.constants import as_tensor, kept

CPU = torch.device("cpu")


def test_a_constant_can_be_used_under_fake_tensors():
    values = (-0.5, -0.25)
    as_tensor(values, CPU, torch.float32)
    with torch._subclasses.FakeTensorMode():
        assert as_tensor(values, CPU, torch.float32).shape == (2,)
    assert as_tensor(values, CPU, torch.float32).tolist() == [-0.5, -0.25]


def test_a_constant_made_in_inference_mode_can_be_trained_with():
    values = (-0.123456789,)
    with torch.inference_mode():
        as_tensor(values, CPU, torch.float32)
    x = torch.ones(1, requires_grad=True)
    (x * as_tensor(values, CPU, torch.float32)).sum().backward()
    assert x.grad.item() == pytest.approx(-0.123456789)


def test_what_follows_from_a_constant_is_made_once():
    made = []

    @kept(1)
    def times(x, n):
        made.append(n)
        return x * n

    constant = as_tensor((-0.5, -0.125), CPU, torch.float32)
    assert as_tensor((-0.5, -0.125), CPU, torch.float32) is constant
    with torch.inference_mode():
        assert times(constant, 2) is times(constant, 2)
    assert not times(constant, 2).is_inference()
    assert made == [2]
    for n in (3, 2):  # one is kept
        times(constant, n)
    assert made == [2, 3, 2]
    other = constant.clone()
    other.fill_(1)
    assert times(other, 2).tolist() == times(other, 2).tolist() == [2, 2]
    assert made == [2, 3, 2, 2, 2]


def test_inside_a_transform_nothing_is_kept():
    @kept(1)
    def twice(x):
        return 2 * x

    def function(x):
        return (x * twice(as_tensor((-0.5, -0.0625), CPU, torch.float32))).sum()

    assert torch.func.grad(function)(torch.ones(2)).tolist() == [-1, -0.125]
    assert twice(as_tensor((-0.5, -0.0625), CPU, torch.float32)).tolist() == [-1, -0.125]


def test_nothing_made_while_a_cuda_graph_is_captured_is_kept(monkeypatch):
    """Its memory belongs to the graph, whose next replay overwrites it."""

    @kept(1)
    def twice(x):
        return 2 * x

    early, late = (-0.5, -0.03125), (-0.5, -0.015625)
    before = as_tensor(early, CPU, torch.float32)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_initialized", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert as_tensor(early, CPU, torch.float32) is before
        inside = as_tensor(late, CPU, torch.float32)
        inside.fill_(7)
        twice(before).fill_(7)
    assert as_tensor(late, CPU, torch.float32).tolist() == list(late)
    assert twice(before).tolist() == [-1, -0.0625]

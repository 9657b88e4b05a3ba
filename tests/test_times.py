import torch

from retention import initial_state
from retention.times import token_times

CPU = torch.device("cpu")


def after(*times):
    state = initial_state(len(times), 1, 2, 2)
    state.time[:] = torch.tensor(times)
    return state


def test_tokens_are_counted_from_the_beginning_or_on_from_a_state():
    assert token_times(2, 3, CPU, None, None, None).tolist() == [[0, 1, 2]]
    for length in (1, 2, 3):
        want = [list(range(start, start + length)) for start in (5, 0)]
        assert token_times(2, length, CPU, after(5, 0), None, None).tolist() == want


def test_padding_does_not_count():
    mask = torch.tensor([[False, True, True], [True, False, True]])
    assert token_times(2, 3, CPU, None, mask, None).tolist() == [[0, 0, 1], [0, 0, 1]]
    assert token_times(2, 3, CPU, after(4, 9), mask, None).tolist() == [[4, 4, 5], [9, 9, 10]]


def test_packed_sequences_are_counted_each_by_itself():
    borders = torch.tensor([0, 2, 2, 5])
    assert token_times(1, 5, CPU, None, None, borders).tolist() == [[0, 1, 0, 1, 2]]
    assert token_times(1, 5, CPU, after(7, 1, 3), None, borders).tolist() == [[7, 8, 3, 4, 5]]

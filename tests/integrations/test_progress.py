"""How a run hears signals."""

import signal
import threading
from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from retention.integrations.transformers.training.progress import SaveOnInterrupt, Stopped

ALONE = SimpleNamespace(world_size=1)


@pytest.fixture(params=["SIGINT", "SIGTERM", "SIGHUP"])
def number(request):
    return getattr(signal, request.param)


def test_a_signal_ends_the_step_and_the_run_stops_when_it_is_saved(number):
    with SaveOnInterrupt() as stop:
        stop.on_train_begin(ALONE, None, None)
        signal.raise_signal(number)
        control = TrainerControl()
        stop.on_step_end(ALONE, None, control)
        assert control.should_save
        assert control.should_training_stop
        with pytest.raises(Stopped) as stopped:
            stop.on_train_end(ALONE, None, control)
    assert stopped.value.number == number
    assert stopped.value.saved


def test_a_second_signal_stops_at_once(number):
    with SaveOnInterrupt() as stop:
        stop.on_train_begin(ALONE, None, None)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(number)
    assert not stopped.value.saved


def test_where_nothing_is_trained_the_first_signal_stops(number):
    with SaveOnInterrupt(), pytest.raises(Stopped, match=signal.Signals(number).name) as stopped:
        signal.raise_signal(number)
    assert not stopped.value.saved


def test_handlers_are_put_back_and_an_ignored_signal_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        with SaveOnInterrupt():
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    with SaveOnInterrupt() as stop:
        assert signal.getsignal(number) == stop._ask
    assert signal.getsignal(number) is before


def test_a_training_in_another_thread_leaves_signals_alone():
    found = []

    def enter():
        with SaveOnInterrupt() as stop:
            found.append(stop.before)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [{}]

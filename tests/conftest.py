import gc
import os
import signal

import hypothesis
import pytest
import torch

from retention import backends

pytest_plugins = ["fake_xformers"]

# The same examples each time where a failure must not depend on luck; new ones at a developer's desk.
everything = list(hypothesis.HealthCheck)
hypothesis.settings.register_profile("desk", deadline=None, suppress_health_check=everything)
hypothesis.settings.register_profile("ci", deadline=None, suppress_health_check=everything, derandomize=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "desk")


def pytest_collection_finish():
    """Keep a million objects of the imported libraries from every pass of the garbage collector, and from its list.

    Every replacement of attention asks for that list: half of its time.
    """
    gc.collect()
    gc.freeze()


# `torch.manual_seed` writes down the stack for each kind of device that may come later: a third of a short test's time.
set_seed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def seed():
    set_seed(0)


@pytest.fixture(autouse=True)
def signals():
    """As at a terminal: what a shell runs in the background ignores SIGINT, what nohup runs SIGHUP."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def registry():
    """Undo what a test registers."""
    before = dict(backends._backends)
    yield backends._backends
    backends._backends.clear()
    backends._backends.update(before)

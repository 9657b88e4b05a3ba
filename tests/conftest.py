import os

import hypothesis
import pytest
import torch

from retention import backends
from retention.backends.xformers import blocks, probe

# The same examples each time where a failure must not depend on luck; new ones at a developer's desk.
everything = list(hypothesis.HealthCheck)
hypothesis.settings.register_profile("desk", deadline=None, suppress_health_check=everything)
hypothesis.settings.register_profile("ci", deadline=None, suppress_health_check=everything, derandomize=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "desk")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def registry():
    """Undo what a test registers."""
    before = dict(backends._backends)
    yield backends._backends
    backends._backends.clear()
    backends._backends.update(before)


@pytest.fixture
def unprobed(monkeypatch):
    """As if xformers had never been asked for, before and after."""

    def forget():
        probe._trouble.cache_clear()
        probe._causes.clear()
        blocks.library.cache_clear()

    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()

"""A few rounds of `python -m tests.crash`, which kills training and replacing."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it limits the size of files as Linux does")
def test_what_was_killed_and_resumed_gives_what_an_uninterrupted_run_gives():
    words = [sys.executable, "-m", "tests.crash", "--kills", "6"]
    result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every run ended with the same weights and losses" in result.stdout

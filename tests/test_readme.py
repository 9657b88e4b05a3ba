"""Every snippet of the README runs, and its tables say what is there."""

import inspect
import re
from pathlib import Path

import pytest

import retention

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: re.findall(r"import (\w+)$", text, re.MULTILINE)[-1])
def test_snippet_runs(snippet, registry):
    exec(compile(snippet, "README.md", "exec"), {})


def test_it_is_complete():
    assert len(SNIPPETS) >= 3
    assert "@@" not in README


def test_the_table_of_options_is_complete():
    table = README.split("## Options of the layer")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    options = set(inspect.signature(retention.MultiScaleRetention).parameters)
    assert named == options - {"dim", "num_heads", "device", "dtype"}


def test_the_table_of_backends_is_complete():
    table = README.split("## Backends")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == retention.backends.names()

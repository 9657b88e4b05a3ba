"""transformers' own common tests, from its source distribution. `.ci/transformers-common` fetches it and runs them."""

import os
import sys
import types
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

FOLDER = os.environ.get("TRANSFORMERS_TESTS")  # holds the package `transformers_tests`, the sdist's tests/
collect_ignore = [] if FOLDER else ["test_common.py"]


def stand_in(name, **content):
    """A module that transformers' tests import and its source distribution leaves out."""
    module = types.ModuleType(f"transformers_tests.{name}")
    vars(module).update(content)
    sys.modules[module.__name__] = module


if FOLDER:
    sys.path.insert(0, FOLDER)
    common = {
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 5,
        "architectures": ["BertModel"],
        "id2label": {0: "label"},
        "label2id": {"label": "0"},
        "problem_type": "regression",
    }
    stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    stand_in("utils.test_configuration_utils", config_common_kwargs=common)


def pytest_collection_modifyitems(items):
    """Expect what the table of failures says, and nothing that is not there."""
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    found = {item.nodeid.partition("::")[2]: item for item in ours}
    installed = Version(transformers.__version__)
    for entry in ours[0].module.FAILURES if ours else ():
        if "until" in entry and installed >= Version(entry["until"]):
            continue
        if entry["test"] not in found:
            raise pytest.UsageError(f"FAILURES has a test that is not there: {entry['test']}")
        found[entry["test"]].add_marker(pytest.mark.xfail(reason=entry["reason"], strict=True))

"""Every example in a docstring of `retention` runs and prints what it shows."""

import doctest
import importlib
import pkgutil

import pytest

import retention

FINDER = doctest.DocTestFinder()
ELSEWHERE = ("integrations", "cli", "__main__")


def modules(package):
    yield package
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if found.name.removeprefix("retention.") in ELSEWHERE:
            continue
        module = importlib.import_module(found.name)
        if found.ispkg:
            yield from modules(module)
        else:
            yield module


EXAMPLES = {test.name: test for module in modules(retention) for test in FINDER.find(module) if test.examples}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, registry):
    runner = doctest.DocTestRunner(verbose=False)
    report = []
    runner.run(EXAMPLES[name], out=report.append)
    assert runner.failures == 0, "".join(report)


def test_examples_are_found():
    names = ("functional.retain", "functional.step", "layer.MultiScaleRetention", "model.RetNet")
    assert {f"retention.{name}" for name in names} <= EXAMPLES.keys()


def test_a_wrong_example_is_noticed():
    (example,) = FINDER.find(_wrong)
    report = []
    assert doctest.DocTestRunner(verbose=False).run(example, out=report.append).failed == 1
    assert "Expected:\n    3" in "".join(report)


def _wrong():
    """
    >>> 1 + 1
    3
    """

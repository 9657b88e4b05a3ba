"""What is imported is declared, what is declared is pinned, and what the documents install is what was tested."""

import ast
import re
import sys
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from retention.integrations.transformers import compat
from retention.version import __version__
from retention.xformers import probe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along there

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRA = PROJECT["optional-dependencies"]
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
HOMES = {
    "sklearn": "scikit-learn",
    "fla": "flash-linear-attention",
}  # distributions that go by another name than what is imported
# What a file may count on, by the longest of these that its path begins with: the dependencies and these extras.
EXTRAS = {
    "retention": (),
    "retention/cli.py": ("cli",),
    "retention/xformers": ("xformers",),
    "retention/backends/triton": ("triton",),
    "retention/backends/fla.py": ("fla",),
    "integrations": (),
    "integrations/checkpoints.py": ("transformers",),
    "integrations/weights.py": ("transformers",),
    "integrations/transformers": ("cli", "datasets", "lora"),  # which includes the extra transformers
    "integrations/transformers/training/tasks.py": ("eval",),
    "integrations/timm": ("timm",),
    "benchmarks": ("bench",),
    "benchmarks/gpu": ("bench", "triton", "fla"),
}


def declared(*extras):
    """The requirements of an install with these extras, by name."""
    found = {}
    for line in chain(PROJECT["dependencies"], *(EXTRA[name] for name in extras)):
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            found |= declared(*requirement.extras)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def outside(source):
    """The distributions that a file imports from, but for types alone."""
    names = set()

    def visit(node):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    names -= {*sys.stdlib_module_names, "retention", "benchmarks", "integrations", "tests"}
    return {canonicalize_name(HOMES.get(name, name)) for name in names}


def undeclared(path, source):
    place = max((place for place in EXTRAS if Path(path).is_relative_to(place)), key=len)
    return outside(source) - declared(*EXTRAS[place]).keys()


@pytest.mark.slow
@pytest.mark.parametrize("top", ["retention", "integrations", "benchmarks"])
def test_every_import_is_declared_in_the_extra_that_needs_it(top):
    files = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / top).rglob("*.py"))}
    assert files
    assert {path: names for path, source in files.items() if (names := undeclared(path, source))} == {}


def wrong_pins(pins, requirements):
    bounds = {name: requirement.specifier for name, requirement in requirements.items()}
    return {
        f"{pin.name}{pin.specifier}"
        for pin in pins
        if pin.name in bounds
        for exact in pin.specifier
        if exact.operator != "==" or not bounds[pin.name].contains(exact.version)
    }


# Each build of torch names its own Triton; flash-linear-attention needs a GPU, and no test installs it; lm-eval needs
# an older python-dateutil than the pinned one, and CI does not install it.
UNPINNED = {"triton", "flash-linear-attention", "lm-eval"}


def test_every_dependency_is_pinned_to_a_version_that_its_bounds_allow():
    requirements = declared(*EXTRA)
    assert {"torch", "transformers", "timm", "pytest"} <= requirements.keys()
    assert requirements.keys() - {pin.name for pin in PINS} == UNPINNED
    assert wrong_pins(PINS, requirements) == set()


def test_what_has_its_own_versions_is_not_pinned():
    assert not {pin.name for pin in PINS} & {"pip", "setuptools", PROJECT["name"]}


def uses_constraints(command):
    return re.search(r"pip install -c constraints.txt (-e )?\"\.\[", command) is not None


INSTALLS = {
    "README.md": 3,
    "CONTRIBUTING.md": 1,
    **{f"docs/pages/{page}.md": 1 for page in ("get-started", "language-model", "benchmarks")},
}


@pytest.mark.parametrize(("document", "at_least"), INSTALLS.items())
def test_the_documents_install_what_was_tested(document, at_least):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    commands = re.findall(r"^.*pip install .*\"\.\[.*$", "".join(blocks), re.MULTILINE)
    assert len(commands) >= at_least
    assert [command for command in commands if not uses_constraints(command)] == []


def test_the_citation_is_of_this_version():
    version = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version is not None
    assert version[1] == __version__


def test_code_and_ci_name_the_versions_that_were_tested():
    bounds, pinned = declared("transformers"), {pin.name: str(pin.specifier)[2:] for pin in PINS}
    oldest, newest = compat.TESTED[0], compat.TESTED[-1]
    major, minor = map(int, newest.split("."))
    assert bounds["transformers"].specifier == SpecifierSet(f">={oldest},<{major}.{minor + 1}")
    assert pinned["transformers"].startswith(f"{newest}.")
    assert pinned["xformers"] == probe.TESTED
    torch = next(bound.version for bound in bounds["torch"].specifier if bound.operator == ">=")
    assert f"transformers=={oldest}.*" in (ROOT / ".ci/run").read_text()
    assert f'"torch=={torch}.*" "transformers=={oldest}.*"' in (ROOT / ".ci/matrix").read_text()


def test_this_test_can_fail():
    source = "from sklearn import svm\nif TYPE_CHECKING:\n    import typer\ndef f():\n    import json, einops.layers"
    assert outside(source) == {"scikit-learn", "einops"}
    assert undeclared("benchmarks/op.py", source) == set()
    assert undeclared("retention/layer.py", source) == {"scikit-learn"}
    assert undeclared("integrations/transformers/cache.py", "import timm, transformers") == {"timm"}
    assert wrong_pins([Requirement("transformers==5.99.0")], declared("transformers")) == {"transformers==5.99.0"}
    assert not uses_constraints('pip install ".[cli]"')

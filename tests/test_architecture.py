"""The folder layout is the architecture: this file fails when an import or the packaging contradicts it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along there

ROOT = Path(__file__).parents[1]
FILES = [path for top in ("retention", "integrations") for path in sorted((ROOT / top).rglob("*.py"))]
# Each may import those to its left.
LEVELS = (
    ("version", "errors", "constants", "local", "options"),
    ("decay", "rotary", "state"),
    ("call", "scores", "xformers"),
    ("sharding",),
    ("times",),
    ("normalisers",),
    ("arguments",),
    ("backends",),
    ("functional", "norm"),
    ("layer", "decoding", "former"),
    ("ffn", "heads"),
    ("model",),
    ("distributed",),
    ("integrations",),
    ("cli", "__main__"),
)
DOORS = {
    "transformers": "transformers",
    "timm": "timm",
    "safetensors": "weights",
    "accelerate": "transformers",
    "huggingface_hub": "transformers",
    "datasets": "transformers",
    "filelock": "saving",
    "matplotlib": "plot",
    "typer": "cli",
    "xformers": "library",
    "triton": "triton",
    "fla": "fla",
    "lm_eval": "tasks",
}


def level(parts):
    """Where a module stands; `retention/__init__.py` stands above all."""
    for part in parts[1:] if parts[0] == "retention" else parts:
        for height, names in enumerate(LEVELS):
            if part in names:
                return height
    return len(LEVELS)


def imports(path, source):
    """Every module a file imports, as the parts of its absolute name."""
    here = ("retention", *path.parts[:-1]) if path.parts[0] == "integrations" else path.parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            for alias in node.names:
                yield (*base, *(node.module or alias.name).split("."))
        elif isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)


def pointing_up(path, source):
    mine = level(path.with_suffix("").parts)
    return [".".join(t) for t in imports(path, source) if t[0] == "retention" and len(t) > 1 and level(t) > mine]


def through_the_wall(path, source):
    rooms = {*path.with_suffix("").parts}
    return [".".join(t) for t in imports(path, source) if t[0] in DOORS and DOORS[t[0]] not in rooms]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_and_outside_libraries_have_one_door(path):
    inside, source = path.relative_to(ROOT), path.read_text()
    assert not pointing_up(inside, source)
    assert not through_the_wall(inside, source)


COMPAT = "integrations/transformers/compat.py"
OF_A_RELEASE = ("past_key_values", "layer_past", "cache_params")  # names of the cache in this or that transformers


def names_of_a_release(path, source):
    """What only compat.py may have: imports from deep inside transformers, and names that move between its releases."""
    deep = [".".join(t) for t in imports(path, source) if t[0] == "transformers" and len(t) > 1]
    return [*deep, *(name for name in OF_A_RELEASE if name in source)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.relative_to(ROOT).parts[0] == "integrations" and p != ROOT / COMPAT],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_what_moves_in_transformers_is_in_one_file(path):
    assert not names_of_a_release(path.relative_to(ROOT), path.read_text())


def test_names_of_a_release_are_found():
    path = Path("integrations/transformers/modeling.py")
    assert names_of_a_release(path, "from transformers.utils.generic import can_return_tuple")
    assert names_of_a_release(path, "import transformers.masking_utils")
    assert names_of_a_release(path, "model(past_key_values=cache)") == ["past_key_values"]
    assert names_of_a_release(path, "from transformers import Cache\nimport transformers") == []
    assert names_of_a_release(path, (ROOT / COMPAT).read_text())


def test_this_test_can_fail():
    assert pointing_up(Path("retention/decay.py"), "from .layer import MultiScaleRetention") == ["retention.layer"]
    assert pointing_up(Path("retention/backends/eager.py"), "from ..functional import retain") == [
        "retention.functional"
    ]
    assert pointing_up(Path("integrations/swap.py"), "from retention import cli") == []
    assert pointing_up(Path("integrations/swap.py"), "import retention.cli") == ["retention.cli"]
    assert through_the_wall(Path("retention/model.py"), "import transformers.utils") == ["transformers.utils"]


def test_backends_do_not_import_each_other():
    folder = ROOT / "retention/backends"
    shared = {"operators", "packing"}  # what a backend may lean on; the registry leans on the backends
    names = {path.stem for path in folder.iterdir()} - {"__init__", "__pycache__"} - shared
    assert {"chunked", "eager", "xformers"} <= names
    for path in sorted(folder.rglob("*.py")):
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        if own not in ("__init__", "registry"):
            found = {
                t[2]
                for t in imports(path.relative_to(ROOT), path.read_text())
                if t[:2] == ("retention", "backends") and len(t) > 2
            }
            assert not found & (names - {own})


RESULTS = {"BackboneOutput", "Choice", "Chunked"}  # classes of objects that users get, and need not name


def public(source):
    """The names that a file defines for others: without an underscore, at its top."""
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]
        yield from (name for name in names if name and not name.startswith("_"))


def used_nowhere_else(path, source, others):
    return {
        name for name in public(source) if not any(name in words for other, words in others.items() if other != path)
    }


@pytest.mark.slow
def test_names_that_no_other_file_uses_are_private():
    tops = ("retention", "integrations", "tests", "benchmarks", "docs")
    texts = {path: path.read_text() for top in tops for path in (ROOT / top).rglob("*.py")}
    words = {path: set(re.findall(r"\w+", text)) for path, text in texts.items()}
    room = ROOT / "retention"
    unused = {
        str(path.relative_to(ROOT)): names
        for path, text in texts.items()
        if path.is_relative_to(room) and path.name != "cli.py"
        if (names := used_nowhere_else(path, text, words) - RESULTS)
    }
    assert not unused
    assert used_nowhere_else(Path("a.py"), "NEW = 1\n_OWN: int = 2\ndef seen(): ...", {Path("b.py"): {"seen"}}) == {
        "NEW"
    }


def undeclared(source):
    """Names that a file defines, and neither lists in `__all__` nor marks as private."""
    tree = ast.parse(source)
    listed, defined = set(), set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            # timm adds the models that it registers
            defined |= set() if "register_model" in map(ast.unparse, node.decorator_list) else {node.name}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            names = {name.id for name in found if isinstance(name.ctx, ast.Store)}
            if names == {"__all__"}:
                listed = set(ast.literal_eval(node.value))
            defined |= names
    return {name for name in defined - listed if not name.startswith("_")}


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.name != "cli.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_name_is_public_by_all_or_private_by_an_underscore(path):
    assert undeclared(path.read_text()) == set()


def test_undeclared_names_are_found():
    assert undeclared("__all__ = ['a']\na = b, c = 1, 2\n_d: int = 3\ndef e(): pass\nclass _F: pass") == {"b", "c", "e"}
    assert undeclared("@register_model\ndef model(): pass") == set()


def test_training_imports_the_models_and_not_the_other_way_round():
    room = ("retention", "integrations", "transformers", "training")
    folder = ROOT / "integrations/transformers"
    found = {path.name: [*imports(path.relative_to(ROOT), path.read_text())] for path in sorted(folder.glob("*.py"))}
    assert [name for name, modules in found.items() if any(module[:4] == room for module in modules)] == []
    train = folder / "training/train.py"
    assert room[:3] in {module[:3] for module in imports(train.relative_to(ROOT), train.read_text())}


def test_every_package_is_shipped():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES if path.name == "__init__.py"}
    assert set(listed) == {name if name.startswith("retention") else f"retention.{name}" for name in there}


@pytest.mark.slow
def test_the_core_torchscales_names_and_attention_need_torch_and_einops_alone():
    """xformers is imported at first use, and only there."""
    names = "retention, retention.integrations.torchscale, retention.xformers.attention"
    code = f"import sys, {names}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    others = {"transformers", "accelerate", "safetensors", "typer", "datasets", "matplotlib", "timm", "torchscale"}
    assert {"torch", "einops"} <= loaded
    assert not loaded & {*others, "xformers", "triton"}


def test_the_mapped_folder_has_one_name():
    code = "import integrations"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "import retention.integrations, not integrations" in result.stderr

"""The documents: every snippet runs, every command, link and option exists, every figure is what was recorded."""

import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import retention
from benchmarks import report
from benchmarks.__main__ import COMMANDS as BENCHMARK_COMMANDS
from benchmarks.__main__ import app as benchmarks_app
from benchmarks.__main__ import function_of
from retention.cli import app as retention_app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:^|/)(?:retention|python -m benchmarks|-m retention\.cli) (.*)")


def text_of(document):
    return document.read_text(encoding="utf-8")


def blocks(text, language):
    return [match for match in BLOCK.finditer(text) if match[1] == language]


def names(documents):
    return [str(document.relative_to(ROOT)) for document in documents]


WITH_SNIPPETS = [document for document in DOCUMENTS if blocks(text_of(document), "python")]


def program(text):
    """The snippets of a page as one program, each line at its own number."""
    lines = [""] * (text.count("\n") + 1)
    for block in blocks(text, "python"):
        first = text.count("\n", 0, block.start(2))
        for number, line in enumerate(block[2].splitlines()):
            lines[first + number] = line
    return "\n".join(lines)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder to work in, with the pretrained model that the documents speak of."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(tmp_path / "my_model")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default:.*shares the same shape constraints with another axis:UserWarning")  # torch.onnx
@pytest.mark.parametrize("document", WITH_SNIPPETS, ids=names(WITH_SNIPPETS))
def test_snippets_run(document, desk, registry):
    exec(compile(program(text_of(document)), str(document), "exec"), {"__name__": document.stem})


def test_snippets_are_found():
    assert {"README", "get-started", "layer", "backends", "replace-attention", "vision", "checkpoints"} <= {
        document.stem for document in WITH_SNIPPETS
    }
    assert (
        program("a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = 2\n```") == "\n\nx = 1\n\n\n\n\n\ny = 2\n"
    )


# --- commands ---------------------------------------------------------------------------------------------------------


def lines_of(text):
    """The command lines of bash blocks; a line that ends with a backslash goes on in the next."""
    for block in blocks(text, "bash"):
        yield from (line for line in block[2].replace("\\\n", " ").splitlines() if line.strip())


COMMANDS = runpy.run_path(str(ROOT / "docs/commands.py"))


def options_of(app, functions):
    """The options of each command, by their functions, and those of the app itself under ""."""
    functions[""] = app.registered_callback and app.registered_callback.callback
    return {
        name: {"--help", *(option for names in COMMANDS["options"](function).values() for option in names)}
        for name, function in functions.items()
        if function
    }


RETENTION = options_of(
    retention_app,
    {command.name or command.callback.__name__: command.callback for command in retention_app.registered_commands},
)
BENCHMARKS = options_of(benchmarks_app, {name: function_of(name) for name in BENCHMARK_COMMANDS})


def unknown(line):
    """What of a command line does not exist; None if it is no command of ours."""
    if not (match := COMMAND.search(line.partition("#")[0])):
        return None
    known = BENCHMARKS if "benchmarks" in match[0] else RETENTION
    name, wrong = "", []
    for word in shlex.split(match[1]):
        if word.startswith("--"):
            wrong += [] if word.partition("=")[0] in known.get(name, {"--help"}) else [word]
        elif not name and word in known:
            name = word
    return wrong if name or "--help" in line else [*wrong, line]


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_commands_exist(document):
    found = {line: wrong for line in lines_of(text_of(document)) if (wrong := unknown(line))}
    assert found == {}


def test_unknown_commands_are_noticed():
    assert unknown(".venv/bin/retention train my_texts/ --out x") == []
    assert unknown(".venv/bin/retention train --outt x") == ["--outt"]
    assert unknown("retention nothing") == ["retention nothing"]
    assert unknown("python -m benchmarks --results FILE op --quick") == []
    assert unknown("python -m benchmarks op --compile") == ["--compile"]
    assert unknown("ls") is None


def test_the_page_of_the_command_line_is_that_of_the_help():
    page = COMMANDS["page"]()
    assert text_of(ROOT / "docs/pages/command-line.md") == page, "run `python docs/commands.py`"
    assert RETENTION.keys() - {""} == set(re.findall(r"^## retention (\w+)$", page, re.MULTILINE))
    for line in (
        "| `--lr` | number | `0.004` |",
        "| `--resume` |  |  |",
        "| `--from` | text |  |",
        "| `SOURCE` | path | required |",
    ):
        assert line in page


# --- links ------------------------------------------------------------------------------------------------------------


def broken(document, text):
    """Links to files that are not there."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [
        target
        for target in targets
        if "://" not in target and not (document.parent / target.partition("#")[0]).exists()
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_links_lead_somewhere(document):
    assert broken(document, text_of(document)) == []


def test_broken_links_are_noticed():
    assert broken(ROOT / "README.md", "[a](CHANGELOG.md#x) [b](docs/nowhere.md) [c](https://a.b)") == [
        "docs/nowhere.md"
    ]


def missing(text):
    """Paths in a text that are not there; a bare file name belongs to the folder of the path before it."""
    folder, found = ROOT, []
    for path in re.findall(r"`([\w./-]+/|[\w./-]+\.(?:py|txt|toml|cff|jsonl))`", text):
        place = ROOT / path if "/" in path or (ROOT / path).exists() else folder / path
        found += [] if place.exists() else [path]
        folder = place if place.is_dir() else place.parent if "/" in path else folder
    return found


def test_contributing_names_files_that_are_there():
    assert missing(text_of(ROOT / "CONTRIBUTING.md")) == []


def test_missing_files_are_noticed():
    assert missing("`retention/decay.py`, `norm.py`, `tests/`, `oracle.py`, `constraints.txt`") == []
    assert missing("`retention/decay.py`, `oracle.py`, `retention/nothing.py`") == ["oracle.py", "retention/nothing.py"]


# --- figures and tables -----------------------------------------------------------------------------------------------


def test_every_figure_is_what_was_recorded():
    documents = report.documents()
    assert {ROOT / "README.md", ROOT / "docs/pages/results.md"} <= set(documents)
    for document in documents:
        assert report.fill(text_of(document)) == text_of(document), "run `python -m benchmarks report`"


def test_another_figure_is_noticed():
    readme = text_of(ROOT / "README.md")
    speed = re.search(r"[\d,]+ tokens/s", readme)[0]
    assert report.fill(readme.replace(speed, "9 tokens/s")) == readme


def test_results_show_every_recorded_run():
    shown = set(re.findall(r"<!-- recorded: (\S+) -->", text_of(ROOT / "docs/pages/results.md")))
    assert shown == {file.stem for file in report.RESULTS.glob("*.jsonl")}


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


def section(document, heading):
    return text_of(document).split(f"## {heading}\n")[1].split("\n## ")[0]


def first_column(table):
    return [re.findall(r"`([\w-]+)`", row) for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)]


def test_the_table_of_options_is_complete():
    named = {
        name for row in first_column(section(ROOT / "docs/pages/layer.md", "Options of the layer")) for name in row
    }
    options = set(inspect.signature(retention.MultiScaleRetention).parameters)
    assert named == options - {"dim", "num_heads", "device", "dtype"}


@pytest.mark.parametrize(("document", "heading"), [("README.md", "Backends"), ("docs/pages/backends.md", None)])
def test_the_tables_of_backends_are_complete(document, heading):
    table = section(ROOT / document, heading) if heading else text_of(ROOT / document).partition("\n## ")[0]
    assert tuple(row[0] for row in first_column(table)) == retention.backends.names()


def test_the_table_of_replacement_options_is_complete():
    from retention.integrations.swap import HostedRetention

    table = section(ROOT / "docs/pages/replace-attention.md", "The new layers")
    named = {name for row in first_column(table) for name in row}
    options = set(inspect.signature(HostedRetention).parameters)
    assert named == options - {"heads", "device", "dtype"}


def test_the_tables_of_benchmarks_are_complete():
    named = {row[0] for row in first_column(text_of(ROOT / "docs/pages/benchmarks.md"))}
    assert named == BENCHMARKS.keys() - {""}

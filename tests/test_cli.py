"""`python -m retention` and what the command needs."""

import errno
import importlib
import re
import runpy
import sys
from typing import get_args, get_type_hints

import pytest
import torch
import typer
from typer.testing import CliRunner

import retention
from retention import cli
from retention.__main__ import report
from retention.errors import NotSavedError


@pytest.mark.slow
def test_report_names_versions_devices_and_every_backend():
    text = report()
    assert f"multiscale-retention {retention.__version__}" in text
    assert torch.__version__.split("+")[0] in text
    assert f"{torch.get_num_threads()} threads" in text
    assert "chunked        runs chunkwise" in text
    assert "eager          runs parallel, recurrent" in text


@pytest.mark.slow
def test_report_says_why_a_backend_cannot_run(monkeypatch):
    broken = retention.backends.Absent("cannot be loaded (OSError: libfast.so)")
    monkeypatch.setitem(retention.backends._backends, "fast", broken)
    assert "fast           cannot run: cannot be loaded (OSError: libfast.so)" in report()


def test_report_warns_of_a_second_owner_of_the_name(monkeypatch):
    owners = {"retention": ["multiscale-retention", "retention"]}
    monkeypatch.setattr("retention.__main__.packages_distributions", lambda: owners)
    assert "WARNING: several distributions own the package `retention`: multiscale-retention, retention" in report()


@pytest.mark.slow
def test_module_runs(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "retention.__main__")  # as if nothing had imported it
    runpy.run_module("retention", run_name="__main__")
    assert "backends on cpu" in capsys.readouterr().out


def test_the_command_says_what_to_install_without_typer(monkeypatch):
    monkeypatch.setattr(retention, "cli", cli)  # back again after the test
    monkeypatch.delitem(sys.modules, "retention.cli")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r'pip install "multiscale-retention\[cli\]"'):
        importlib.import_module("retention.cli")


@pytest.fixture
def failing(monkeypatch):
    """The command has an error that nobody foresaw."""
    monkeypatch.delenv("RETENTION_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["retention", "fail"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer puts its own there
    monkeypatch.setattr(cli.app, "registered_commands", [*cli.app.registered_commands])
    cli.app.command("fail")(lambda: {}["key"])


def test_an_error_that_nobody_foresaw_is_one_line(failing, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "error: KeyError: 'key'\nRETENTION_TRACEBACK=1 shows" in capsys.readouterr().err


def test_the_traceback_of_an_error_that_nobody_foresaw_is_shown_if_asked_for(failing, monkeypatch, capsys):
    monkeypatch.setenv("RETENTION_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli.main()
    assert "error: " not in capsys.readouterr().err


def options_of_commands():
    """Each option of each command with a help text."""
    for command in cli.app.registered_commands:
        hints = get_type_hints(command.callback, include_extras=True)
        for name, hint in hints.items():
            kind, *metadata = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
            if metadata:
                yield command.callback.__name__, name, kind, metadata[0].help


@pytest.mark.parametrize(("command", "name", "kind", "text"), [*options_of_commands()])
def test_help_is_sentences_and_a_number_says_what_it_counts(command, name, kind, text):
    assert text.endswith(".")
    assert len(text.split()) >= 5
    if kind in (int, float, int | None):
        assert re.match(r"(Number of|Length|Highest learning rate|Weight decay|Factor|Divisor|Seed|Draw each)", text)


def test_version():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{retention.__version__}\n")


def test_the_shell_completes_commands_and_options():
    def completed(line):
        environment = {"_RETENTION_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        return CliRunner().invoke(cli.app, [], prog_name="retention", env=environment).output.split()

    assert completed("retention tr") == ["train"]
    assert "--resume" in completed("retention train --res")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no"), 2),
        (FileNotFoundError(errno.ENOENT, "no"), 2),
        (OSError("no such repository"), 2),
        (retention.BackendError("no"), 2),
        (OSError(errno.ENOSPC, "full"), 1),
        (OSError(errno.EIO, "broken"), 1),
        (NotSavedError("full"), 1),
        (FloatingPointError("diverged"), 1),
        (KeyError("unforeseen"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_exit_codes(error, code, monkeypatch):
    app = typer.Typer()
    app.callback()(lambda: None)

    @app.command()
    def fail():
        with cli._told():
            raise error

    monkeypatch.setattr(cli, "app", lambda: app(["fail"]))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code


def test_wrong_usage_is_2_and_the_help_says_all_codes():
    assert CliRunner().invoke(cli.app, ["train", "--steps", "many"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["trian"]).exit_code == 2
    text = " ".join(CliRunner().invoke(cli.app, ["--help"]).output.split())
    for code in (0, 1, 2, 130, 143, 129):
        assert re.search(rf"\b{code}\b", text)

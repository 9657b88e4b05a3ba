"""`python -m retention` and what the command needs."""

import os
import subprocess
import sys

import torch

import retention
from retention.__main__ import report


def test_report_names_versions_devices_and_every_backend():
    text = report()
    assert f"multiscale-retention {retention.__version__}" in text
    assert torch.__version__.split("+")[0] in text
    assert f"{torch.get_num_threads()} threads" in text
    assert "chunked        runs chunkwise" in text
    assert "eager          runs parallel, recurrent" in text


def test_report_says_why_a_backend_cannot_run(monkeypatch):
    broken = retention.backends.Absent("cannot be loaded (OSError: libfast.so)")
    monkeypatch.setitem(retention.backends._backends, "fast", broken)
    assert "fast           cannot run: cannot be loaded (OSError: libfast.so)" in report()


def test_report_warns_of_a_second_owner_of_the_name(monkeypatch):
    owners = {"retention": ["multiscale-retention", "retention"]}
    monkeypatch.setattr("retention.__main__.packages_distributions", lambda: owners)
    assert "WARNING: several distributions own the package `retention`: multiscale-retention, retention" in report()


def test_module_runs():
    assert "backends on cpu" in subprocess.check_output([sys.executable, "-m", "retention"], text=True)


def test_the_command_says_what_to_install_without_typer():
    code = "import sys; sys.modules['typer'] = None; from retention.cli import main"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "multiscale-retention[cli]"' in result.stderr


def test_an_error_that_nobody_foresaw_is_one_line_unless_its_traceback_is_asked_for():
    code = "from retention import cli; cli.app.command('fail')(lambda: {}['key']); cli.main()"
    for extra, shown in (({}, False), ({"RETENTION_TRACEBACK": "1"}, True)):
        result = subprocess.run(
            [sys.executable, "-c", code, "fail"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **extra},
        )
        assert result.returncode == 1
        assert ("Traceback" in result.stderr) == shown
        assert ("error: KeyError: 'key'\nRETENTION_TRACEBACK=1 shows" in result.stderr) != shown

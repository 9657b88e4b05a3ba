"""Writes that are whole or not there, checkpoints that are known to be whole, and one run to a folder."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from retention.errors import NotSavedError
from retention.integrations.transformers.training import saving

FILES = [
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "nested/scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
]


def write_checkpoint(out, step):
    name = f"checkpoint-{step}"
    with saving.written_whole(out, name, as_folder=name) as aside:
        for file in FILES:
            (aside / name / file).parent.mkdir(parents=True, exist_ok=True)
            (aside / name / file).write_text(f"{file} of step {step}\n")
    return out / name


@pytest.mark.slow
@pytest.mark.parametrize("file", [*FILES, saving.SUMS])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "cut by a line", "other", "folder"])
def test_any_damage_to_any_file_is_seen(file, damage, tmp_path, capsys):
    write_checkpoint(tmp_path, 9)
    last = write_checkpoint(tmp_path, 10)
    assert saving.last_checkpoint(tmp_path) == last
    assert capsys.readouterr().out == ""
    whole = (last / file).read_bytes()
    if damage in ("missing", "folder"):
        (last / file).unlink()
    if damage == "folder":
        (last / file).mkdir()
    kept = {"empty": b"", "cut": whole[:-3], "cut by a line": b"".join(whole.splitlines(True)[:-1])}
    if damage not in ("missing", "folder"):
        (last / file).write_bytes(kept.get(damage, bytes(len(whole))))
    assert saving.last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{last} is left out: ")
    assert file in line


def test_what_is_no_checkpoint_is_left_out_and_left_there(tmp_path, capsys):
    whole = write_checkpoint(tmp_path, 3)
    (tmp_path / "checkpoint-abc").mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    assert saving.last_checkpoint(tmp_path) == whole
    told = capsys.readouterr().out
    assert "checkpoint-abc is left out: a checkpoint is called checkpoint- and the number of its step" in told
    assert "checkpoint-12 is left out: it is no folder" in told
    saving.remove_older(tmp_path, ["checkpoint-3"])
    assert (tmp_path / "checkpoint-abc").is_dir()
    whole.joinpath("optimizer.pt").unlink()
    assert saving.last_checkpoint(tmp_path) is None
    assert f"no checkpoint in {tmp_path} is whole; the training begins again" in capsys.readouterr().out


def test_what_is_older_and_not_kept_goes(tmp_path):
    for step in (1, 2, 3, 4, 30):
        write_checkpoint(tmp_path, step)
    saving.remove_older(tmp_path, ["checkpoint-2", "checkpoint-4"])
    assert [saving.step_of(path) for path in saving.checkpoints(tmp_path)] == [30, 4, 2]


def test_the_newest_is_found_by_its_number(tmp_path):
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    assert [saving.step_of(path) for path in saving.checkpoints(tmp_path)] == [100, 20, 9]
    assert saving.last_checkpoint(tmp_path).name == "checkpoint-100"
    assert saving.last_checkpoint(tmp_path / "nowhere") is None


def test_sha256sum_reads_the_digests(tmp_path):
    folder = write_checkpoint(tmp_path, 1)
    subprocess.run(["sha256sum", "--check", "--quiet", saving.SUMS], cwd=folder, check=True)


def test_what_fails_half_way_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")

    def half():
        with saving.written_whole(tmp_path, "it") as folder:
            (folder / "a").write_text("new")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(NotSavedError, match="it could not be written to .*: No space left on device; no checkpoint is"):
        half()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_full_disk_says_which_checkpoint_is_kept(tmp_path, monkeypatch):
    """torch tells of it in words of its own, so the system is asked again."""
    write_checkpoint(tmp_path, 4)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saving.Path, "write_bytes", full)
    message = "checkpoint-8 could not .*: No space left on device; checkpoint-4 is kept; make room, and continue with -"
    with (
        pytest.raises(NotSavedError, match=message),
        saving.written_whole(tmp_path, "checkpoint-8", as_folder="checkpoint-8"),
    ):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    assert saving.last_checkpoint(tmp_path).name == "checkpoint-4"


@pytest.mark.slow
def test_a_write_that_the_system_cuts_off_is_one_line(tmp_path):
    """A limit on the size of files, which torch's writer meets in its own code."""
    code = f"""
import resource, torch
from pathlib import Path
from retention.integrations.transformers.training.saving import written_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with written_whole(Path({str(tmp_path)!r}), "it") as folder:
        torch.save(torch.zeros(9999), folder / "optimizer.pt")
except OSError as error:
    print(error)
"""
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed.startswith(f"it could not be written to {tmp_path}: ")
    assert printed.endswith("no checkpoint is kept there; make room or name another --out, and begin again\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_was_killed_does_not_hold_its_folder(tmp_path):
    code = f"""
import time
from pathlib import Path
from retention.integrations.transformers.training.saving import alone_in
with alone_in(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another run writes to"), saving.alone_in(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
    with saving.alone_in(tmp_path):
        pass


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), saving.alone_in(tmp_path / "a/b"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with saving.alone_in(tmp_path / "a"):
        pass
    assert (tmp_path / "a").is_dir()
    with saving.alone_in(tmp_path / "b"):
        (tmp_path / "b/result").write_text("")
    assert (tmp_path / "b/result").exists()


def test_a_run_is_found_by_its_model_or_its_checkpoints(tmp_path):
    assert not saving.holds_run(tmp_path)
    (tmp_path / saving.ASIDE / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "checkpoint-abc").mkdir()
    assert not saving.holds_run(tmp_path)
    write_checkpoint(tmp_path / "part-1/tuning", 3)
    assert saving.holds_run(tmp_path)

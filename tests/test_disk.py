"""A disk that is full or read-only: one clear line, what was there stays, and no part is taken for the whole."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from leanvit import atomic, pool, record, run

LONG = "from IPython.display import HTML\nHTML('x' * 30_000)"  # an executed notebook that does not fit


def limited(repository, size, *arguments):
    """The command where no file can grow beyond `size` bytes, which is how a full disk looks to a program."""
    command = [sys.executable, "-m", "leanvit.run", *arguments]
    done = subprocess.run(
        command, cwd=repository.root, capture_output=True, text=True, timeout=240,
        env=os.environ | {"IPYTHONDIR": str(repository.root / ".ipython"), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.skipif(os.name != "posix", reason="no limits of a process here")
def test_a_disk_that_fills_up_during_a_run(repository):
    """The run fails in one line, the older result is untouched, and with room again the same command succeeds."""
    repository.notebook("1_x", LONG)
    repository.params("1_x")
    assert repository.call("run", "--tier", "smoke")[0] == 0
    smoke = repository.root / "outputs" / "smoke"
    before = contents(smoke)
    assert set(before) == {"1_x.json", "1_x.ipynb"}
    repository.params("1_x", text="lr: 0.5")
    code, output = limited(repository, 12_000, "run", "--tier", "smoke")
    assert code == 1 and "smoke/1_x: failed" in output and "File too large" in output, output
    assert "Traceback" not in output
    after = contents(smoke)
    assert {n: after[n] for n in before} == before  # not one byte of the result
    assert not [n for n in after if "staged" in n or n.endswith(".tmp")]
    code, output = limited(repository, 1_000, "run", "--tier", "smoke")
    assert code == 2 and output.splitlines()[-1] == "leanvit: outputs/smoke/ cannot be written: File too large"
    assert "failed" in repository.call("list")[1]
    assert repository.call("run", "--tier", "smoke")[0] == 0
    assert repository.result("smoke/1_x.json")["parameters"]["lr"] == 0.5
    assert set(contents(smoke)) == set(before)


def test_a_run_that_failed_for_want_of_room_says_so(repository, monkeypatch, capsys):
    """The log, on the same disk, may lack its end; and one long line of it does not fill the screen."""
    repository.notebook("1_x")
    job = run.plan(repository.root, repository.params("1_x"))
    record.write_atomic(repository.root / job.log, "y" * 9_000)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    assert pool._finish(repository.root, job, 1, 2.0).status == "failed"
    told = capsys.readouterr().out
    assert told.endswith("outputs/smoke/ cannot be written: No space left on device\n") and len(told) < 600


@pytest.mark.parametrize(("number", "words"), [(errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission")])
def test_outputs_that_are_read_only(repository, monkeypatch, capsys, number, words):
    """Before anything runs: code 2 and one line. (Simulated, as permissions do not bind an administrator.)"""
    repository.notebook("1_x")
    repository.params("1_x")
    result = repository.root / "outputs" / "smoke" / "1_x.json"
    record.write_atomic(result, "old")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.chdir(repository.root)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    monkeypatch.setattr(atomic.tempfile, "TemporaryFile", refuse)
    assert run.main(["run", "--tier", "smoke"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"leanvit: outputs/smoke/ cannot be written: {words}") and told.count("\n") == 1
    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot write 1_x.json in smoke/: " + words):
        patch.setattr(atomic.os, "open", refuse)
        record.write_atomic(result, "new")
    assert result.read_text() == "old" and [p.name for p in result.parent.iterdir()] == ["1_x.json"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind an administrator")
def test_a_folder_without_permission(repository):
    repository.notebook("1_x")
    repository.params("1_x")
    smoke = repository.root / "outputs" / "smoke"
    smoke.mkdir(parents=True)
    smoke.chmod(0o555)
    try:
        code, output = repository.call("run", "--tier", "smoke")
    finally:
        smoke.chmod(0o755)
    assert code == 2 and "outputs/smoke/ cannot be written: Permission denied" in output


def test_temporary_files_of_dead_processes_go(tmp_path):
    """kill -9 in the middle of writing leaves one; the next writer of that file, and no other, takes it away."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    kept = [f".a.json.{os.getppid()}-x1.tmp", f".b.json.{dead.pid}-x1.tmp", ".a.json.keep", ".a.json.12-x.tmp.json"]
    for name in [f".a.json.{dead.pid}-abc_12.tmp", *kept]:
        (tmp_path / name).write_text("half")
    record.write_atomic(tmp_path / "a.json", json.dumps("whole"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.json", *kept])
    with pytest.raises(KeyboardInterrupt), atomic.replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "a.json").read_text()) == "whole" and len(list(tmp_path.iterdir())) == 5

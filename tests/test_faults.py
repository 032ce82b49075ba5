"""What goes wrong around a run: each fault is said in a sentence, and nothing is lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from bench.fuzz import READERS, damaged, outcome
from common import UserError
from model.weights import load, save_tensors
from tests.conftest import ROOT, run, run_here
from tests.test_errors import refused
from tests.test_training import StopAt, assert_equal, flags, log, weights
from trainer import train_full_sft, training_run
from trainer.signals import RunLock, StopSignal

NAME = "trainer/train_full_sft.py"
SCRIPT = ROOT / NAME
LOCK = "checkpoints/full_sft_32.lock"
unix = pytest.mark.skipif(sys.platform == "win32", reason="signals and terminals of Unix")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The weights of an uninterrupted run of ten steps."""
    out = tmp_path_factory.mktemp("whole")
    train_full_sft.main(flags(data, out, **MORE))
    return weights(out)


MORE = {"epochs": 2, "dropout": 0.1, "save_interval": 2}


def stopped_at(steps, data, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "StopSignal", StopAt(steps))
        with pytest.raises(SystemExit):
            train_full_sft.main(flags(data, out, **MORE))


def resume(out, *more):
    train_full_sft.main(["--save_dir", str(out), "--from_resume", "1", *map(str, more)])


def start_long(data, out, **options):
    """A run of many steps in a process of its own, after its first ones."""
    command = [sys.executable, str(SCRIPT), *flags(data, out, epochs=5000)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    process = subprocess.Popen(command, **pipes)
    await_log(out, process.poll)
    return process


def await_log(out, poll):
    deadline = time.monotonic() + 60
    while not (out / "logs/full_sft_32.jsonl").exists() and time.monotonic() < deadline:
        assert poll() is None
        time.sleep(0.05)
    time.sleep(0.3)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3000])


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    data, tmp_path, monkeypatch, capsys, whole, damage
):
    stopped_at(5, data, tmp_path, monkeypatch)
    damage(tmp_path / "checkpoints/full_sft_32_resume.pth")
    capsys.readouterr()
    resume(tmp_path)
    said = capsys.readouterr().out
    assert "full_sft_32_step000004.pth at step 4" in said
    assert ("resume.pth is damaged" in said) == (damage is not Path.unlink)
    assert_equal(whole, weights(tmp_path))


def test_no_checkpoint_that_can_be_read_is_said(data, tmp_path, monkeypatch):
    stopped_at(5, data, tmp_path, monkeypatch)
    for path in (tmp_path / "checkpoints").glob("*.pth"):
        flip_a_bit(path)
    refused(run_here(NAME, "--save_dir", tmp_path, "--from_resume", 1), "resume.pth is damaged")


def test_a_second_run_under_the_same_name_is_refused_and_a_dead_ones_lock_is_not(data, tmp_path):
    lock = RunLock(tmp_path / LOCK)
    owner = f"process {os.getpid()} on "
    refused(run(SCRIPT, *flags(data, tmp_path)), owner, "is training under this name", LOCK)
    assert not list(tmp_path.rglob("*.pth"))
    lock.release()  # as the system does when a process dies
    assert (tmp_path / LOCK).read_text(encoding="utf-8").startswith(owner)
    assert run(SCRIPT, *flags(data, tmp_path)).returncode == 0


def test_a_run_that_failed_does_not_lock_out_the_next_of_its_process(data, tmp_path, monkeypatch):
    """A notebook keeps the error, and with it all that its frames hold."""

    def fails(*_, **__):
        raise UserError("it fails")

    with monkeypatch.context() as patch:
        patch.setattr(train_full_sft, "open_data", fails)
        with pytest.raises(UserError) as kept:
            train_full_sft.main(flags(data, tmp_path))
    train_full_sft.main(flags(data, tmp_path))
    assert kept.traceback and (tmp_path / "full_sft_32.pth").exists()


@unix
def test_a_killed_run_leaves_no_lock(data, tmp_path):
    process = start_long(data, tmp_path)
    refused(run(SCRIPT, *flags(data, tmp_path)), f"process {process.pid} on ")
    process.kill()
    process.communicate()
    assert run(SCRIPT, *flags(data, tmp_path)).returncode == 0


def test_data_that_changed_under_a_stopped_run_is_named(data, tmp_path, monkeypatch, capsys, whole):
    path = tmp_path / "sft.jsonl"
    original = (data / "sft.jsonl").read_text(encoding="utf-8")
    path.write_text(original, encoding="utf-8")
    stopped_at(5, tmp_path, tmp_path, monkeypatch)
    path.write_text(original.replace("What is 7", "What was 7"), encoding="utf-8")
    command = ["--save_dir", tmp_path, "--from_resume", 1]
    refused(run_here(NAME, *command), "the data has changed", "--force_resume 1")
    done = run_here(NAME, *command, "--force_resume", 1)
    assert done.returncode == 0 and "warning: the data has changed" in done.stdout
    assert log(tmp_path)[-1]["step"] == 10


def test_the_same_data_at_another_place_goes_on(data, tmp_path, monkeypatch, whole):
    stopped_at(5, data, tmp_path, monkeypatch)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((data / "sft.jsonl").read_bytes())
    resume(tmp_path, "--data_path", moved)
    assert_equal(whole, weights(tmp_path))


def test_a_clock_that_jumps_changes_nothing(data, tmp_path, monkeypatch, whole):
    now = iter(range(10**9, 0, -(10**6)))  # goes backwards by days
    monkeypatch.setattr(time, "time", lambda: next(now))
    stopped_at(5, data, tmp_path, monkeypatch)
    os.utime(tmp_path / "checkpoints/full_sft_32_resume.pth", (0, 0))
    resume(tmp_path)
    assert_equal(whole, weights(tmp_path))


@unix
def test_a_terminal_that_goes_away_stops_the_run_saved(data, tmp_path):
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(SCRIPT), *flags(data, tmp_path, epochs=5000)])
    await_log(tmp_path, lambda: None)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    saved = load(tmp_path / "checkpoints/full_sft_32_resume.pth")
    assert 0 < saved["run"]["step"] < 25000


@unix
def test_a_reader_that_goes_away_stops_the_run_without_a_traceback(data, tmp_path):
    """As in `python trainer/train_full_sft.py | head -n 1`."""
    process = start_long(data, tmp_path)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 1
    assert "Traceback" not in said and "BrokenPipe" not in said


def test_the_second_ctrl_c_breaks_in_and_a_third_does_not(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    try:
        stop = StopSignal()
        assert not stop.received
        signal.raise_signal(signal.SIGINT)
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_third_ctrl_c_while_the_second_is_received_ends_the_run_only_once(monkeypatch):
    stop, nested = StopSignal.__new__(StopSignal), []
    stop.received, stop.ending = True, False

    def interrupted(*given):  # signal.signal, in the middle of which the third one comes
        nested.append(given)
        stop.receive(signal.SIGINT, None)

    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT, None)
    assert nested == [(signal.SIGINT, signal.SIG_IGN)]


@unix
def test_ctrl_c_twice_stops_at_once_with_a_sentence(data, tmp_path):
    process = start_long(data, tmp_path)
    for _ in range(100):
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert not list(tmp_path.rglob("*.part"))


@unix
def test_a_folder_that_must_not_be_written_to_is_named_before_any_work(data):
    # The codec is loaded while the process may still read Python's own folder.
    code = (
        f"import encodings.utf_8_sig, os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from common import report_user_errors\n"
        "from trainer.train_full_sft import main\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"  # root may write anywhere
        "with report_user_errors(): main()"
    )
    # Not in pytest's folder, which another pytest closes to all but its owner when it starts.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(data / "sft.jsonl", folder)
        out = folder / "out"
        out.mkdir()
        out.chmod(0o555)
        folder.chmod(0o555)
        done = run("-c", code, *flags(folder, out))
        folder.chmod(0o755)
    refused(done, "cannot be used: Permission denied", "--save_dir")


@unix
def test_runs_that_are_killed_end_as_if_they_had_not_been():
    done = run("bench/faults.py", "--kills", 1, timeout=300)
    assert done.returncode == 0 and "1/1 identical" in done.stdout, done.stdout + done.stderr


@unix
def test_runs_that_are_killed_before_a_write_lose_nothing():
    """A few of the writes; bench/faults.py --writes takes them all."""
    done = run("bench/faults.py", "--writes", "--every", 127, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 lost something") == 3


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_give_a_value_or_a_clear_error(name, tmp_path):
    """bench/fuzz.py does this for as long as one likes."""
    rng, path = random.Random(0), tmp_path / "file"
    read, sample = READERS[name]
    path.write_bytes(sample)
    assert outcome(read, path) == ("error" if "flags" in name else "value")  # no such data file
    for _ in range(40):
        path.write_bytes(damaged(sample, rng))
        assert outcome(read, path) in ("value", "error")


@unix
def test_nohup_is_respected(monkeypatch):
    """Under nohup SIGHUP is ignored: closing the terminal does not stop the run."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = StopSignal()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.raise_signal(signal.SIGHUP)
        assert not stop.received
        signal.raise_signal(signal.SIGTERM)
        assert stop.received
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def test_a_file_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, Path.replace

    def note_sync(descriptor):
        order.append("sync")
        sync(descriptor)

    def note_replace(path, target):
        order.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    save_tensors(tmp_path / "x.pth", {"a": 1})
    assert order == ["sync", "rename"]

"""Left-over variables, shadowed modules, closed terminals, full disks, poor encodings: the cause is named."""

from __future__ import annotations

import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.command import checkpoints, command, environment, megamask, start, tiny

pytestmark = pytest.mark.multiprocess


def run(arguments: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    options = {"env": environment(), **options}
    return subprocess.run(arguments, stderr=subprocess.PIPE, text=True, timeout=120, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.promise("left-over or wrong RANK variables are refused by name (2)")
@pytest.mark.parametrize(
    ("left", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "not MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "abc", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK is 'abc'"),
        ({"RANK": "1"}, "not WORLD_SIZE"),
    ],
)
def test_left_over_rank_is_refused_by_name(
    small_corpus: Path, tmp_path: Path, left: dict[str, str], words: str
) -> None:
    arguments = command("train", *tiny(small_corpus, tmp_path, "run"))
    done = run(arguments, env={**environment(), **left}, stdout=subprocess.DEVNULL)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "hint: unset RANK" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def shadowed(tmp_path: Path) -> Path:
    """A working folder with a module of the user's own that has the name of a library's."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "random.py").write_text("def choose(items):\n    return items[-1]\n")
    return folder


@pytest.mark.promise("a module of the working folder takes no library's place")
def test_module_of_the_working_folder_takes_no_library_s_place_in_the_ranks(
    small_corpus: Path, tmp_path: Path, shadowed: Path
) -> None:
    megamask_script = Path(sys.executable).parent / "megamask"
    arguments = tiny(small_corpus, tmp_path, "run", "layout.tensor_parallel_size=2", "training.steps=10")
    done = run([str(megamask_script), "train", *arguments], cwd=shadowed, stdout=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


@pytest.mark.promise("a module that shadows a library's is named (2)")
def test_module_that_shadows_a_library_s_is_named(small_corpus: Path, tmp_path: Path, shadowed: Path) -> None:
    arguments = command("train", *tiny(small_corpus, tmp_path, "run"))  # `python -m`: the working folder comes first
    done = run(arguments, cwd=shadowed, stdout=subprocess.DEVNULL)
    assert done.returncode == 2, done.stderr
    assert f"{shadowed / 'random.py'} takes the place of the module 'random'" in done.stderr
    assert "bug in megamask" not in done.stderr


@pytest.mark.promise("a closed terminal or a full stdout does not change how a run ends")
def test_terminal_that_closes_does_not_change_the_end_of_a_run(small_corpus: Path, tmp_path: Path) -> None:
    arguments = [
        "sh",
        "-c",
        "trap '' HUP; exec \"$@\"",
        "sh",
        *command("train", *tiny(small_corpus, tmp_path, "run", "training.steps=40")),
    ]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        arguments,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(),
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 120
    while b"step" not in shown and time.monotonic() < deadline:
        shown += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=120) == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["phase"] == "done"


@pytest.mark.promise("a closed terminal or a full stdout does not change how a run ends")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: the promise about a full stdout is unproven")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_full_stdout_does_not_change_the_end_of_a_run(small_corpus: Path, tmp_path: Path, options: list[str]) -> None:
    arguments = command("train", *tiny(small_corpus, tmp_path, "run", "training.steps=10"), *options)
    with open("/dev/full", "w") as full:
        done = run(arguments, stdout=full)
    assert done.returncode == 0, done.stderr
    assert "the answer could not be written to stdout (No space left on device)" in done.stderr
    with open("/dev/full", "w") as full:
        assert run(command("status", tmp_path / "run"), stdout=full).returncode == 74


@pytest.mark.promise("SIGHUP without nohup saves and ends with 75")
def test_closed_terminal_without_nohup_saves(small_corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start("train", *tiny(small_corpus, tmp_path, "run", "training.steps=1000000", "checkpoint.every_steps=5"))
    deadline = time.monotonic() + 120
    while not (run_dir.is_dir() and checkpoints(run_dir)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["phase"], checkpoints(run_dir)[-1].name[:13]) == ("preempted", f"step-{status['step']:08d}")


@pytest.mark.promise("an ascii stdout loses no sampled text")
def test_ascii_stdout_keeps_the_sampled_text(small_corpus: Path, tmp_path: Path) -> None:
    assert megamask("train", *tiny(small_corpus, tmp_path, "run", "training.steps=10")).code == 0
    arguments = command("sample", tmp_path / "run", "--prompt", "é日本", "--length", "4")
    done = run(arguments, stdout=subprocess.PIPE, env={**environment(), "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("\\xe9\\u65e5\\u672c")


@pytest.mark.promise("too few file descriptors are named (2)")
def test_too_few_descriptors_are_named(small_corpus: Path, tmp_path: Path) -> None:
    arguments = command("train", *tiny(small_corpus, tmp_path, "run"))
    done = run(
        arguments,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    assert done.returncode == 2, done.stderr
    assert "this process may open 64 files and connections at a time" in done.stderr
    assert "ulimit -n" in done.stderr


@pytest.mark.promise("a missing loopback interface is named (2)")
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="needs root and unshare: the promise about a missing loopback interface is unproven",
)
def test_missing_loopback_is_named(small_corpus: Path, tmp_path: Path) -> None:
    arguments = command("train", *tiny(small_corpus, tmp_path, "run", "layout.data_parallel_size=2"))
    done = run(["unshare", "--net", *arguments], stdout=subprocess.DEVNULL)
    assert done.returncode == 2, done.stderr
    assert "cannot meet at 127.0.0.1" in done.stderr
    assert "ip link set lo up" in done.stderr

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import types

import pytest

from megamask.errors import (
    CheckpointIntegrityError,
    DataIntegrityError,
    NumericsError,
    StorageError,
    SupersededError,
    UsageError,
)
from megamask_pipelines.cli import main as cli

MAIN = [sys.executable, "-m", "megamask_pipelines.cli.main"]
HEAVY = ("torch", "numpy", "yaml", "mlflow", "megatron", "pyarrow", "rich")


def megamask(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MAIN, *arguments], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def verb(monkeypatch):
    """Puts a verb of the test's own in the place of `status`; returns the function that sets what it does."""
    module = types.ModuleType("megamask_pipelines.cli.status")
    module.add_arguments = lambda parser: parser.add_argument("run")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def does(run, render=None):
        module.run = run
        if render is not None:
            module.render = render
        return module

    return does


def raising(error: BaseException):
    def run(_arguments):
        raise error

    return run


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_lists_every_verb_and_no_other(capsys, arguments):
    assert cli.main(arguments) == 0
    listed = capsys.readouterr().out.split("verbs:")[1].split("options:")[0]
    names = [line.split()[0] for line in listed.splitlines() if line.strip()]
    assert names == list(cli.VERBS)


def test_nothing_given_is_a_usage_error_with_help_on_stderr(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert "verbs:" in captured.err
    assert captured.out == ""


def test_version_is_that_of_the_package(capsys):
    from importlib.metadata import version

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megamask {version('megamask')}\n"


@pytest.mark.promise("`--help` imports nothing heavy")
@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in cli.VERBS)])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom megamask_pipelines.cli.main import main\n"
        f"code = main({arguments!r})\nprint(code, sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip().splitlines()[-1] == "0 []", done.stderr
    assert done.stdout.startswith("usage: megamask")


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_takes_json(capsys, name):
    assert cli.main([name, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "unknown verb 'trian'; allowed: prepare, data, train," in error
    assert "hint: did you mean train?" in error


@pytest.mark.parametrize(
    "arguments", [["status"], ["status", "a", "b"], ["status", "a", "--no-such"], ["verify", "x", "y"]]
)
def test_wrong_arguments_are_usage_errors_with_one_message(capsys, arguments):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert f"hint: `megamask {arguments[0]} --help`" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("m", hint="h"), 2),
        (DataIntegrityError("m", hint="h"), 64),
        (CheckpointIntegrityError("m", hint="h"), 65),
        (NumericsError("m", hint="h"), 66),
        (StorageError("m", hint="h"), 74),
        (SupersededError("m", hint="h"), 93),
    ],
)
def test_typed_error_becomes_message_hint_and_exit_code(capsys, verb, error, code):
    verb(raising(error))
    assert cli.main(["status", "x"]) == code
    captured = capsys.readouterr()
    assert captured.err == "error: m\nhint: h\n"
    assert captured.out == ""
    assert cli.main(["status", "x", "--json"]) == code
    captured = capsys.readouterr()
    assert captured.err == "error: m\nhint: h\n"
    assert json.loads(captured.out) == {"error": "m", "hint": "h", "exit_code": code}


def test_unexpected_exception_is_a_bug_with_its_trace(capsys, verb):
    verb(raising(ZeroDivisionError("by nothing")))
    assert cli.main(["status", "x", "--json"]) == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert json.loads(captured.out)["error"] == "ZeroDivisionError: by nothing"
    assert json.loads(captured.out)["exit_code"] == 1


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (errno.ENOSPC, 74, "the disk is full"),
        (errno.EROFS, 74, "read-only"),
        (errno.EDQUOT, 74, "quota"),
        (errno.EIO, 74, "input/output"),
        (errno.EPIPE, 1, "Traceback"),
        (errno.ENOENT, 1, "Traceback"),
    ],
)
def test_storage_that_fails_is_74_and_other_system_errors_are_bugs(capsys, verb, number, code, words):
    verb(raising(OSError(number, os.strerror(number), "some/file")))
    assert cli.main(["status", "x"]) == code
    assert words in capsys.readouterr().err


def test_interrupt_ends_with_130(capsys, verb):
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["status", "x", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["exit_code"] == 130


@pytest.mark.parametrize(("code", "expected"), [(75, 75), (None, 0), ("words", 1)])
def test_system_exit_of_a_verb_keeps_its_code(verb, code, expected):
    verb(raising(SystemExit(code)))
    assert cli.main(["status", "x"]) == expected


@pytest.mark.parametrize(("result", "code"), [({"a": 1}, 0), ({"exit_code": 75}, 75), ({"exit_code": 0}, 0)])
def test_exit_code_of_an_answer_becomes_the_processs(verb, result, code):
    verb(lambda _arguments: result)
    assert cli.main(["status", "x"]) == code


def test_answer_is_rendered_for_people_and_json_for_programs(capsys, verb):
    answer = {"name": "é", "loss": float("nan"), "nested": [{"rate": float("-inf")}, 1.5], "path": None}
    verb(lambda _arguments: answer)
    assert cli.main(["status", "x"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "name    é"
    assert cli.main(["status", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "name": "é",
        "loss": "nan",
        "nested": [{"rate": "-inf"}, 1.5],
        "path": None,
    }
    verb(lambda _arguments: answer, render=lambda result: f"just {result['name']}")
    assert cli.main(["status", "x"]) == 0
    assert capsys.readouterr().out == "just é\n"


def test_options_and_overrides_may_be_mixed(capsys, monkeypatch, verb):
    def add_arguments(parser):
        parser.add_argument("config")
        parser.add_argument("overrides", nargs="*")

    module = verb(lambda arguments: {"config": arguments.config, "overrides": arguments.overrides})
    module.add_arguments = add_arguments
    assert cli.main(["status", "c.yaml", "--json", "a.b=1", "c.d=[2, 3]"]) == 0
    assert json.loads(capsys.readouterr().out) == {"config": "c.yaml", "overrides": ["a.b=1", "c.d=[2, 3]"]}


def test_what_a_verb_prints_goes_to_stderr_with_json(capsys, verb):
    def run(_arguments):
        print("chatter")
        return {"a": 1}

    verb(run)
    assert cli.main(["status", "x", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out == '{"a": 1}\n'
    assert "chatter" in captured.err


@pytest.mark.promise("with --json stdout contains only the answer")
def test_stdout_holds_only_the_answer_whatever_libraries_and_children_print():
    code = """
import ctypes, os, subprocess, sys, types
module = types.ModuleType("megamask_pipelines.cli.status")
module.add_arguments = lambda parser: None
def run(arguments):
    print("python")
    os.write(1, b"descriptor\\n")
    subprocess.run([sys.executable, "-c", "print('child')"])
    ctypes.CDLL(None).printf(b"c library\\n")  # stays in its buffer until the process ends
    return {"a": 1}
module.run = run
sys.modules[module.__name__] = module
sys.argv = ["megamask", "status", "--json"]
from megamask_pipelines.cli.main import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == '{"a": 1}\n'
    for word in ("python", "descriptor", "child", "c library"):
        assert word in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["explain"], ["explain", "--json"], ["explain", "--help"]])
def test_reader_that_goes_away_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*MAIN, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "run.seed"], ["explain", "run.seed", "--json"]])
def test_closed_stdout_is_no_error(arguments):
    shell = " ".join([*MAIN, *arguments, ">&-"])
    done = subprocess.run(shell, shell=True, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


MISSING = {
    "prepare": ["no/such.yaml"],
    "data": ["stats", "no/such/corpus"],
    "train": ["no/such.yaml"],
    "plan": ["no/such.yaml"],
    "launch": ["node", "no/such.yaml"],
    "evaluate": ["no/such/run"],
    "sample": ["no/such/run"],
    "convert": ["to-hf", "no/such/run", "no/such/folder"],
    "average": ["no/such/run", "no/such/folder"],
    "inspect": ["no/such/run", "--step", "1"],
    "verify": ["corpus", "no/such/corpus"],
    "status": ["no/such/run"],
    "sync": ["no/such/run"],
    "new-config": ("/dev/null/no/such",),
    "explain": ["no.such"],
}


@pytest.mark.promise("every verb refuses a missing argument path with one clear error")
@pytest.mark.parametrize("name", [verb for verb in cli.VERBS if verb != "doctor"])  # it takes nothing
def test_every_verb_refuses_what_is_not_there_with_one_clear_error(name):
    done = megamask(name, *MISSING[name], "--json")
    assert done.returncode == 2, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    answer = json.loads(lines[0])
    assert answer["exit_code"] == 2
    assert "no/such" in answer["error"] or "no.such" in answer["error"]
    assert "Traceback" not in done.stderr


@pytest.mark.promise("the exit code survives a thread inside torch's writer")
@pytest.mark.multiprocess
def test_exit_code_survives_a_thread_that_hangs_inside_torch_s_writer():
    script = """
import sys, threading, time, types, torch
from megamask.checkpoint.background import Work
from megamask_pipelines.cli import main as cli

class Slow:
    def write(self, data):
        is_writing.set()
        while True:  # on and on back into Python, which ends such a thread when the interpreter shuts down
            time.sleep(0.001)

    def flush(self):
        pass

def run(arguments):
    Work(lambda gate: torch.save(torch.zeros(9), Slow()), in_thread=True)
    assert is_writing.wait(120)
    return {"answer": "given", "exit_code": 74}

is_writing = threading.Event()
cli._import_verb = lambda name: types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
sys.argv = ["megamask", "train", "--json"]
sys.exit(cli.main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 74, done.stderr
    assert json.loads(done.stdout) == {"answer": "given", "exit_code": 74}


@pytest.mark.multiprocess
@pytest.mark.promise("a C++ library that aborts while a process ends does not change its exit code")
def test_abort_in_a_destructor_of_a_library_does_not_change_the_exit_code():
    """torch is a name here; the handler runs where the destructors of C++ objects run."""
    program = (
        "import atexit, ctypes, sys, types\n"
        "sys.modules['torch'] = types.ModuleType('torch')\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)\n"
        "atexit.register(lambda: print('farewell of Python', file=sys.stderr, flush=True))\n"
        "from megamask_pipelines.cli.main import main\n"
        "sys.argv = ['megamask', 'explain', 'run.seed']\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "run.seed" in done.stdout
    assert "farewell of Python" in done.stderr

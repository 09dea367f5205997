"""`megamask VERB ...`: find the verb, print its answer, turn errors into messages and exit codes.

Each verb is a module beside this one with `add_arguments(parser)`, `run(arguments) -> dict` and, for people,
`render(result) -> str`. Only the requested verb is imported, so that help is immediate.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NoReturn, Protocol

from megamask.errors import ExitCode, MegamaskError, UsageError
from megamask.provenance import redacted_output
from megamask.provenance.redaction import redact, redacted
from megamask.resilience import daemon_threads, surroundings
from megamask_pipelines import standard_streams

VERBS: Mapping[str, str] = {
    "prepare": "make a corpus from text files",
    "data": "statistics of a corpus; which rows and steps have a document",
    "train": "train a run, or resume it",
    "launch": "make or submit the job of a run for Slurm or Kubernetes; run one node of it",
    "evaluate": "measure the likelihood bound of a run or checkpoint on held-out text",
    "sample": "continue a prompt, or fill the gaps of a text",
    "convert": "import a published model, or export a checkpoint in Hugging Face layout",
    "average": "merge the best checkpoints of a run into one",
    "inspect": "recompute the exact samples and masks of a training step",
    "verify": "read every byte of a corpus, checkpoint or run and compare it with its record",
    "status": "show the state of a run, attempt by attempt",
    "sync": "upload the parts of a run that MLflow is missing",
    "explain": "explain a setting: meaning, range, default, origin",
    "plan": "estimate memory, speed and fitness of a run on GPUs, without a device",
    "doctor": "examine this machine: versions, features, storage, devices, collectives",
    "new-config": "write a commented minimal corpus and run config",
}
_HELP = """usage: megamask VERB [CONFIG.yaml] [key.path=value ...] [--json]

Pretrains masked-diffusion language models on megatron-core.

verbs:
{verbs}

options:
  -h, --help   show this text; `megamask VERB --help` shows that of a verb
  --version    show the version of megamask
  --json       with every verb: one JSON object as the last line of stdout, everything else on stderr
"""


class Verb(Protocol):
    """Interface of a verb's module; `render` is optional."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments."""

    def run(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """Run the verb; an "exit_code" in the answer becomes that of the process."""


class _Parser(argparse.ArgumentParser):
    """A parser that raises its complaint as a UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. Nothing was started.", hint=f"`{self.prog} --help` shows the arguments")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line after `megamask`; None means the process's own.

    Returns:
        The exit code of the contract (megamask.errors.ExitCode).
    """
    if sys.stdout is None:  # started with descriptor 1 closed; keep other files from taking its number
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  open until the process ends
    standard_streams.prepare()
    given = list(sys.argv[1:] if arguments is None else arguments)
    wants_json = "--json" in given
    if not given or given[0] in ("-h", "--help"):
        _print(_help_text(), sys.stdout if given else sys.stderr)
        return int(ExitCode.DONE if given else ExitCode.USAGE)
    if given[0] == "--version":
        from importlib.metadata import version

        _print(f"megamask {version('megamask')}")
        return int(ExitCode.DONE)
    redacted_output.install()
    with _stdout_kept_for_the_answer(wants_json, owns_process=arguments is None) as answer:
        code = _guarded(lambda: _run_verb(given[0], given[1:], answer), given[0], answer if wants_json else None)
    if arguments is None:
        _ignore_late_signals()
        standard_streams.settle()
        if daemon_threads.any_alive():
            _leave_at_once(code)
        if "torch" in sys.modules:
            atexit._run_exitfuncs()
            _leave_at_once(code)
    return code


def _ignore_late_signals() -> None:
    """Keep the exit code, which is decided: a scheduler ends a job's other processes as soon as the first has left."""
    import signal

    from megamask.resilience.signals import PREEMPTION_SIGNALS

    signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)


def _leave_at_once(code: int) -> NoReturn:
    """End the process without the interpreter's farewell, which may turn into SIGABRT.

    A thread inside a write does that, and sometimes a C++ thread of torch's that is still there when its objects are
    destroyed ("terminate called without an active exception").
    """
    import logging

    logging.shutdown()
    standard_streams.settle()
    os._exit(code)


def _run_verb(name: str, arguments: list[str], answer: IO[str]) -> int:
    verb = _import_verb(name)
    parser = _Parser(prog=f"megamask {name}", description=VERBS[name], allow_abbrev=False)
    verb.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    with contextlib.redirect_stdout(answer):  # where --help is printed
        parsed = parser.parse_intermixed_args(arguments)
    _configure_logging()
    result = verb.run(parsed)
    try:
        if parsed.json:
            _print_json(result, answer)
        else:
            render: Callable[[dict[str, Any]], str] = getattr(verb, "render", _render_plainly)
            _print(render(result), answer)
    except OSError as error:
        on_disk = getattr(verb, "ANSWER_IS_ON_DISK", False)
        if not (on_disk(result) if callable(on_disk) else on_disk):
            raise
        _print(f"the answer could not be written to stdout ({error.strerror}); its content is on the disk", sys.stderr)
    return int(result.get("exit_code") or ExitCode.DONE)


def _import_verb(name: str) -> Any:
    if name not in VERBS:
        import difflib

        nearest = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else "`megamask --help` describes each verb"
        raise UsageError(f"unknown verb {name!r}; allowed: {', '.join(VERBS)}. Nothing was started.", hint=hint)
    return importlib.import_module(f"megamask_pipelines.cli.{name.replace('-', '_')}")


def _guarded(action: Callable[[], int], name: str, json_answer: IO[str] | None) -> int:
    """The action's exit code, or that of the error that it ends with."""
    try:
        return action()
    except MegamaskError as error:
        return _report(error, json_answer)
    except OSError as error:
        refusal = surroundings.explained(error) or _path_refusal(error) or _storage_refusal(error, name)
        return _report_bug(error, json_answer) if refusal is None else _report(refusal, json_answer)
    except KeyboardInterrupt:
        interrupted = MegamaskError("interrupted")
        interrupted.exit_code = ExitCode.INTERRUPTED_TWICE
        return _report(interrupted, json_answer)
    except SystemExit as end:  # argparse's --help; a rank that has left its report to the launcher
        if isinstance(end.code, int):
            return end.code
        return int(ExitCode.DONE if end.code is None else ExitCode.BUG)
    except Exception as error:  # noqa: BLE001  the outermost frame: prints the traceback
        cause = surroundings.explained(error)
        return _report_bug(error, json_answer) if cause is None else _report(cause, json_answer)


def _report(error: MegamaskError, json_answer: IO[str] | None) -> int:
    error = redacted(error)
    _print(f"error: {error.message}", sys.stderr)
    if error.hint is not None:
        _print(f"hint: {error.hint}", sys.stderr)
    if json_answer is not None:
        described = {**error.details, "error": error.message, "hint": error.hint, "exit_code": int(error.exit_code)}
        _print_json(described, json_answer)
    return int(error.exit_code)


def _report_bug(error: Exception, json_answer: IO[str] | None) -> int:
    import traceback

    _print(redact("".join(traceback.format_exception(error)).rstrip()), sys.stderr)
    described = MegamaskError(f"{type(error).__name__}: {error}", hint="this is a bug in megamask; the trace is above")
    return _report(described, json_answer)


def _path_refusal(error: OSError) -> MegamaskError | None:
    """Return the error of a path that no file system accepts, from any verb, key or option; None for other causes."""
    if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
        return None
    return UsageError(f"{error.filename} cannot be a path: {error.strerror}. Nothing was started.", hint="shorten it")


def _storage_refusal(error: OSError, name: str) -> MegamaskError | None:
    """The error of a full, read-only or failing disk that no room has named, or None where storage is not to blame."""
    from megamask.errors import StorageError
    from megamask.storage.durable import storage_errors

    try:
        with storage_errors(f"megamask {name}"):
            raise error
    except StorageError as refusal:
        return refusal
    except OSError:
        return None


def _configure_logging() -> None:
    import logging

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


@contextlib.contextmanager
def _stdout_kept_for_the_answer(wants_json: bool, *, owns_process: bool) -> Iterator[IO[str]]:
    """With --json, send all output of libraries and child processes to stderr; only the answer goes to stdout.

    Args:
        owns_process: this is the process's only command, so its descriptor 1 may point at stderr until the end; what C
            libraries still have in their buffers then cannot follow the answer.
    """
    if not wants_json:
        yield sys.stdout
        return
    with contextlib.ExitStack() as stack:
        answer: IO[str] = sys.stdout
        if owns_process and (kept := _divert_stdout()) is not None:
            answer = stack.enter_context(os.fdopen(kept, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield answer


def _divert_stdout() -> int | None:
    """Points descriptor 1 at stderr and returns a copy of what it was, or None where one of them is closed."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError, AttributeError):  # AttributeError: the interpreter has no stdout at all
        return None
    return kept


def _print_json(result: Mapping[str, Any], stream: IO[str]) -> None:
    import json

    _print(json.dumps(_finite(result), allow_nan=False), stream)


def _finite(value: Any) -> Any:
    """The value with non-finite numbers as strings, as the journal has them: JSON knows no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _render_plainly(result: Mapping[str, Any]) -> str:
    width = max((len(name) for name in result), default=0)
    return "\n".join(f"{name:{width}}  {value}" for name, value in result.items() if name != "exit_code")


def _help_text() -> str:
    return _HELP.format(verbs="\n".join(f"  {name:10} {text}" for name, text in VERBS.items()))


def _print(text: str, stream: IO[str] | None = None) -> None:
    standard_streams.write_line(text, stream or sys.stdout)


if __name__ == "__main__":
    sys.exit(main())

"""`megamask VERB ...`: find the verb, print its answer, turn errors into messages and exit codes.

Each verb is a module beside this one with `add_arguments(parser)`, `run(arguments) -> dict` and, for people,
`render(result) -> str`. Only the requested verb is imported, so that help is immediate.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, NoReturn, Protocol

from megamask.errors import ExitCode, UsageError
from megamask.provenance import redacted_output
from megamask_pipelines import completion, process_end, standard_streams
from megamask_pipelines.verb_answer import print_json, print_line, render_plainly, stdout_kept_for_the_answer
from megamask_pipelines.verb_errors import guarded

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
    if arguments is None and completion.is_asked():
        completion.answer(VERBS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    wants_json = "--json" in given
    if not given or given[0] in ("-h", "--help"):
        print_line(_help_text(), sys.stdout if given else sys.stderr)
        return int(ExitCode.DONE if given else ExitCode.USAGE)
    if given[0] == "--version":
        from importlib.metadata import version

        print_line(f"megamask {version('megamask')}")
        return int(ExitCode.DONE)
    redacted_output.install()
    with stdout_kept_for_the_answer(wants_json, owns_process=arguments is None) as answer:
        code = guarded(lambda: _run_verb(given[0], given[1:], answer), given[0], answer if wants_json else None)
    if arguments is None:
        process_end.settle(code)
    return code


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
            print_json(result, answer)
        else:
            render: Callable[[dict[str, Any]], str] = getattr(verb, "render", render_plainly)
            print_line(render(result), answer)
    except OSError as error:
        on_disk = getattr(verb, "ANSWER_IS_ON_DISK", False)
        if not (on_disk(result) if callable(on_disk) else on_disk):
            raise
        print_line(
            f"the answer could not be written to stdout ({error.strerror}); its content is on the disk", sys.stderr
        )
    return int(result.get("exit_code") or ExitCode.DONE)


def _import_verb(name: str) -> Any:
    if name not in VERBS:
        import difflib

        nearest = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else "`megamask --help` describes each verb"
        raise UsageError(f"unknown verb {name!r}; allowed: {', '.join(VERBS)}. Nothing was started.", hint=hint)
    return importlib.import_module(f"megamask_pipelines.cli.{name.replace('-', '_')}")


def _configure_logging() -> None:
    import logging

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


def _help_text() -> str:
    return _HELP.format(verbs="\n".join(f"  {name:10} {text}" for name, text in VERBS.items()))


if __name__ == "__main__":
    sys.exit(main())

"""The answer of a verb on stdout, and nothing else on it where JSON is asked for."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any

from megamask_pipelines import standard_streams


@contextlib.contextmanager
def stdout_kept_for_the_answer(wants_json: bool, *, owns_process: bool) -> Iterator[IO[str]]:
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
    """Point descriptor 1 at stderr and return a copy of what it was, or None where one of them is closed."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError, AttributeError):  # AttributeError: the interpreter has no stdout at all
        return None
    return kept


def print_json(result: Mapping[str, Any], stream: IO[str]) -> None:
    """Print an answer as one line of JSON."""
    import json

    print_line(json.dumps(_finite(result), allow_nan=False), stream)


def _finite(value: Any) -> Any:
    """The value with non-finite numbers as strings, as the journal has them: JSON knows no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def render_plainly(result: Mapping[str, Any]) -> str:
    """Return an answer as aligned lines, for verbs without text of their own."""
    width = max((len(name) for name in result), default=0)
    return "\n".join(f"{name:{width}}  {value}" for name, value in result.items() if name != "exit_code")


def print_line(text: str, stream: IO[str] | None = None) -> None:
    """Print a line to a stream, stdout by default."""
    standard_streams.write_line(text, stream or sys.stdout)

"""`megamask new-config [FOLDER]`: writes a commented minimal corpus and run config."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megamask.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("folder", nargs="?", default=".", help="where to write corpus.yaml and run.yaml; default: here")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the configs, or nothing if one of them is there already.

    Returns: files, their paths.
    """
    from megamask.config.starter import FILES
    from megamask.storage.durable import create_exclusive, storage_errors

    folder = Path(arguments.folder)
    paths = {folder / name: text for name, text in FILES.items()}
    if present := next((path for path in paths if path.exists()), None):
        raise UsageError(f"{present} is there already. Nothing was written.", hint="give another folder, or move it")
    with storage_errors(str(folder)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UsageError(f"cannot make the folder {folder}: {error.strerror}. Nothing was written.") from error
        for path, text in paths.items():
            create_exclusive(path, text.encode())
    return {"files": [str(path) for path in paths]}


def render(result: dict[str, Any]) -> str:
    """Return the answer for people: the files and the commands that use them."""
    corpus, run_config = result["files"]
    return (
        f"wrote {corpus} and {run_config}; set corpus.inputs in the first, then\n"
        f"  megamask prepare {corpus}\n  megamask train {run_config} --check\n  megamask train {run_config}"
    )

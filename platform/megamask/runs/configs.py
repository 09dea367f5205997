"""The resolved config of each attempt, as the run directory keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamask.config.lines import parse_yaml, value_of_node
from megamask.errors import UsageError
from megamask.runs.layout import config_path, configs_folder
from megamask.storage.durable import make_folders, storage_errors, write_atomic

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig


def store_attempt_config(run_dir: Path, attempt: int, config: TrainConfig) -> Path:
    """Write the resolved config of an attempt, redacted, and return its path.

    Raises:
        StorageError: the storage refused.
    """
    from megamask.config.dump import to_yaml
    from megamask.provenance.redaction import redact_values

    path = config_path(run_dir, attempt)
    with storage_errors(f"creating {path.parent}"):
        make_folders(path.parent)
    write_atomic(path, to_yaml(config, hide=redact_values).encode())
    return path


def attempt_configs(run_dir: Path) -> dict[int, Path]:
    """Return the stored configs by attempt, oldest first; empty when there is none."""
    folder = configs_folder(run_dir)
    paths = folder.glob("attempt-*.yaml") if folder.is_dir() else ()
    numbered = {number: path for path in paths if (number := path.stem.removeprefix("attempt-")).isdecimal()}
    return {int(number): path for number, path in sorted(numbered.items(), key=lambda entry: int(entry[0]))}


def newest_config(run_dir: Path) -> TrainConfig | None:
    """Return the config of the newest attempt that stored one, or None.

    Raises:
        UsageError: the file is damaged, or a newer megamask wrote it.
    """
    from megamask.config.load import load_stored_config

    configs = attempt_configs(run_dir)
    return load_stored_config(configs[max(configs)]) if configs else None


def newest_steps(run_dir: Path) -> int | None:
    """Return training.steps of the newest attempt's config, or None where it cannot be read; loads no other setting."""
    configs = attempt_configs(run_dir)
    if not configs:
        return None
    try:
        node = parse_yaml(configs[max(configs)].read_text(encoding="utf-8"), str(configs[max(configs)]))
    except (UsageError, OSError, UnicodeDecodeError):
        return None
    content: Any = None if node is None else value_of_node(node)
    training = content.get("training") if isinstance(content, dict) else None
    steps = training.get("steps") if isinstance(training, dict) else None
    return steps if type(steps) is int else None

"""The resolved config of each attempt, as the run directory keeps it."""

from __future__ import annotations

from pathlib import Path

from megamask.config.dump import to_yaml
from megamask.config.load import load_stored_config
from megamask.config.schema.roots import TrainConfig
from megamask.provenance.redaction import redact_values
from megamask.runs.layout import config_path, configs_folder
from megamask.storage.durable import make_folders, storage_errors, write_atomic


def store_attempt_config(run_dir: Path, attempt: int, config: TrainConfig) -> Path:
    """Write the resolved config of an attempt, redacted, and return its path.

    Raises:
        StorageError: the storage refused.
    """
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
    configs = attempt_configs(run_dir)
    return load_stored_config(configs[max(configs)]) if configs else None

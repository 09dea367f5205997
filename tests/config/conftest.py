from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megamask.config.load import Loaded, load_train_config
from megamask.config.schema.roots import TrainConfig
from megamask.errors import UsageError
from support.config_files import write_configs


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Loaded[TrainConfig]]:
    """Loads run.yaml of a folder of small configs, from inside that folder, with overrides."""
    write_configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: load_train_config("run.yaml", overrides)


@pytest.fixture
def refusal() -> Callable[..., UsageError]:
    """Calls something that must be refused and returns the refusal."""

    def call(action: Callable[..., object], *arguments: object) -> UsageError:
        with pytest.raises(UsageError) as caught:
            action(*arguments)
        return caught.value

    return call

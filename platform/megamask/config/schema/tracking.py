"""Readers of the journal: console and MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.problem import Problem
from megamask.config.schema.field import operational, section
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig

_NOT_IN_A_DATABASE_ADDRESS = "?#%"


@dataclass(frozen=True, kw_only=True)
class MLflowConfig(Section):
    """The MLflow reader of the journal; training never waits for it, except for a bounded time at the end."""

    enabled: bool = operational("send the journal to MLflow", default=True)
    uri: str | None = operational(
        "tracking server; null means a SQLite file and local artifacts under run.output_dir", default=None
    )
    experiment: str = operational(
        "MLflow experiment that contains the run",
        default="megamask",
        pattern=r".*\S.*",
        pattern_words="a name with at least one visible character",
    )
    drain_timeout_s: float = operational(
        "longest wait at the end for what is still to be sent", default=60.0, minimum=0, unit="seconds"
    )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Console and MLflow; the journal itself cannot be switched off."""

    console_every_steps: int = operational(
        "without a terminal, print a line every so many steps", default=10, minimum=1, unit="steps"
    )
    journal_file_mib: int = operational(
        "a new file of the journal begins before a line that would take the one in use over this size",
        default=64,
        minimum=1,
        unit="MiB",
    )
    mlflow: MLflowConfig = section()

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """The default database is addressed by a URL, in which some characters of a path have another meaning."""
        found = [letter for letter in _NOT_IN_A_DATABASE_ADDRESS if letter in config.run.output_dir]
        if self.mlflow.enabled and self.mlflow.uri is None and found:
            yield Problem(
                key="run.output_dir",
                because=f"and MLflow's database is created in it, whose address cannot contain {found[0]!r}",
                allowed="a path without '?', '#' and '%'; or any path with tracking.mlflow.uri set or "
                "tracking.mlflow.enabled=false",
            )

"""Who is told how the run goes."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import operational, section
from megamask.config.schema.section import Section


@dataclass(frozen=True, kw_only=True)
class MLflowConfig(Section):
    """The MLflow reader of the journal; training never waits for it, except for a bounded time at the end."""

    enabled: bool = operational("send the journal to MLflow", default=True)
    uri: str | None = operational(
        "tracking server; null means a SQLite file and local artifacts under run.output_dir", default=None
    )
    experiment: str = operational("MLflow experiment that holds the run", default="megamask")
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

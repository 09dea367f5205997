"""The job of `megamask verify run`: the audit of a run directory, and the checks that need more than it."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamask.audit.report import Report
from megamask.audit.run import AuditRequest, verify_run
from megamask.errors import UsageError
from megamask_pipelines.corpus_arguments import corpora_of

_HEAD = re.compile(r"(\d+):([0-9a-f]{64})")


@dataclass(frozen=True, kw_only=True)
class RunChecks:
    """Checks beyond the run directory; `uri` is the tracking server of `compares_mlflow`, None for the run's own."""

    request: AuditRequest = field(default_factory=AuditRequest)
    evaluates: bool = False
    compares_mlflow: bool = False
    uri: str | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> RunChecks:
        """Read the verb's arguments.

        Raises:
            UsageError: a value that is not of its form.
        """
        head = None
        if arguments.expect_head is not None:
            match = _HEAD.fullmatch(arguments.expect_head)
            if match is None:
                raise UsageError(
                    f"--expect-head is {arguments.expect_head!r}; allowed: N:SHA, the number of a line and its sha256, "
                    "as `megamask verify run` prints it. Nothing was checked."
                )
            head = int(match[1]), match[2]
        corpora = corpora_of(arguments.corpus, outcome="Nothing was checked.")
        return cls(
            request=AuditRequest(
                corpora=corpora, head=head, checks_data=arguments.data, is_in_mlflow=arguments.against_mlflow
            ),
            evaluates=arguments.evaluate,
            compares_mlflow=arguments.against_mlflow,
            uri=arguments.uri,
        )


def verify(run_dir: Path, checks: RunChecks) -> dict[str, Any]:
    """Audit a run directory; returns and raises as `megamask.audit.run.verify_run`."""
    report = Report()
    if checks.compares_mlflow:
        from megamask_pipelines.sync_run import compare_with_mlflow

        for problem in compare_with_mlflow(run_dir, uri=checks.uri):
            report.find("MLflow", problem)
        report.covered.append("MLflow's parameters, points, digests and COMMIT.json artifacts")
    if checks.evaluates:
        from megamask_pipelines.remeasure import remeasure

        remeasure(run_dir, checks.request.corpora, report)
    else:
        report.not_covered.append("the bound of the newest checkpoint (--evaluate)")
    return verify_run(run_dir, checks.request, report)

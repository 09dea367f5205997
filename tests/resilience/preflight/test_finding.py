"""A list of checks: one that fails, hangs or breaks never hides the others."""

from __future__ import annotations

import threading

from megamask.resilience.preflight.finding import Check, Finding, answers


def outcome_of(run, **options) -> tuple[str, str]:
    (answer,) = answers([Check(name="subject", run=run, **options)])
    return answer.finding.outcome, answer.finding.message


def raising(error: Exception):
    def run() -> Finding:
        raise error

    return run


def test_checks_are_answered_in_order_with_their_seconds() -> None:
    checks = [Check(name=name, run=lambda name=name: Finding(outcome="pass", message=name)) for name in "abc"]
    found = answers(checks)
    assert [answer.name for answer in found] == [answer.finding.message for answer in found] == list("abc")
    assert all(answer.seconds >= 0 for answer in found)


def test_an_error_of_the_system_is_a_failure_with_its_path() -> None:
    assert outcome_of(raising(OSError(30, "Read-only file system", "/data"))) == (
        "fail",
        "/data: Read-only file system",
    )


def test_a_broken_check_is_a_failure_and_names_the_error() -> None:
    assert outcome_of(raising(ValueError("unexpected"))) == ("fail", "ValueError: unexpected")


def test_a_check_without_an_answer_fails_after_its_limit() -> None:
    never = threading.Event()

    def hang() -> Finding:
        never.wait(60)
        return Finding(outcome="pass", message="")

    try:
        assert outcome_of(hang, limit_s=0.05) == ("fail", "no answer within 0.05 s")
    finally:
        never.set()

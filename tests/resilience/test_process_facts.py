from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from megamask.resilience import process_facts
from megamask.resilience.process_facts import facts_of, node_name, own_facts


def test_own_process_is_running_here() -> None:
    facts = own_facts()
    assert facts.pid == os.getpid()
    assert facts.is_running_here()


@pytest.mark.parametrize("name", ["host", "boot_id", "pid_namespace", "pid", "process_start_time"])
def test_one_differing_fact_is_another_process(name: str) -> None:
    other: object = 2**22 + 1 if name in ("pid", "process_start_time") else "other"
    assert not dataclasses.replace(own_facts(), **{name: other}).is_running_here()


def test_ended_process_has_no_facts() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert facts_of(process.pid) is None


def test_stat_is_parsed_when_the_command_name_holds_parentheses() -> None:
    rest = " ".join(str(number) for number in range(4, 53))
    assert process_facts._parse_stat(f"12 (a) R (b) S {rest}".encode()) == ("S", 22)


def test_node_name_is_the_schedulers_when_it_gives_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NODE_NAME", raising=False)
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert node_name() == own_facts().host
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-17")
    assert node_name() == "gpu-17"
    monkeypatch.setenv("NODE_NAME", "node-3")
    assert node_name() == "node-3"

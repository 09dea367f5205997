"""The node wrapper waits for what appears late, and not for ever; a signal ends each wait."""

from __future__ import annotations

import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from megamask.config.load import load_train_config
from megamask.errors import MegamaskError, UsageError
from megamask.launch import meeting
from megamask.launch import node as launch_node
from megamask.launch.placement import NodePlace
from megamask.launch.verdict import launch_folder, read_codes, wait_until, write_codes
from megamask.resilience.signals import StopRequest

TESTS = Path(__file__).parents[1]
TINY = TESTS.parent / "configs" / "run" / "tiny.yaml"


def _unpublished(monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """Lets a name resolve only after it was asked for so many times."""
    asked: list[str] = []

    def getaddrinfo(name: str, _port: object) -> list[object]:
        asked.append(name)
        if len(asked) <= times:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return []

    monkeypatch.setattr(meeting.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(meeting, "NAME_POLL_S", 0.0)
    return asked


@pytest.mark.promise("A name of node 0 that is not published yet is waited for")
def test_name_that_is_published_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _unpublished(monkeypatch, 3)
    with StopRequest() as signals:
        meeting.wait_for_name("tiny-node-0-0.tiny", signals)
    assert asked == ["tiny-node-0-0.tiny"] * 4


def test_name_that_is_never_published_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _unpublished(monkeypatch, 10**9)
    monkeypatch.setattr(meeting, "NAME_S", 0.2)
    with StopRequest() as signals, pytest.raises(UsageError, match="could not resolve within") as refusal:
        meeting.wait_for_name("tiny-node-0-0.tiny", signals)
    assert "Name or service not known" in str(refusal.value)
    assert "subdomain" in str(refusal.value.hint)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 93)])
def test_signal_ends_the_wait_for_a_name(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int) -> None:
    _unpublished(monkeypatch, 10**9)
    with StopRequest() as signals:
        signal.raise_signal(number)
        with pytest.raises(MegamaskError, match="nothing was lost") as end:
            meeting.wait_for_name("tiny-node-0-0.tiny", signals)
    assert int(end.value.exit_code) == code


@pytest.mark.promise("A run on one machine is met on the loopback interface alone")
@pytest.mark.parametrize(("num_nodes", "address"), [(1, "127.0.0.1"), (2, "0.0.0.0")])
def test_run_on_one_machine_is_met_on_the_loopback_interface_alone(
    monkeypatch: pytest.MonkeyPatch, num_nodes: int, address: str
) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    place = NodePlace(node=0, num_nodes=num_nodes, address="node1", token="job-1.0")
    with meeting.listening(place) as listener:
        assert listener.getsockname()[0] == address


@pytest.mark.multiprocess
def test_node_that_is_slow_to_close_after_an_agreed_end_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setattr(launch_node, "_CODES_S", 0.05)
    place = NodePlace(node=0, num_nodes=2, address="127.0.0.1", token="job-1.0")
    folder = launch_folder(tmp_path / "run", place.token)

    def end_of_the_other() -> None:
        wait_until(lambda: read_codes(folder, 0) is not None, 60)
        time.sleep(0.4)
        write_codes(folder, 1, [75])

    other = threading.Thread(target=end_of_the_other)
    other.start()
    with StopRequest() as signals:
        verdict, _ = launch_node.run_node(
            ["raise SystemExit(75)"],
            place,
            tmp_path / "run",
            ranks_per_node=1,
            signals=signals,
            launch=load_train_config(TINY, ["launch.preflight=false"]).config.launch,
            module="support.rank_script",
        )
    other.join()
    assert verdict.code == 75

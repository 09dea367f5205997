"""The metrics file of a node: its format, what is in it, and that it holds up nothing."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megamask.errors import error_with_code
from megamask.launch import metrics_file
from megamask.launch.metrics_file import METRICS, MetricsFile, RunFigures, exposition
from megamask.resilience.heartbeat import Mark
from support.exposition import Series, parsed

MONITORING = Path(__file__).parents[2] / "k8s" / "overlays" / "monitoring"
LABELS = {"run": "r", "node": "0"}
ALL = RunFigures(
    restarts=2, loss_nats_per_token=5.25, consumed_tokens=10**12, tokens_per_second=2.5e6, checkpoint_step=40
)


def values(path: Path) -> dict[str, float]:
    """Return the values of a file of one node by metric."""
    return {series.name: series.value for series in parsed(path.read_text())}


def mark(step: int) -> Mark:
    return Mark(step=step, section="step", since=0.0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(metrics_file, "PERIOD_S", 0.01)
    yield


def eventually(path: Path, name: str, value: float) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() or values(path).get(name) != value:
        assert time.monotonic() < deadline, path.read_text() if path.exists() else "no file"
        time.sleep(0.01)


@pytest.mark.parametrize("value", ["plain", 'say "no"', "C:\\new\nline\\", "é=,{}"])
def test_values_of_labels_are_escaped(value: str) -> None:
    text = exposition({"megamask_step": 3, "megamask_node_info": 1}, {"run": value, "node": "0"}, host=value)
    info, step = parsed(text)
    assert step == Series("megamask_step", {"run": value, "node": "0"}, 3.0)
    assert info == Series("megamask_node_info", {"run": value, "node": "0", "host": value}, 1.0)


@pytest.mark.parametrize("value", [0, 10**12, 2.5e-9, 1e300, math.inf, -math.inf, math.nan])
def test_numbers_are_read_back_exactly(value: float) -> None:
    (series,) = parsed(exposition({"megamask_loss_nats_per_token": value}, LABELS, host="h"))
    assert series.value == value or (math.isnan(value) and math.isnan(series.value))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("# TYPE", "# KIND"),
        lambda text: text.replace('"r"', '"r'),
        lambda text: text.replace('"r"', '"r"r"'),
        lambda text: text + text,
        lambda text: text.replace(" 3", " three"),
        lambda text: text.replace("_step{", "_stop{"),
    ],
)
def test_parser_of_these_tests_is_strict(damage: object) -> None:
    text = exposition({"megamask_step": 3}, LABELS, host="h")
    with pytest.raises(AssertionError):
        parsed(damage(text))  # type: ignore[operator]


@pytest.mark.promise("every metric that the Grafana dashboard draws is written by the nodes, and none is left out")
def test_dashboard_and_file_have_the_same_metrics(tmp_path: Path) -> None:
    board = json.loads((MONITORING / "dashboard.json").read_text())
    drawn = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    with MetricsFile(tmp_path, "r", 0, lambda: ALL) as metrics:
        metrics.take([mark(1)])
        metrics.exit_code = 75
    assert set(re.findall(r"megamask_\w+", " ".join(drawn))) == set(values(metrics.path))
    assert set(values(metrics.path)) == {metric.name for metric in METRICS}
    assert set(re.findall(r"megamask_\w+", json.dumps(board["templating"]))) <= set(values(metrics.path))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_names_follow_the_conventions_of_prometheus() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"megamask_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.type == "counter")


@pytest.mark.promise("a node keeps its step and the run's loss and checkpoint in a file for Prometheus")
def test_file_follows_the_run(tmp_path: Path, quick: None) -> None:
    folder = tmp_path / "new" / "folder"
    figures = RunFigures()
    before = time.time()
    with MetricsFile(folder, "r", 0, lambda: figures) as metrics:
        assert metrics.path == folder / "megamask-r-0.prom"
        eventually(metrics.path, "megamask_up", 1)
        assert not {"megamask_exit_code", "megamask_loss_nats_per_token"} & set(values(metrics.path))
        figures = ALL
        metrics.take([mark(8), mark(7)])
        eventually(metrics.path, "megamask_step", 7)
        eventually(metrics.path, "megamask_checkpoint_step", 40)
        metrics.exit_code = 75
    found = values(metrics.path)
    assert (found["megamask_up"], found["megamask_exit_code"], found["megamask_restarts_total"]) == (0, 75, 2)
    assert before <= found["megamask_last_step_timestamp_seconds"] <= found["megamask_written_timestamp_seconds"]
    assert [path.name for path in folder.iterdir()] == ["megamask-r-0.prom"]


def test_figures_of_the_run_are_those_of_node_0_alone(tmp_path: Path) -> None:
    of_run = {metric.name for metric in METRICS if metric.of_run}
    for node, figures in ((0, lambda: ALL), (1, None)):
        with MetricsFile(tmp_path, "r", node, figures) as metrics:
            pass
        assert (of_run & set(values(metrics.path))) == (of_run if node == 0 else set())
        assert all(series.labels["node"] == str(node) for series in parsed(metrics.path.read_text()))


def test_time_of_the_last_step_is_that_of_the_slowest_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(metrics_file.time, "time", lambda: clock[-1])
    metrics = MetricsFile(tmp_path, "r", 0)
    stepped = []
    for now, marks in (
        (110.0, [None, None]),
        (120.0, [mark(4), None]),
        (130.0, [mark(5), mark(4)]),
        (140.0, [mark(6), mark(4)]),
        (150.0, [mark(6), mark(5)]),
    ):
        clock.append(now)
        metrics.take(marks)
        written = metrics._values(is_last=False)
        stepped.append((written["megamask_last_step_timestamp_seconds"], written["megamask_step"]))
    assert stepped == [(100.0, 0), (100.0, 0), (130.0, 4), (130.0, 4), (150.0, 5)]


@pytest.mark.promise("metrics that cannot be written stop no run, and are logged once")
def test_folder_that_refuses_is_logged_once_and_tried_again(
    tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").write_text("a file in the way")
    asked = threading.Semaphore(0)

    def figures() -> RunFigures:
        asked.release()
        return ALL

    with caplog.at_level(logging.WARNING), MetricsFile(tmp_path / "folder", "r", 0, figures) as metrics:
        for _ in range(3):
            assert asked.acquire(timeout=30)
        (tmp_path / "folder").unlink()
        eventually(metrics.path, "megamask_up", 1)
    (record,) = caplog.records
    assert "training goes on" in record.getMessage() and "launch.metrics_folder" in record.getMessage()


def test_figures_that_cannot_be_read_stop_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuses() -> RunFigures:
        raise error_with_code(74, "the storage refuses")

    with MetricsFile(tmp_path, "r", 0, refuses) as metrics:
        pass
    assert not metrics.path.exists()
    assert "the storage refuses" in caplog.text


def test_storage_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_file, "_LAST_WRITE_S", 0.05)
    answers = threading.Event()

    def hangs() -> RunFigures:
        answers.wait(60)
        return ALL

    with MetricsFile(tmp_path, "r", 0, hangs) as metrics:
        metrics.take([mark(1)])
    assert not metrics.path.exists()
    answers.set()
    eventually(metrics.path, "megamask_up", 0)


def test_error_of_the_launcher_is_the_exit_code(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, "r", 1)
    with pytest.raises(Exception, match="cannot meet"), metrics:
        raise error_with_code(2, "the nodes cannot meet")
    assert values(metrics.path)["megamask_exit_code"] == 2


def test_reader_sees_a_complete_file_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[int] = []
    replace = os.replace

    def seen(source: Path, target: Path) -> None:
        replaced.append(len(parsed(Path(source).read_text())))
        assert not str(source).endswith(".prom")  # a collector reads those
        replace(source, target)

    monkeypatch.setattr(os, "replace", seen)
    with MetricsFile(tmp_path, "r", 0, lambda: ALL):
        pass
    assert replaced and min(replaced) >= len(METRICS) - 2  # without exit code and step


def test_exporter_reads_the_folder_that_the_guide_names() -> None:
    exporter = next(iter(yaml.safe_load_all((MONITORING / "exporter.yaml").read_text())))
    (container,) = exporter["spec"]["template"]["spec"]["containers"]
    guide = (MONITORING.parents[2] / "docs" / "guides" / "kubernetes.md").read_text()
    (folder,) = re.findall(r"metrics_folder: (\S+)", guide)
    assert f"--collector.textfile.directory={folder}" in container["args"]

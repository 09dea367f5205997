"""status: a run, a folder of runs, curves as CSV and as a picture."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamask.audit.curves import COLUMNS, curve_rows, plot_curves
from megamask.audit.state import run_state
from megamask.errors import UsageError
from megamask_pipelines.cli.main import main
from support.stored_run import RUN_ID, unpack


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs, one of them damaged, beside other folders."""
    unpack(tmp_path).rename(tmp_path / "a")
    unpack(tmp_path).rename(tmp_path / "b")
    (tmp_path / "b" / "run.json").write_text("{")
    (tmp_path / "notes").mkdir()
    return tmp_path


@pytest.mark.promise("`megamask status FOLDER` lists the runs in a folder")
def test_folder_of_runs_is_listed_and_a_damaged_run_does_not_hide_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(folder), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["runs"]
    assert (first["run_id"], first["step"]) == (RUN_ID, 6)
    assert "run.json" in second["error"]
    assert main(["status", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b"]
    assert "6/6" in lines[0] and "bound 5.3592 at step 6" in lines[0]


@pytest.mark.promise("an extension and a change of layout are shown by console, status and MLflow")
def test_extension_and_change_of_layout_are_shown_by_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = unpack(tmp_path)
    path = run / "journal" / "attempt-0002-000.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    line = json.loads(first) | {
        "extended": {"training.steps": [4, 6]},
        "changed": {"layout.tensor_parallel_size": [1, 2], "world_size": [1, 2]},
    }
    assert line["kind"] == "attempt_started"
    path.write_text(json.dumps(line) + "\n" + "".join(others))
    assert main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "training.steps 4 -> 6; layout.tensor_parallel_size 1 -> 2; world_size 1 -> 2" in shown


@pytest.mark.promise("`megamask status` names the best bound and its checkpoint")
def test_best_bound_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = run_state(run_dir)["best"]
    assert best is not None and best["checkpoint"].startswith(f"step-{best['step']:08d}")
    assert main(["status", str(run_dir)]) == 0
    assert f"{best['nelbo_nats_per_token']:.4f}" in capsys.readouterr().out


def test_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err


@pytest.mark.promise("`megamask status --csv` has a row for each step")
def test_csv_has_a_row_for_each_step_with_the_bounds(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(run_dir), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [bool(row["evaluation_nelbo_nats_per_token"]) for row in rows] == [False, False, True, False, False, True]
    assert float(rows[-1]["loss"]) == run_state(run_dir)["loss"]


def test_csv_of_a_folder_has_a_row_for_each_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(folder), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(Path(row["run_dir"]).name, row["step"], bool(row["error"])) for row in rows] == [
        ("a", "6", False),
        ("b", "", True),
    ]


@pytest.mark.promise("`megamask status --plot FILE` draws the curves without a server")
@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_curves_are_drawn(run_dir: Path, tmp_path: Path, suffix: str, magic: bytes) -> None:
    picture = tmp_path / f"curves{suffix}"
    assert main(["status", str(run_dir), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(magic)


def test_picture_of_another_kind_or_of_a_run_without_a_step_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf"):
        plot_curves(run_dir, tmp_path / "curves.txt")
    with pytest.raises(UsageError, match="no step"):
        plot_curves(tmp_path, tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


def test_curves_of_a_repeated_step_are_those_of_the_highest_attempt(run_dir: Path) -> None:
    assert [row["step"] for row in curve_rows(run_dir)] == [1, 2, 3, 4, 5, 6]


def test_state_names_the_best_bound(run_dir: Path) -> None:
    best = run_state(run_dir)["best"]
    assert (best["checkpoint"], best["step"]) == ("step-00000006-a0002", 6)
    assert best["nelbo_nats_per_token"] == pytest.approx(5.3592, abs=1e-4)


@pytest.mark.promise("`megamask status` imports no torch, MLflow, pyarrow, OmegaConf or plotting library")
@pytest.mark.multiprocess
def test_status_imports_nothing_heavy(run_dir: Path) -> None:
    """The time is not measured: what took two seconds was importing these."""
    heavy = ["torch", "mlflow", "numpy", "pyarrow", "matplotlib", "rich", "omegaconf", "megamask.config.schema.roots"]
    code = (
        "import sys; from megamask_pipelines.cli.main import main; main(['status', sys.argv[1]]); "
        "print(sorted(set(sys.argv[2:]) & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir), *heavy], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"

"""An installed wheel works outside a checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megamask.config.load import load_train_config

ROOT = Path(__file__).parents[2]


@pytest.mark.promise("an installed wheel has the shipped configs and finds them outside a checkout")
def test_wheel_holds_every_shipped_config_and_finds_it(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("platform", "pipelines", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools.build_meta import build_wheel; build_wheel('wheel')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    [wheel] = (source / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    [data] = (tmp_path / "unpacked").glob("*.data/data")
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    packed = data / "share" / "megamask"
    assert {path.relative_to(packed).as_posix() for path in packed.rglob("*.yaml")} == shipped
    assert (tmp_path / "unpacked" / "megamask" / "config" / "starter.py").exists()
    monkeypatch.setattr(sys, "prefix", str(data))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load_train_config("configs/run/tiny.yaml")
    assert loaded.config.run.name == "tiny"
    assert loaded.origins["model.num_layers"].startswith(str(packed))

"""The quickstart's verbs under each supported interpreter that this machine has, Debian 12's own 3.11.2 among them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# Enums pickle otherwise in 3.11.2 than in later versions; 3.12 is the newest that is supported.
VERSIONS = ("3.11.2", "3.12")
PLACES = ("/usr/bin/python3", "/usr/bin/python3.11", "/usr/bin/python3.12", "/usr/local/bin/python3.12")


def interpreter(version: str) -> str | None:
    """An interpreter of this version that can make environments, or None."""
    found = [*PLACES, *map(str, sorted(Path.home().glob(".pyenv/versions/3.1[12].*/bin/python")))]
    program = (
        "import ensurepip, platform, sys, venv\n"
        "sys.exit(not (platform.python_version() + '.').startswith(sys.argv[1] + '.'))"
    )
    for path in found:
        if Path(path).is_file() and subprocess.run([path, "-c", program, version], capture_output=True).returncode == 0:
            return path
    return None


def share_packages(python: str, checkout: Path) -> None:
    """Make .venv with another patch release of this Python, whose libraries are those that run this test."""
    environment = checkout / ".venv"
    subprocess.run([python, "-m", "venv", "--without-pip", str(environment)], check=True)
    [packages] = environment.glob("lib/python3.*/site-packages")
    roots = [
        checkout / "platform",
        checkout / "pipelines",
        *(path for path in sys.path if path.endswith("site-packages")),
    ]
    (packages / "shared.pth").write_text("".join(f"{root}\n" for root in roots))
    command = environment / "bin" / "megamask"
    command.write_text(
        f"#!{environment}/bin/python\nfrom megamask_pipelines.cli.main import main\nraise SystemExit(main())\n"
    )
    command.chmod(0o755)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(7200)
@pytest.mark.promise("the quickstart's verbs work on Python 3.11.2 and 3.12")
@pytest.mark.parametrize("version", VERSIONS)
def test_verbs_of_the_quickstart_work_under_this_interpreter(version: str, tmp_path: Path) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"NOT TESTED: this machine has no Python {version}; looked in {', '.join(PLACES)} and ~/.pyenv")
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(checkout)], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {"PYTHON": python, "MLFLOW_DISABLE_TELEMETRY": "true"}
    if version.startswith(f"3.{sys.version_info.minor}."):
        share_packages(python, checkout)
    else:
        install = "set -euo pipefail; . tools/bootstrap.sh; bootstrap ''"
        subprocess.run(["bash", "-c", install], cwd=checkout, env=environment, check=True, timeout=5400)

    def megamask(*arguments: str) -> str:
        command = [str(checkout / ".venv" / "bin" / "megamask"), *arguments]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    train = (
        "train",
        "configs/run/tiny.yaml",
        "training.steps=8",
        "optimizer.decay_steps=2",
        "checkpoint.every_steps=4",
    )
    megamask("prepare", "configs/corpus/python_stdlib.yaml")
    megamask(*train, "training.stop_after_step=4", "layout.data_parallel_size=2")
    assert json.loads(megamask(*train, "--json").splitlines()[-1])["step"] == 8
    megamask("verify", "checkpoint", "runs/tiny")
    megamask("verify", "run", "runs/tiny")
    scored = json.loads(megamask("evaluate", "runs/tiny", "--rows", "4", "--json").splitlines()[-1])
    assert 0 < scored["nelbo_nats_per_token"] < 20
    assert megamask("sample", "runs/tiny", "--prompt", "def f(", "--length", "4").startswith("def f(")
    used = subprocess.run(
        [str(checkout / ".venv" / "bin" / "python"), "-V"], capture_output=True, text=True, env=environment
    )
    assert used.stdout.startswith(f"Python {version}"), (used.stdout, sys.version)

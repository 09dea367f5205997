#!/usr/bin/env python3
"""Write the recorded texts that the renderers' tests compare with: tests/launch/golden and what slurm/ and k8s/ ship.

tools/render_goldens.py            # write them
tools/render_goldens.py --check    # exit code 1 if one is out of date; nothing is written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT / "tests")]

from megamask.config.dump import documents_to_yaml  # noqa: E402
from megamask.config.load import load_train_config  # noqa: E402
from megamask.config.validate_launch import validate_launch  # noqa: E402
from megamask.launch import jobset, slurm, trainjob  # noqa: E402
from megamask.launch.from_config import job_from_config  # noqa: E402
from support.launch_jobs import FULL, SMALL  # noqa: E402

GOLDEN = ROOT / "tests" / "launch" / "golden"
EXAMPLE = "slurm/train.yaml"


def texts() -> Iterator[tuple[Path, str]]:
    """Yield each file and its text."""
    for name, job in (("small", SMALL), ("full", FULL)):
        yield GOLDEN / f"{name}.sbatch", slurm.render(job)
        yield GOLDEN / f"{name}.jobset.yaml", documents_to_yaml(jobset.render(job))
        yield GOLDEN / f"{name}.trainjob.yaml", documents_to_yaml(trainjob.render(job))
    runtime = documents_to_yaml([trainjob.runtime("megamask")])
    yield GOLDEN / "runtime.yaml", runtime
    yield ROOT / "k8s" / "overlays" / "trainjob" / "runtime.yaml", runtime
    loaded = load_train_config(ROOT / EXAMPLE)
    validate_launch(loaded.config, loaded.origins, "slurm")
    yield ROOT / "slurm" / "train.sbatch", slurm.render(job_from_config(loaded.config, "slurm", path=EXAMPLE))


def main() -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is out of date")
    check = parser.parse_args().check
    stale = [path for path, text in texts() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path, text in () if check else texts():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

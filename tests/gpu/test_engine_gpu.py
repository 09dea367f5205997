"""The engine on CUDA and NCCL. Run without a GPU these are skipped, and say so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import engine_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; the engine's GPU path was not run"),
]

JOB = """
import json, sys
from pathlib import Path
from megamask.engine.backend import destroy_process_group, init_process_group, select_backend
init_process_group(select_backend())
from support import engine_cases as cases
engine = cases.make_engine(cases.OPTIONS)
reports = [cases.report_fields(cases.take_step(engine, step)) for step in (1, 2)]
cases.save_state(engine, Path(sys.argv[1]), copy=True)
reports.append(cases.report_fields(cases.take_step(engine, 3)))
engine.close()
engine = cases.make_engine(cases.OPTIONS)
engine.load_state(Path(sys.argv[1]))
again = cases.report_fields(cases.take_step(engine, 3))
print(json.dumps({"reports": reports, "again": again, "backend": engine.backend.name, "adam": engine.backend.adam}))
engine.close()
destroy_process_group()
"""


def test_gpu_steps_equal_the_reference_network_and_resume_bit_for_bit(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(cases.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["backend"] == "cuda"
    assert answer["adam"].endswith("Adam")
    assert answer["again"] == answer["reports"][2]
    loss = float(cases.reference_loss(cases.reference(cases.OPTIONS), 1, cases.objective()))
    assert answer["reports"][0]["loss"] == pytest.approx(loss, rel=1e-5)

"""The engine on CUDA and NCCL. Run without a GPU these are skipped, and say so."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megamask.engine.state.restore import read_canonical_weights
from support import engine_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; the engine's GPU path was not run"),
]

JOB = """
import json, sys
from pathlib import Path
from megamask.engine.backend import select_backend
from megamask.engine.process_group import destroy_process_group, init_process_group
init_process_group(select_backend())
from support import engine_cases as cases
settings = {"compute": sys.argv[2], "z_loss_weight": 0.1, "micro_batch_size": 2}
engine = cases.make_engine(cases.OPTIONS, **settings)
reports = [cases.report_fields(cases.take_step(engine, step)) for step in (1, 2)]
cases.save_state(engine, Path(sys.argv[1]), copy=True)
reports.append(cases.report_fields(cases.take_step(engine, 3)))
scores = cases.masked_scores(engine, *cases.probe_rows(3, cases.OPTIONS)).tolist()
formats = sorted({str(parameter.dtype) for parameter in engine._rank_model.network.parameters()})
engine.close()
engine = cases.make_engine(cases.OPTIONS, **settings)
engine.load_state(Path(sys.argv[1]))
again = cases.report_fields(cases.take_step(engine, 3))
backend = [engine.backend.name, engine.backend.adam]
print(json.dumps({"reports": reports, "again": again, "backend": backend, "scores": scores, "formats": formats}))
engine.close()
destroy_process_group()
"""


# of the loss, relative: bf16 has a unit roundoff of 2e-3, and the loss is a mean over 250 tokens
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-3}


@pytest.mark.parametrize("compute", TOLERANCES)
def test_gpu_steps_equal_the_reference_network_and_resume_bit_for_bit(tmp_path, compute):
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(tmp_path), compute],
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(Path(cases.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    name, adam = answer["backend"]
    assert name == "cuda" and adam.endswith("Adam")
    assert answer["formats"] == ["torch.bfloat16" if compute == "bf16" else "torch.float32"]
    assert answer["again"] == answer["reports"][2]
    model = cases.reference(cases.OPTIONS)
    first = answer["reports"][0]["loss_terms"]
    for term, measure in (("nelbo", cases.reference_loss), ("z_loss", cases.reference_z_loss)):
        weight = 0.1 if term == "z_loss" else 1.0
        expected = weight * float(measure(model, 1, cases.objective()))
        assert first[term] == pytest.approx(expected, rel=TOLERANCES[compute])
    weights = read_canonical_weights(tmp_path, cases.OPTIONS)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(math.isfinite(score) and score >= 0 for score in answer["scores"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_attention_of_grouped_queries_needs_no_memory_for_all_scores(dtype):
    """Forward and backward of 8,192 positions stay far below what the scores of 16 heads alone would take."""
    from megamask.engine.layers.attention import RotaryAttention, RowContext
    from megamask.models.context import Context

    attention = RotaryAttention(SimpleNamespace(kv_channels=64), 1, None, "self", rope_theta=1e4)
    query = torch.randn(8192, 1, 16, 64, device="cuda", dtype=dtype, requires_grad=True)
    key, value = (torch.randn(8192, 1, 4, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(query, key, value, packed_seq_params=RowContext(Context())).float().square().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * 8192 * 8192 * query.element_size() / 4


@pytest.mark.promise("a refused pin leaves no CUDA error behind (GPU)")
def test_gpu_computes_on_after_memory_that_cannot_be_pinned():
    from megamask.engine.backend import select_backend

    backend = select_backend()
    memory = torch.empty(1 << 20)
    backend.pin(memory)
    backend.pin(memory)  # CUDA refuses the second time and keeps the code for whoever comes next
    assert float(torch.ones(3, device=backend.device).add(1).sum()) == 6
    assert torch.equal(memory.fill_(2).to(backend.device).cpu(), memory)

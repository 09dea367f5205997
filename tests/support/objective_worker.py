"""Work of each process of a test of objectives on layouts; answers travel as JSON."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megamask.evaluation.likelihood import evaluate_rows
from megamask.generation.confidence import DecodingOptions, decode
from megamask.objectives.autoregressive import AutoregressiveObjective
from megamask.objectives.base import Objective
from megamask.objectives.block import BlockObjective
from megamask.objectives.masked import MaskedObjective
from megamask.objectives.mixed import MixedObjective
from megamask.objectives.phased import PhasedObjective
from megamask.objectives.uniform import UniformObjective
from megamask.objectives.warm_start import eased
from support import engine_cases as cases

STEPS = (1, 2, 3, 4)
SAVED = 2
VOCABULARY = cases.vocabulary(cases.OPTIONS)
# id 7 ends documents: the synthetic rows hold no end of document. An objective in phases keeps its vocabulary.
DOCUMENTS = replace(VOCABULARY, eod_token_id=7)
MASKED = MaskedObjective(vocabulary=VOCABULARY, noise_schedule="sqrt", complementary=True, mask_logit="excluded")
OBJECTIVES: dict[str, Objective] = {
    "block": BlockObjective(vocabulary=VOCABULARY, block_size=8, clean_half="block_causal", mask_logit="excluded"),
    "joint": BlockObjective(
        vocabulary=VOCABULARY, block_size=4, clean_half="token_causal", mask_logit="excluded", diffusion_weight=0.3
    ),
    "pair": PhasedObjective(
        phases=(
            (
                1,
                BlockObjective(
                    vocabulary=DOCUMENTS,
                    block_size=4,
                    clean_half="token_causal",
                    mask_logit="excluded",
                    diffusion_weight=0.3,
                    complementary=True,
                    block_time="independent",
                    isolate_documents=True,
                ),
            ),
        )
    ),
    "exact": PhasedObjective(
        phases=(
            (
                1,
                replace(
                    MASKED,
                    vocabulary=DOCUMENTS,
                    mask_counts="exact",
                    random_length_fraction=0.5,
                    isolate_documents=True,
                ),
            ),
        )
    ),
    "phases": PhasedObjective(
        phases=(
            (1, BlockObjective(vocabulary=VOCABULARY, block_size=1, clean_half="block_causal", mask_logit="excluded")),
            (2, MASKED),
            (3, replace(MASKED, complementary=False)),
            (4, BlockObjective(vocabulary=VOCABULARY, block_size=8, clean_half="block_causal", mask_logit="excluded")),
        )
    ),
    "uniform": UniformObjective(vocabulary=VOCABULARY, noise_schedule="linear", mask_logit="excluded"),
    "mixed": MixedObjective(
        vocabulary=VOCABULARY, corruption="log_snr", noise_schedule="linear", mask_logit="excluded", z_loss_weight=0.1
    ),
    "edit": MixedObjective(
        vocabulary=VOCABULARY, corruption="edit", noise_schedule="linear", mask_logit="excluded", edit_weight=0.5
    ),
    "autoregressive": AutoregressiveObjective(vocabulary=VOCABULARY, mask_logit="excluded", z_loss_weight=0.1),
    # everything that eases an autoregressive start; all of it is in effect at the step after the checkpoint
    "warm": eased(
        replace(MASKED, complementary=False, mask_ratio_warmup_steps=3),
        shift=3,
        attention_annealing_steps=5,
        embedding_noise_steps=3,
        embedding_noise_std=0.5,
    ),
}


def run_layouts(root: str, runs: list[list[Any]]) -> list[dict[str, Any]]:
    """Each run: name of an objective and a layout."""
    return [run_layout(Path(root), *run) for run in runs]


def run_layout(root: Path, name: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Trains, saves in the middle, scores and writes; then resumes and takes the same steps again."""
    objective, folder = OBJECTIVES[name], root / f"{name}-{'-'.join(f'{k}{v}' for k, v in layout.items())}"
    engine = make(name, layout)
    answer: dict[str, Any] = {"reports": []}
    for step in STEPS:
        answer["reports"].append(cases.report_fields(cases.take_step(engine, step)))
        if step == SAVED:
            if engine.is_main:
                folder.mkdir()
            engine.barrier()
            cases.save_state(engine, folder)
    answer["digest"] = engine.parameter_digest()
    engine.load_state(folder)
    answer["resumed"] = [cases.report_fields(cases.take_step(engine, step)) for step in STEPS if step > SAVED]
    answer["resumed_digest"] = engine.parameter_digest()
    answer |= measure(engine.score, engine.predict, objective)
    engine.close()
    return answer


def make(name: str, layout: dict[str, Any]) -> Any:
    objective = OBJECTIVES[name]
    z_loss_weight = getattr(objective, "z_loss_weight", 0.0)
    return cases.make_engine(cases.OPTIONS, layout, micro_batch_size=2, goal=objective, z_loss_weight=z_loss_weight)


def measure(score: Any, predict: Any, objective: Objective) -> dict[str, Any]:
    """The bound of three rows, and a text of eight tokens after a prompt, greedy and with temperature."""
    share = cases.batch([0, 1, 2], 9)
    report = evaluate_rows(
        score,
        objective.bound,
        share.tokens,
        share.is_eligible,
        torch.arange(3),
        draws=2,
        replicates=2,
        key=(5, 0),
        batch_rows=2,
    )
    place = torch.arange(cases.SEQUENCE_LENGTH)
    tokens = share.tokens[:2].masked_fill(place >= 6, objective.vocabulary.mask_token_id)
    is_wanted = ((place >= 6) & (place < 14)).expand_as(tokens)
    texts = [
        [
            row.tokens.tolist()
            for row in decode(
                predict,
                objective.decoder,
                tokens,
                is_wanted=is_wanted,
                options=DecodingOptions(temperature=temperature, seed=3),
                sequences=(0, 1),
            )
        ]
        for temperature in (0.0, 1.0)
    ]
    return {"bound": report.nelbo_nats_per_token, "num_tokens": report.num_tokens, "texts": texts}

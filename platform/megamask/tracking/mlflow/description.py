"""The description of a run in MLflow: a paragraph, two tables and how to check them, made from the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megamask.config.schema.objective import EXACT
from megamask.tracking.mlflow.points import Memory

_KINDS = {
    "masked": "A masked-diffusion language model",
    "block": "A block-diffusion language model",
    "uniform": "A language model of uniform diffusion",
    "mixed": "A language model of diffusion with mixed noise",
    "autoregressive": "An autoregressive language model",
}
# Settings of the objective that do nothing unless another one has this value.
_ONLY_WITH = {
    "cart_p": ("weight", "cart"),
    "noise_exponent": ("noise_schedule", "polynomial"),
    "spindle_strength": ("noise_schedule", "spindle"),
}
_OF_RECIPES = frozenset({"noise_schedule", "weight", "mask_counts", "time_sampling"})
_HOW_TO_CHECK = """To check this page against the run directory (tag `run_dir`):

- `megamask verify run RUN --against-mlflow` compares every parameter, point and digest with the journal;
- `megamask inspect RUN --step N` recomputes the samples and masks of a step and compares them with the journal;
- `megamask verify checkpoint RUN` reads every byte of a checkpoint; its digest is the sha256 of its COMMIT.json.
"""


def description_of(run: Mapping[str, Any], memory: Memory) -> str:
    """Return markdown for the run's page.

    Args:
        run: content of run.json.
        memory: of the journal so far.
    """
    parts = [_paragraph(run, memory)]
    corpora = [dataset for dataset in memory.datasets if dataset.get("split") == "train"]
    if corpora:
        rows = [
            [each.get("name"), str(each.get("corpus_id"))[:12], each.get("origin"), each.get("licence")]
            for each in corpora
        ]
        parts.append(_table(["corpus", "id", "origin of its inputs", "licence"], rows))
    if memory.attempts:
        header = ["attempt", "host", "user", "device", "layout", "steps", "ended"]
        parts.append(_table(header, [_attempt(each) for each in memory.attempts]))
    return "\n\n".join([*parts, _HOW_TO_CHECK])


def _paragraph(run: Mapping[str, Any], memory: Memory) -> str:
    identity = run.get("identity", {})
    shape = ", ".join(
        f"{identity[key]} {words}"
        for key, words in (
            ("model.num_layers", "layers"),
            ("model.hidden_size", "channels"),
            ("training.sequence_length", "tokens a row"),
        )
        if key in identity
    )
    parameters = memory.facts.get("parameters")
    size = "" if parameters is None else f" of {parameters:,} parameters"
    objective = str(identity.get("objective.name", "masked"))  # runs of 0.1.0 have no other
    parent = run.get("parent_checkpoint")
    start = "pretrained" if not parent else f"trained from `{parent.get('source')}` ({str(parent.get('digest'))[:12]})"
    text = f"{_KINDS.get(objective, 'A language model')}{size} ({shape}), {start} with megamask. {_objective(identity)}"
    if (tokens := memory.facts.get("tokens")) is not None:
        text += f" It has seen {tokens:,} tokens."
    if memory.best is not None:
        best = memory.best
        most = "" if objective in EXACT else "at most "
        text += f" Best checkpoint: `{best['checkpoint']}`, {most}{best['bound']:.4f} nats per token on held-out text."
    return text


def _objective(identity: Mapping[str, Any]) -> str:
    """Describe how text is masked: every setting of the objective that is in force."""
    settings = {
        key.removeprefix("objective."): value for key, value in identity.items() if key.startswith("objective.")
    }
    name = settings.pop("name", "not recorded")
    idle = {key for key, (other, value) in _ONLY_WITH.items() if settings.get(other) != value}
    if settings.get("recipe") is not None:
        idle |= _OF_RECIPES
    if settings.get("noise_schedule") == "spindle":
        idle |= {"weight", "mask_counts"}  # which it has for each token
    facts = [
        f"{key} {_word(value)}"
        for key, value in settings.items()
        if key not in idle and (value is False or value not in (None, 0, []))
    ]
    return f"Objective: {name}{' with ' if facts else ''}{', '.join(facts)}."


def _word(value: Any) -> Any:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def _layout(attempt: Mapping[str, Any]) -> str:
    """Processes of an attempt and the axes that share its work; an axis of size 1 shares nothing."""
    axes = [
        f"{key.removesuffix('_parallel_size')} {_word(value)}"
        for key, value in (attempt.get("layout") or {}).items()
        if key.endswith("_size") and value != 1
    ]
    count = attempt.get("world_size")
    processes = "processes not recorded" if count is None else f"{count} process{'' if count == 1 else 'es'}"
    return ", ".join([processes, *axes])


def _attempt(attempt: Mapping[str, Any]) -> list[Any]:
    first, last = attempt.get("first_step"), attempt.get("last_step")
    steps = "none" if first is None else f"{first}-{last}"
    return [
        attempt["number"],
        attempt["host"],
        attempt["user"],
        attempt["device"],
        _layout(attempt),
        steps,
        attempt.get("reason"),
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return "-" if value is None else " ".join(str(value).split()).replace("|", "\\|")

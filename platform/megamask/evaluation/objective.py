"""Objective under which a model is scored."""

from __future__ import annotations

from megamask.config.schema.objective import WITHOUT_FUTURE
from megamask.errors import UsageError
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Objective
from megamask.objectives.registry import build_objective


def refuse_leaks(spec: ModelSpec, objective: Objective) -> None:
    """Refuse to score a network whose experts choose among all tokens of a row as if no token saw those behind it.

    Raises:
        UsageError: names the router's choice; such a likelihood would be too good.
    """
    if spec.experts is not None and spec.experts.choice == "experts" and objective.name in WITHOUT_FUTURE:
        raise UsageError(
            f"--objective is {objective.name}, but the network has model.router_choice=experts: its experts choose "
            "among all tokens of a row, so that each token depends on those behind it; allowed: the objective that was "
            "trained. Nothing was scored."
        )


def scored_objective(trained: Objective, name: str | None, vocabulary: Vocabulary) -> Objective:
    """Return the objective to score with: the one that was trained, or another one by name.

    Raises:
        UsageError: the other objective needs settings that the model does not record.
    """
    if name is None or name == trained.name:
        return trained
    record = trained.record()
    settings = {"name": name, "mask_logit": record["mask_logit"]}
    settings |= {key: record[key] for key in ("isolate_documents",) if key in record}
    try:
        return build_objective(settings, vocabulary)
    except TypeError as error:
        raise UsageError(
            f"--objective is {name}, but the model was trained as {trained.name} and does not record the settings of "
            f"{name}; allowed: {trained.name}, autoregressive. Nothing was scored."
        ) from error

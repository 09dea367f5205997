"""The two trees of settings: a training run, and the preparation of a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megamask.config.schema.checkpoint import CheckpointConfig
from megamask.config.schema.corpus import CorpusConfig
from megamask.config.schema.data import DataConfig
from megamask.config.schema.device import DeviceConfig
from megamask.config.schema.evaluation import EvaluationConfig
from megamask.config.schema.field import operational, section
from megamask.config.schema.initialise import InitialiseConfig
from megamask.config.schema.launch import LaunchConfig
from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.model import ModelConfig
from megamask.config.schema.objective import ObjectiveConfig
from megamask.config.schema.optimizer import OptimizerConfig
from megamask.config.schema.precision import PrecisionConfig
from megamask.config.schema.preview import PreviewConfig
from megamask.config.schema.resilience import ResilienceConfig
from megamask.config.schema.run import RunConfig
from megamask.config.schema.tracking import TrackingConfig
from megamask.config.schema.training import TrainingConfig


def paths_setting() -> Any:
    """Return the field of the free-form section `paths`."""
    return operational("name -> folder or file, for use as ${paths.NAME} in any other path", default={}, is_path=True)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a training run."""

    run: RunConfig = section()
    model: ModelConfig = section()
    data: DataConfig = section()
    objective: ObjectiveConfig = section()
    initialise: InitialiseConfig = section()
    optimizer: OptimizerConfig = section()
    training: TrainingConfig = section()
    layout: LayoutConfig = section()
    precision: PrecisionConfig = section()
    device: DeviceConfig = section()
    checkpoint: CheckpointConfig = section()
    resilience: ResilienceConfig = section()
    evaluation: EvaluationConfig = section()
    preview: PreviewConfig = section()
    tracking: TrackingConfig = section()
    launch: LaunchConfig = section()
    paths: dict[str, str] = paths_setting()


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The settings of the preparation of a corpus."""

    corpus: CorpusConfig = section()
    paths: dict[str, str] = paths_setting()

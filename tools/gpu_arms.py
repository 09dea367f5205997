"""Cases that bench_gpu.py compares: shapes, number formats, and one row for each thing that makes a step fast, as data.

A row of `ABLATIONS` differs from the baseline in one thing. A setting is a row with a changed section; a module that no
setting replaces is a row with a `Switch`. Add a row here and it is measured, shown and rehearsed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from megamask.config.schema.model import ModelConfig
from megamask.models.spec import ModelSpec
from megamask.planning.capability import Capability, refusal

MODELS = Path(__file__).parents[1] / "configs" / "model"
ALL_ROWS = 1 << 30
"""As training.head_chunk_rows: every row of the head at once."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Subject of an arm: a network and the work of a step.

    Args:
        model: file of configs/model.
        vocab_size: entries of the vocabulary, which a model file leaves to the corpus.
        changes: fields of the network that differ from the file's.
        fits_layers: take as many layers as the device's memory holds, at most the file's.
    """

    model: str
    vocab_size: int
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    head_chunk_rows: int = 2048
    changes: Mapping[str, int] = field(default_factory=dict)
    fits_layers: bool = False

    def spec(self) -> ModelSpec:
        """The network."""
        document = yaml.safe_load((MODELS / f"{self.model}.yaml").read_text(encoding="utf-8"))
        config = ModelConfig(**(document["model"] | dict(self.changes)))
        return ModelSpec.from_config(config, self.vocab_size, self.sequence_length)


_LONG = {"sequence_length": 4096, "micro_batch_size": 1}
SHAPES = {
    "tiny": Shape(
        model="tiny",
        vocab_size=300,
        sequence_length=32,
        global_batch_size=2,
        micro_batch_size=1,
        head_chunk_rows=16,
        changes={"num_attention_heads": 2, "num_query_groups": 1},
    ),
    "170m": Shape(model="170m", vocab_size=50_257, sequence_length=4096, global_batch_size=16, micro_batch_size=4),
    "1.7b": Shape(model="1.7b", vocab_size=151_936, global_batch_size=4, **_LONG),
    "8b": Shape(model="8b", vocab_size=126_464, global_batch_size=4, fits_layers=True, **_LONG),
}


@dataclass(frozen=True, kw_only=True)
class Switch:
    """An attribute of a module that a row replaces while its engine is built and trains."""

    module: str
    attribute: str
    replacement: Any

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the replacement is in place."""
        with mock.patch.object(importlib.import_module(self.module), self.attribute, self.replacement):
            yield


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Machine of the arms, with what an arm may need."""

    capability: Capability
    world_size: int


Around = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to take the same steps.

    Args:
        about: what is different, for the table.
        precision, device, training: settings beside the shape's.
        around: what is different and no setting, in place while the engine is built and trains.
        lacks: the reason why a machine cannot run it; None where it can.
    """

    name: str
    about: str
    precision: Mapping[str, Any] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    around: Around = contextlib.nullcontext
    lacks: Callable[[Machine], str | None] = lambda machine: None

    def on_top_of(self, base: Arm) -> Arm:
        """This arm with the settings of another one that it does not change itself."""
        sections = {
            name: {**getattr(base, name), **getattr(self, name)} for name in ("precision", "device", "training")
        }
        return dataclasses.replace(self, **sections)


def recipe_arms(machine: Machine) -> list[Arm]:
    """bf16 and each FP8 recipe; without its kernels a recipe is emulated, which is slow and named so in the record."""
    arms = [Arm(name="bf16", about="no FP8", precision={"compute": "bf16"})]
    for recipe in ("tensorwise", "delayed", "blockwise"):
        reason = refusal(recipe, machine.capability)
        kernels = {} if reason is None else {"fp8_kernels": "emulate"}
        about = f"precision.fp8={recipe}" + ("" if reason is None else f", emulated: {reason}")
        arms.append(Arm(name=recipe, about=about, precision={"compute": "bf16", "fp8": recipe, **kernels}))
    return arms


def _needs_te(machine: Machine) -> str | None:
    return None if machine.capability.can_run_te else "Transformer Engine's layers cannot run here"


def _needs_gpu(machine: Machine) -> str | None:
    return None if machine.capability.architecture is not None else "no GPU"


def _needs_ranks(machine: Machine) -> str | None:
    return None if machine.world_size > 1 else "one process has nothing to sum; start it with torchrun on several GPUs"


@contextlib.contextmanager
def _filled_memory() -> Iterator[None]:
    """Every new tensor is filled with NaN first, torch's own choice under deterministic algorithms."""
    from megamask.engine import engine

    select = engine.select_backend

    def selecting(*arguments: Any, **options: Any) -> Any:
        made = select(*arguments, **options)
        torch.utils.deterministic.fill_uninitialized_memory = True
        return made

    before = torch.utils.deterministic.fill_uninitialized_memory
    with mock.patch.object(engine, "select_backend", selecting):
        yield
    torch.utils.deterministic.fill_uninitialized_memory = before


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def _plain(part: str) -> Around:
    """One of the compiled kernels is left out: "rotary", "swiglu" or "noise"."""

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        from megamask.engine.kernels import Kernels
        from megamask.engine.layers import compiled
        from megamask.engine.layers.feed_forward import FeedForward

        install = Kernels.install

        def installing(chosen: Any, networks: Any, backend: Any) -> None:
            install(chosen, networks, backend)
            for module in itertools.chain.from_iterable(network.modules() for network in networks):
                is_left_out = {"swiglu": isinstance(module, FeedForward), "rotary": hasattr(module, "rotary_channels")}
                if is_left_out.get(part):
                    module.is_compiled = False
            if part == "noise":
                compiled.plain_noise(backend.device)

        with mock.patch.object(Kernels, "install", installing):
            yield

    return around


def _added(rows: torch.Tensor, places: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return rows.new_zeros(shape[0] * shape[1], shape[2]).index_add_(0, places, rows).view(shape)


@contextlib.contextmanager
def _collectives_apart() -> Iterator[None]:
    """A step's sums, its norm and whether all of it is finite travel one after another."""
    from megamask.engine.collectives import Collectives

    together = Collectives.sum_doubles

    def apart(collectives: Any, values: torch.Tensor) -> list[float]:
        found = [*together(collectives, values[:-1]), *together(collectives, values[-1:])]
        collectives.max_integer(int(not all(map(math.isfinite, found))))
        return found

    with mock.patch.object(Collectives, "sum_doubles", apart):
        yield


BASELINE = Arm(name="baseline", about="bf16 with everything on", precision={"compute": "bf16"})

ABLATIONS = (
    Arm(
        name="head without chunks",
        about="training.head_chunk_rows of all rows: logits of a micro-batch exist at once",
        training={"head_chunk_rows": ALL_ROWS},
    ),
    Arm(
        name="head gradient added",
        about="rows of the head are added to their positions, as index_select's own backward pass does",
        around=Switch(module="megamask.engine.head", attribute="spread", replacement=_added),
    ),
    Arm(
        name="embedding gradient of megatron-core",
        about="copies of a row are added one after another, in bf16",
        around=Switch(
            module="megamask.engine.network",
            attribute="WideSumEmbedding",
            replacement=lambda table, frequent_id: table,
        ),
    ),
    Arm(
        name="local layers",
        about="device.layers=local: no fused norms, weight gradients not added up by the product",
        device={"layers": "local"},
        lacks=_needs_te,
    ),
    Arm(name="rotary plain", about="rotary positions in several kernels", around=_plain("rotary")),
    Arm(name="SwiGLU plain", about="SwiGLU in several kernels each way", around=_plain("swiglu")),
    Arm(name="noise plain", about="the noise's words in many kernels", around=_plain("noise")),
    Arm(
        name="keys repeated",
        about="device.grouped_queries=repeated: a copy of keys and values for each query head",
        device={"grouped_queries": "repeated"},
    ),
    Arm(
        name="weight gradients separate",
        about="device.weight_gradients=separate: rounded to bf16, then added to the float32 buffers",
        device={"weight_gradients": "separate"},
        lacks=_needs_te,
    ),
    Arm(
        name="CUDA graphs of the feed-forward part",
        about="device.cuda_graphs=true",
        device={"cuda_graphs": True},
        lacks=_needs_te,
    ),
    Arm(
        name="attention of Transformer Engine",
        about="device.attention=te",
        device={"attention": "te"},
        lacks=_needs_te,
    ),
    Arm(
        name="collectives apart",
        about="sums of the loss, norm and finite flag in a collective each",
        around=_collectives_apart,
    ),
    Arm(name="recompute selective", about="training.recompute=selective", training={"recompute": "selective"}),
    Arm(name="recompute full", about="training.recompute=full", training={"recompute": "full"}),
    Arm(name="not deterministic", about="device.deterministic=false", device={"deterministic": False}),
    Arm(
        name="not deterministic, no cuDNN attention",
        about="device.deterministic=false, torch's flash kernels",
        device={"deterministic": False},
        around=_without_cudnn,
        lacks=_needs_gpu,
    ),
    Arm(
        name="new memory filled",
        about="torch fills every new tensor with NaN, its default under deterministic algorithms",
        around=_filled_memory,
        lacks=_needs_gpu,
    ),
    Arm(
        name="overlapped sums",
        about="device.overlap_gradient_reduce=true",
        device={"overlap_gradient_reduce": True},
        lacks=_needs_ranks,
    ),
    Arm(
        name="overlapped sums and gathers",
        about="device.overlap_gradient_reduce=true, device.overlap_parameter_gather=true",
        device={"overlap_gradient_reduce": True, "overlap_parameter_gather": True},
        lacks=_needs_ranks,
    ),
)

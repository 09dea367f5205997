"""The engine room: one object that trains, scores, saves and restores a network under any layout."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel

from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.optimizer import OptimizerConfig
from megamask.config.schema.training import TrainingConfig
from megamask.data.loader import Batch
from megamask.diffusion.objective import ObjectiveSpec
from megamask.diffusion.sampling import Draw, Prediction
from megamask.engine import prediction, scoring, state
from megamask.engine.backend import Backend, select_backend
from megamask.engine.canonical import CanonicalMap
from megamask.engine.collectives import Collectives
from megamask.engine.head import MaskedRowHead
from megamask.engine.host_memory import HostMemory
from megamask.engine.initialization import set_initial_weights
from megamask.engine.network import build_network, wrap_data_parallel
from megamask.engine.optimizer import ShardedAdamW
from megamask.engine.step import Stage, StepReport, TrainingStep
from megamask.engine.topology import Topology
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary
from megamask.storage.hashing import hash_of

_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Engine:
    """A network on this rank's part of the layout, ready to train; needs an initialised process group.

    Every method but the properties, `members` and `state_share` is called by all ranks together. The layout was checked
    against the model by the config (config/validate.py); here only the number of processes is.

    Args:
        seed: run.seed, the key of initial weights and of the noise.
        compute: precision.compute. In bf16 Adam updates float32 master weights, gradients are summed in float32, and
            the state on disk is the masters'.
        z_loss_weight: objective.z_loss_weight; it shapes training alone, so it is no part of the objective's record.

    Raises:
        UsageError: the layout's sizes do not multiply to the number of processes.
    """

    def __init__(
        self,
        spec: ModelSpec,
        vocabulary: Vocabulary,
        objective: ObjectiveSpec,
        optimizer: OptimizerConfig,
        layout: LayoutConfig,
        training: TrainingConfig,
        seed: int,
        *,
        compute: str = "fp32",
        z_loss_weight: float = 0.0,
    ) -> None:
        backend = select_backend()
        self._collectives = Collectives(backend.device)
        topology = Topology.from_layout(layout, rank=self._collectives.rank, world_size=self._collectives.world_size)
        _create_groups(topology)
        self._spec = spec
        self._host_memory = HostMemory(backend)
        self._micro_batch_size = training.micro_batch_size
        network = build_network(spec, topology, _FORMATS[compute], mask_token_id=vocabulary.mask_token_id)
        model = wrap_data_parallel(network)
        self._optimizer = ShardedAdamW(model, optimizer)
        set_initial_weights(self._optimizer, CanonicalMap(spec=spec, topology=topology), seed=seed)
        self._stage = Stage(
            topology=topology,
            backend=backend,
            collectives=self._collectives,
            network=network,
            model=model,
            head=MaskedRowHead(vocabulary, objective, topology, backend.device),
            vocabulary=vocabulary,
            objective=objective,
            z_loss_weight=z_loss_weight,
        )
        self._step = TrainingStep(
            self._stage,
            self._optimizer,
            micro_batch_size=training.micro_batch_size,
            head_capacity=training.head_capacity,
            seed=seed,
        )

    @property
    def backend(self) -> Backend:
        """The machine under this engine."""
        return self._stage.backend

    @property
    def topology(self) -> Topology:
        """Where this rank stands."""
        return self._stage.topology

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self._collectives.rank

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self._collectives.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0."""
        return self._collectives.is_main

    def members(self, global_batch_size: int) -> list[int]:
        """Places of the global batch that this rank computes, in the order that `step` expects its samples."""
        return self.topology.members(global_batch_size, self._micro_batch_size)

    def step(self, batch: Batch, *, step: int, learning_rate: float) -> StepReport:
        """Takes one training step on this rank's share of a global batch.

        Args:
            step: 1-based number of the step, which the noise law asks for.
            learning_rate: of this step.

        Raises:
            UsageError: a micro-batch masks more positions than training.head_capacity, on every rank alike.
        """
        return self._step.run(batch, step=step, learning_rate=learning_rate)

    def masked_cross_entropy(self, x_t: torch.Tensor, x_0: torch.Tensor, is_masked: torch.Tensor) -> torch.Tensor:
        """Each row's sum of cross entropy over its masked positions; forward only, training is not touched.

        Shapes: x_t, x_0 int64 [r, s]; is_masked bool [r, s]; returns float64 [r] on the CPU, nats, the same on all
        ranks of this data-parallel coordinate.
        """
        rows_per_pass = self._micro_batch_size * self._stage.objective.num_views
        return scoring.masked_cross_entropy(self._stage, x_t, x_0, is_masked, rows_per_pass=rows_per_pass)

    def predict(self, x_t: torch.Tensor, is_open: torch.Tensor, draw: Draw) -> Prediction:
        """What the network would write at each open position, row by row; forward only, training is not touched.

        Every rank of a data-parallel coordinate calls this with the same rows; no coordinate waits for another.

        Shapes: x_t int64 [r, s]; is_open bool [r, s]; the answer lies on the CPU, the same on all those ranks.
        """
        rows_per_pass = self._micro_batch_size * self._stage.objective.num_views
        return prediction.predict(self._stage, x_t, is_open, draw, rows_per_pass=rows_per_pass)

    def max_over_ranks(self, value: int) -> int:
        """The largest value of any rank."""
        return self._collectives.max_integer(value)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self._collectives.broadcast_object(value)

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, on every rank."""
        return self._collectives.gather_objects(value)

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        self._collectives.barrier()

    def state_share(self, *, copy: bool) -> state.Share:
        """What this rank writes of the present weights and Adam's state; no collective call.

        Args:
            copy: into memory of the host, so that training may go on while the share is written; the share before is
                overwritten. Otherwise the state itself is written, and must not change meanwhile.
        """
        memory = self._host_memory if copy else None
        return state.share(self._optimizer, self._canonical, rank=self.rank, memory=memory)

    def load_state(self, folder: Path) -> None:
        """Restores what all ranks' shares wrote, under this engine's layout, whichever it was written under.

        Raises:
            CheckpointIntegrityError: the folder does not hold the whole state of this network.
        """
        state.load(folder, self._optimizer, self._canonical, self._collectives)

    def parameter_digest(self) -> str:
        """sha256 over weights and their masters; equal for two runs of one layout exactly if those are, bit for bit."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self._stage.network.named_parameters()):
            digest.update(name.encode())
            digest.update(_bytes_of(parameter))
        if self._optimizer.has_masters:
            for shard in self._optimizer.shards():
                digest.update(_bytes_of(shard.weight))
        return hash_of(*self.gather_objects(digest.hexdigest()))

    def close(self) -> None:
        """Forgets the groups of this layout, so that an engine of another one can be made; the process group stays."""
        parallel_state.destroy_model_parallel()

    @property
    def _canonical(self) -> CanonicalMap:
        return CanonicalMap(spec=self._spec, topology=self.topology)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()


def _create_groups(topology: Topology) -> None:
    """Makes megatron-core's groups, or keeps those of an earlier engine: gloo never frees the threads of a group."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tensor_parallel_size,
            pipeline_model_parallel_size=topology.pipeline_parallel_size,
            create_gloo_process_groups=False,
        )
    actual = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    expected = (
        topology.tensor_parallel_rank,
        topology.data_parallel_rank,
        topology.pipeline_parallel_rank,
        topology.tensor_parallel_size,
        topology.pipeline_parallel_size,
    )
    if actual != expected:
        raise RuntimeError(f"megatron-core places rank {topology.rank} at {actual}, the topology at {expected}")
    # sequence parallelism forks a generator of this name; nothing draws from it, dropout is 0
    tensor_parallel.model_parallel_cuda_manual_seed(1)

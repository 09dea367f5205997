"""The engine room: one object that trains, scores, saves and restores a network under any layout."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megamask.config.schema.device import DeviceConfig
from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.optimizer import OptimizerConfig
from megamask.config.schema.precision import PrecisionConfig
from megamask.config.schema.training import TrainingConfig
from megamask.diffusion.sampling import Draw, Prediction
from megamask.engine import scoring
from megamask.engine.backend import Backend, select_backend
from megamask.engine.collectives import Collectives
from megamask.engine.fp8 import Fp8
from megamask.engine.graphs import FeedForwardGraphs
from megamask.engine.head import ScoredRowHead
from megamask.engine.initialization import read_weights, set_initial_weights
from megamask.engine.kernels import Kernels
from megamask.engine.layers.router import routing_of
from megamask.engine.mesh import Mesh, ProcessGroups
from megamask.engine.network import build_network, wrap_data_parallel
from megamask.engine.optimizer import ShardedAdamW, norm_of
from megamask.engine.own_time import PassClock
from megamask.engine.parameters import mark_parameters, parameter_table
from megamask.engine.passes import RankModel
from megamask.engine.probes import capability
from megamask.engine.specs.families import groups_experts, layer_family
from megamask.engine.state import restore
from megamask.engine.state.digest import weights_digest
from megamask.engine.state.host_copy import HostCopy
from megamask.engine.state.share import Share, share
from megamask.engine.state.slices import StoredSlice
from megamask.engine.step import Accepts, StepReport, StepSettings, StepShare, accept_all, agreed_fault, step_report
from megamask.models.spec import ModelSpec
from megamask.objectives.base import Objective, Reading, Rows
from megamask.planning.capability import chosen_layers
from megamask.storage.fault_points import reached
from megamask.storage.hashing import hash_of

if TYPE_CHECKING:
    from megamask.data.loader import Batch


class Engine:
    """A network on this rank's part of the layout, ready to train; needs an initialised process group.

    Every method but the properties, `members` and `state_share` is called by all ranks together. The layout was checked
    against the model by the config (config/validate.py); here only the number of processes is.

    Args:
        seed: run.seed, the key of initial weights and of the noise.
        precision: number formats. In bf16 Adam updates float32 master weights, gradients are summed in float32, and
            the state on disk is the masters'.
        device: choices that concern the machine.
        draws_weights: set the first weights from the seed; otherwise they are zero until `set_weights`.

    Attributes:
        parameters: the table of this rank's parameters.
        arithmetic: which modules the layers are made of, and which FP8 they compute in (tracking/records.py).

    Raises:
        UsageError: the layout's sizes do not multiply to the number of processes, or the layers cannot run here.
    """

    def __init__(
        self,
        spec: ModelSpec,
        objective: Objective,
        optimizer: OptimizerConfig,
        layout: LayoutConfig,
        training: TrainingConfig,
        seed: int,
        *,
        precision: PrecisionConfig = PrecisionConfig(),  # noqa: B008 - frozen
        device: DeviceConfig = DeviceConfig(),  # noqa: B008 - frozen
        draws_weights: bool = True,
    ) -> None:
        backend = select_backend(deterministic=device.deterministic)
        self._collectives = Collectives(backend.device)
        mesh = Mesh.from_layout(layout, rank=self._collectives.rank, world_size=self._collectives.world_size)
        num_experts = 0 if spec.experts is None else spec.experts.num_experts
        layers = chosen_layers(precision, device, capability(), num_experts=num_experts)
        family, are_grouped = layer_family(layers, backend), groups_experts(device.experts, backend)
        groups = ProcessGroups(mesh)
        self._spec, self._host_copy = spec, HostCopy(backend)
        routing = routing_of(spec, groups, backend, balances_rows=training.router_balance_over == "row")
        build = functools.partial(
            build_network,
            mask_token_id=objective.vocabulary.mask_token_id,
            family=family,
            routing=routing,
            recompute=training.recompute,
            attention="te" if device.attention == "te" else "sdpa",
            has_graphs=device.cuda_graphs,
            are_experts_grouped=are_grouped,
        )
        networks = [build(spec, mesh, precision, chunk=chunk) for chunk in range(mesh.virtual_pipeline_size)]
        Kernels.chosen(device, backend).install(networks, backend)
        self._fp8 = Fp8(
            networks, precision, mesh, num_layers=spec.num_layers, group=groups.replicas, device=backend.device
        )
        parts = family.layer_parameters(spec)
        self.parameters = parameter_table(networks, spec, mesh, parts, optimizer, are_experts_grouped=are_grouped)
        mark_parameters(networks, self.parameters)
        chunks = tuple(wrap_data_parallel(network, device, chunk=number) for number, network in enumerate(networks))
        self._optimizer = ShardedAdamW(chunks, self.parameters, optimizer)
        set_initial_weights(self._optimizer, spec, seed=seed if draws_weights else None)
        self._rank_model = RankModel(
            mesh=mesh,
            groups=groups,
            backend=backend,
            collectives=self._collectives,
            chunks=chunks,
            routing=routing,
            head=ScoredRowHead(objective.vocabulary, objective.excluded_ids, mesh, groups, backend.device),
            vocabulary=objective.vocabulary,
            objective=objective,
        )
        self._settings = _step_settings(training, seed)
        self._pass_clock, self.arithmetic = PassClock(chunks[0].config, backend.device), _arithmetic(precision, layers)
        # forward-only passes have the shape of training's, so that a layout that can train can score
        shape = objective.shape(training.sequence_length)
        self._rows_per_pass = training.micro_batch_size * shape.num_views
        self._graphs = FeedForwardGraphs(chunks, (self._rows_per_pass, shape.input_length), is_on=device.cuda_graphs)

    @property
    def backend(self) -> Backend:
        """The machine under this engine."""
        return self._rank_model.backend

    @property
    def mesh(self) -> Mesh:
        """Sizes of the layout and this rank's coordinates."""
        return self._rank_model.mesh

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
        """True if this is global rank 0."""
        return self._collectives.is_main

    def members(self, global_batch_size: int) -> list[int]:
        """Places of the global batch that this rank computes, in the order that `step` expects its samples."""
        return self.mesh.members(global_batch_size, self._settings.micro_batch_size)

    def step(self, batch: Batch, *, step: int, learning_rate: float, accepts: Accepts = accept_all) -> StepReport:
        """Take one training step on this rank's share of a global batch: count, forward and backward, guard, update.

        Args:
            step: 1-based number of the step, which the noise law asks for.
            learning_rate: of this step.
            accepts: whether a finite loss and gradient norm let the update be made. Without the update, weights,
                moments and scales are as before the step.
        """
        rank_model, optimizer, began = self._rank_model, self._optimizer, time.perf_counter()
        share = StepShare(rank_model, self._settings, batch, step=step)
        counts = share.agree_on_counts()
        scales = self._fp8.kept()
        self._fp8.begin_step()
        if self._fp8.needs_calibration:
            with self._fp8.calibrating():
                optimizer.zero_gradients()
                share.forward_backward(counts)
        optimizer.zero_gradients()
        if (routing := rank_model.routing) is not None:
            routing.begin_step(num_rows=share.num_rows)
        sums = self._pass_clock.timed(lambda: share.forward_backward(counts))
        rank_model.backend.synchronize()
        reached("step.computed")
        middle = time.perf_counter()
        of_rank = torch.cat((sums, optimizer.squared_gradient_norm().reshape(1).double()))
        # One collective: a value that is not finite on any rank is not in the total either, the same on all of them.
        *totals, squared_norm = rank_model.collectives.sum_doubles(of_rank)
        losses, grad_norm = share.losses(totals, counts), norm_of(squared_norm)
        fault = agreed_fault(rank_model.collectives, losses.total, grad_norm, accepts)
        if fault:
            self._fp8.put_back(scales)
        else:
            optimizer.update(learning_rate=learning_rate, gradient_norm=grad_norm)
            if routing is not None:
                routing.move_biases(torch.tensor(losses.expert_counts))
        rank_model.backend.synchronize()
        reached("step.updated")
        return step_report(
            losses,
            counts,
            grad_norm=grad_norm,
            fault=fault,
            forward_backward_s=middle - began,
            optimizer_s=time.perf_counter() - middle,
            passes_s=self._pass_clock.seconds(),
        )

    def score(self, rows: Rows) -> torch.Tensor:
        """Each row's sum of weight * cross entropy over its scored positions; forward only, training is not touched.

        Returns: float64 [r] on the CPU, nats, the same on all ranks of this data-parallel coordinate.
        """
        with self._fp8.untouched(), self._graphs.set_aside():
            return scoring.score(
                self._rank_model,
                rows,
                rows_per_pass=self._rows_per_pass,
                chunk_rows=self._settings.head_chunk_rows,
            )

    def predict(self, reading: Reading, draw: Draw) -> Prediction:
        """A token for each position read, row by row; forward only, training is not touched.

        Every rank of a data-parallel coordinate calls this with the same rows; no coordinate waits for another. The
        answer is on the CPU, the same on all those ranks.
        """
        with self._fp8.untouched(), self._graphs.set_aside():
            return scoring.predict(self._rank_model, reading, draw, rows_per_pass=self._rows_per_pass)

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
        """Wait until every rank has come here."""
        self._collectives.barrier()

    def state_share(self, *, copy: bool) -> Share:
        """Return this rank's share of the present weights and Adam's state; no collective call.

        Args:
            copy: into memory of the host, so that training may go on while the share is written; the share before is
                overwritten. Otherwise the state itself is written, and must not change meanwhile.
        """
        memory = self._host_copy if copy else None
        return share(self._optimizer, self._fp8, rank=self.rank, memory=memory)

    def set_weights(self, read: Callable[[Sequence[StoredSlice]], None]) -> None:
        """Set every weight from a source; Adam's state stays at zero.

        Args:
            read: fills rectangles of canonical tensors, those of this rank's shards; no collective call.

        Raises: what `read` raises, on every rank alike.
        """
        read_weights(self._optimizer, self._spec, read, self._collectives)

    def load_state(self, folder: Path) -> None:
        """Restore the state from all ranks' files, under this engine's layout; any layout may have written them.

        Raises:
            CheckpointIntegrityError: the folder does not hold the complete state of this network.
            UsageError: version 0.1.0 wrote the state.
        """
        restore.load(folder, self._optimizer, self._fp8, self._spec, self._collectives)

    def parameter_digest(self) -> str:
        """sha256 over weights and their masters; equal for two runs of one layout exactly if those are, bit for bit."""
        self._optimizer.gather_weights()
        return hash_of(*self.gather_objects(weights_digest(self._rank_model.networks, self._optimizer)))

    def close(self) -> None:
        """Forget the groups of this layout, so that an engine of another one can be made; the process group stays."""
        ProcessGroups.release()


def _step_settings(training: TrainingConfig, seed: int) -> StepSettings:
    return StepSettings(micro_batch_size=training.micro_batch_size, head_chunk_rows=training.head_chunk_rows, seed=seed)


def _arithmetic(precision: PrecisionConfig, layers: str) -> dict[str, str]:
    return {"layers": layers, "fp8": "none" if precision.fp8 == "none" else f"{precision.fp8}, {layers}"}

"""A checkpoint by itself, without its run: what evaluate, sample and convert start from."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.contents import ModelDocument, TrainerState, check_size, check_state, read_model, read_state
from megamask.checkpoint.names import TOKENIZER_NAME
from megamask.checkpoint.origin import Origin, read_origin
from megamask.checkpoint.reader import find
from megamask.data.tokenizer import CorpusTokenizer
from megamask.errors import CheckpointIntegrityError, DataIntegrityError, UsageError
from megamask.models.vocabulary import NO_ID
from megamask.objectives.base import Objective
from megamask.objectives.in_force import at_step

if TYPE_CHECKING:
    import torch

    from megamask.models.reference import ReferenceModel


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A verified checkpoint without its weights.

    Args:
        objective: how the network reads a row after this checkpoint's steps.
        origin: where the weights come from, where no run wrote them.
        own_tokenizer: the checkpoint's; its digest is the one that model.json names. None for an imported model
            without one.
    """

    commit: Commit
    model: ModelDocument
    state: TrainerState
    objective: Objective
    origin: Origin | None
    own_tokenizer: CorpusTokenizer | None

    @property
    def tokenizer(self) -> CorpusTokenizer:
        """The checkpoint's tokenizer.

        Raises:
            UsageError: it has none.
        """
        if self.own_tokenizer is None:
            problem = None if self.origin is None else self.origin.tokenizer_problem
            raise UsageError(
                f"{self.commit.folder} has no tokenizer{'' if problem is None else f' ({problem})'}. Nothing was done.",
                hint="give --token-ids FILE.npy in place of text",
            )
        return self.own_tokenizer

    def require_mask(self, objective: Objective | None = None) -> None:
        """Refuse to read a diffusion model without its mask token.

        Args:
            objective: that the network is read for; by default its own.

        Raises:
            UsageError: the published files name no mask token.
        """
        needs_mask = (objective or self.objective).needs_mask_token
        if needs_mask and self.model.vocabulary.mask_token_id == NO_ID:
            raise UsageError(
                f"{self.commit.folder} is a diffusion model whose files name no mask token. Nothing was done.",
                hint="set mask_token_id in the published config.json and convert it again",
            )

    def network(self) -> tuple[ReferenceModel, torch.device]:
        """The reference network with the checkpoint's weights, in evaluation mode, on the GPU if there is one."""
        import torch

        from megamask.engine.state.restore import read_canonical_weights
        from megamask.models.reference import ReferenceModel

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = ReferenceModel(self.model.spec)
        network.load_state_dict(read_canonical_weights(self.commit.folder, self.model.spec))
        return network.to(device).eval(), device


def load_checkpoint(path: Path) -> LoadedCheckpoint:
    """The checkpoint that a run directory or a checkpoint folder means, every byte of it verified.

    A newer checkpoint of a run that is damaged is passed over, with a line on stderr.

    Raises:
        UsageError: the path is neither. CheckpointIntegrityError: nothing there verifies.
    """
    commit, incidents = find(path)
    for record in incidents:
        sys.stderr.write(f"passed over {record['checkpoint']}: {record['problem']}\n")
    model, state = read_model(commit.folder), read_state(commit.folder)
    check_state(commit, state)
    check_size(commit, model)
    return LoadedCheckpoint(
        commit=commit,
        model=model,
        state=state,
        objective=at_step(model.objective, state.step),
        origin=read_origin(commit),
        own_tokenizer=_tokenizer(commit, model.tokenizer_digest),
    )


def _tokenizer(commit: Commit, digest: str | None) -> CorpusTokenizer | None:
    folder = commit.folder
    if digest is None:
        if any(name.startswith(f"{TOKENIZER_NAME}/") for name in commit.files):
            raise CheckpointIntegrityError(
                f"{folder / TOKENIZER_NAME} exists, model.json names no tokenizer. Nothing was loaded."
            )
        return None
    try:
        tokenizer = CorpusTokenizer.load(folder / TOKENIZER_NAME)
    except DataIntegrityError as error:
        raise CheckpointIntegrityError(error.message, hint=error.hint) from error
    if tokenizer.digest != digest:
        raise CheckpointIntegrityError(
            f"{folder / TOKENIZER_NAME} has digest {tokenizer.digest}, model.json names {digest}. Nothing was loaded."
        )
    return tokenizer

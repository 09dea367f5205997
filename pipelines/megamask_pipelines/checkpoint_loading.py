"""A checkpoint as a reference network on one device: what evaluate and sample start from."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.contents import ModelDocument, TrainerState, check_size, check_state, read_model, read_state
from megamask.checkpoint.names import TOKENIZER_NAME
from megamask.checkpoint.reader import find
from megamask.data.tokenizer import CorpusTokenizer
from megamask.errors import CheckpointIntegrityError, DataIntegrityError

if TYPE_CHECKING:
    import torch

    from megamask.models.reference import ReferenceModel


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A verified checkpoint without its weights.

    Args:
        tokenizer: the checkpoint's own; its digest is the one that model.json names.
    """

    commit: Commit
    model: ModelDocument
    state: TrainerState
    tokenizer: CorpusTokenizer

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
    try:
        tokenizer = CorpusTokenizer.load(commit.folder / TOKENIZER_NAME)
    except DataIntegrityError as error:
        raise CheckpointIntegrityError(error.message, hint=error.hint) from error
    if tokenizer.digest != model.tokenizer_digest:
        raise CheckpointIntegrityError(
            f"{commit.folder / TOKENIZER_NAME} has digest {tokenizer.digest}, model.json says "
            f"{model.tokenizer_digest}. Nothing was loaded."
        )
    return LoadedCheckpoint(commit=commit, model=model, state=state, tokenizer=tokenizer)

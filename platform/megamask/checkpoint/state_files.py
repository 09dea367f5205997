"""The files of a checkpoint's sharded state, seen from the checkpoint: which format, and are they complete?"""

from __future__ import annotations

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.contents import read_model
from megamask.checkpoint.origin import read_origin


def refuse_old_state(commit: Commit) -> None:
    """Refuse a checkpoint whose state version 0.1.0 wrote, before its files are read.

    Raises:
        UsageError: names the folder and the program that reads it.
    """
    from megamask.engine.state.index import is_old_state, old_state

    if is_old_state(commit.files):
        raise old_state(commit.folder)


def check_state(commit: Commit) -> None:
    """Read the headers of the state's files with the reader that a resume uses; no tensor is read.

    Raises:
        CheckpointIntegrityError: the files do not hold every element of every tensor of model.json's network once.
        UsageError: version 0.1.0 wrote the state.
    """
    from megamask.engine.state.index import read_index, require
    from megamask.engine.state.restore import read_num_updates
    from megamask.engine.state.slices import stored_shapes
    from megamask.models.shapes import canonical_shapes

    refuse_old_state(commit)
    spec = read_model(commit.folder).spec
    if read_origin(commit) is not None:  # weights alone
        require(commit.folder, read_index(commit.folder), canonical_shapes(spec))
        return
    require(commit.folder, read_index(commit.folder), stored_shapes(spec))
    read_num_updates(commit.folder)

"""The job of `megamask data find`: which rows of a corpus, and which steps of a run, have a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamask.audit.recompute import batches, open_loader, recorded_run
from megamask.data.loader import Loader
from megamask.data.manifest import Manifest
from megamask.data.membership import Membership, find_documents, samples_of_row
from megamask.errors import UsageError
from megamask.training.batch_size import consumed_before, step_of_sample


def find(folder: Path, *, number: int | None, text: str | None, run: str | None) -> dict[str, Any]:
    """Find a document by number or by exact text.

    Args:
        folder: the corpus.
        number: of the document.
        text: a file whose bytes are the document's text.
        run: a run directory whose steps are looked through, up to its last.

    Raises:
        UsageError: not exactly one of number and text; the run does not read this corpus.
        DataIntegrityError: the corpus is damaged.
    """
    if (number is None) == (text is None):
        raise UsageError("give exactly one of --document and --text. Nothing was found.")
    found = find_documents(folder, number=number, text=None if text is None else Path(text).read_bytes())
    rows = [
        {
            "number": each.document.number,
            "input": each.document.input,
            "split": each.document.split,
            "first_row": each.rows[0],
            "last_row": each.rows[-1],
            "rows": list(each.rows),
        }
        for each in found
    ]
    if run is None:
        return {"documents": rows}
    recorded = recorded_run(Path(run))
    corpus_id = Manifest.load(folder).corpus_id
    with open_loader(recorded) as loader:
        names = [name for name, other in loader.corpus_ids.items() if other == corpus_id]
        if not names:
            raise UsageError(f"{run} was not trained on {folder}. Nothing was found.")
        num_samples = loader.skipped.index(consumed_before(recorded.steps + 1, batches(recorded)) - 1) + 1
        steps = [_steps(loader, names[0], each, num_samples, recorded) for each in found]
    return {"documents": [row | {"steps": each} for row, each in zip(rows, steps, strict=True)]}


def _steps(loader: Loader, source: str, found: Membership, num_samples: int, recorded: Any) -> list[int]:
    if found.document.split != "train":
        return []
    samples = {sample for row in found.rows for sample in samples_of_row(loader, source, row, num_samples)}
    positions = [loader.skipped.position(sample) for sample in samples]
    return sorted({step_of_sample(position, batches(recorded)) for position in positions if position is not None})

"""One save by the real saver, of a small state that needs no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.contents import TrainerState
from megamask.checkpoint.saver import Save, SaveRequest
from support.model_documents import model_document
from support.thread_world import ThreadEngine, ThreadWorld


def save_once(
    run_dir: Path,
    *,
    step: int,
    attempt: int,
    check_claim: Callable[[], None] = lambda: None,
    in_background: bool = False,
    run_id: str = "r",
) -> Commit:
    """Commits a state that records which step and attempt it is of."""
    tokenizer = run_dir.parent / f"{run_dir.name}.tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    engine = ThreadEngine(ThreadWorld(1), 0)
    engine.content = f"weights of step {step} by attempt {attempt}; ".encode() * 20
    request = SaveRequest(
        attempt=attempt,
        state=TrainerState(step=step, consumed_samples=8 * step, consumed_tokens=100 * step, seed=7),
        model=model_document(),
        tokenizer_folder=tokenizer,
        corpora={"main": "c" * 64},
        journal_head=(step, "0" * 64),
        run_id=run_id,
        parent=None,
        check_claim=check_claim,
    )
    return Save(engine, run_dir, request, in_background=in_background).wait()

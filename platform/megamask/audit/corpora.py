"""Corpora of a run: found through its journal, compared by id, and on request read and recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megamask.audit.recompute import content_digest_of, open_loader, recorded_run
from megamask.audit.report import Report
from megamask.checkpoint.commit import Commit
from megamask.config.schema.roots import TrainConfig
from megamask.data.manifest import MANIFEST_NAME, Manifest, open_corpus
from megamask.data.verify import verify_corpus
from megamask.errors import DataIntegrityError, UsageError
from megamask.runs.layout import record_path
from megamask.runs.record import RunRecord, read_run
from megamask.storage.ranges import is_remote
from megamask.tracking.journal.lines import steps_with_attempts
from megamask.tracking.journal.seek import newest_start


def corpus_folders(run_dir: Path, config: TrainConfig | None, given: Mapping[str, str]) -> dict[str, str]:
    """Return the folder or URL of each corpus: as given, else as the newest attempt journalled it, else of its config.

    The journal has absolute folders; a relative one of a config depends on the working folder and is not used.
    """
    started = newest_start(run_dir, before=1 << 62)
    datasets = (started.datasets if started is not None else None) or []
    folders = {str(each.get("name")): str(each.get("source")) for each in datasets}
    configured = {} if config is None else config.data.corpora
    absolute = {name: place for name, place in configured.items() if is_remote(place) or Path(place).is_absolute()}
    return {**absolute, **folders, **{name: str(Path(folder).absolute()) for name, folder in given.items()}}


def check_corpora(record: RunRecord, folders: Mapping[str, str], report: Report) -> dict[str, Path]:
    """Compare the id of each corpus that is reachable; return the folders of those that agree."""
    agreeing = {}
    for name, expected in record.content["corpora"].items():
        place = folders.get(name)
        folder = Path(place or "")
        if place is None or not (folder / MANIFEST_NAME).exists():
            where = "its folder is not recorded" if place is None else f"it is not at {place}"
            report.notes.append(f"corpus {name} is not reachable: {where}")
            report.not_covered.append(f"corpus {name} (not reachable; --corpus {name}=FOLDER)")
            continue
        try:
            manifest = Manifest.load(folder)
        except (DataIntegrityError, UsageError) as error:
            report.find_corpus(name, error.message)
            continue
        if manifest.corpus_id != expected:
            report.find_corpus(name, f"{folder} is corpus {manifest.corpus_id}; the run was started with {expected}")
        elif manifest.tokenizer_digest != record.content["tokenizer_digest"]:
            report.find_corpus(name, f"its tokenizer is {manifest.tokenizer_digest}; the run was started with another")
        else:
            agreeing[name] = folder
    if agreeing:
        report.covered.append(f"ids of the corpora ({', '.join(agreeing)})")
    return agreeing


def check_data(run_dir: Path, folders: Mapping[str, Path], report: Report) -> None:
    """Read every byte of the corpora that agree, and recompute the content digest of every journalled step."""
    for name, folder in folders.items():
        try:
            verify_corpus(folder)
        except DataIntegrityError as error:
            report.find_corpus(name, error.message)
            report.not_covered.append(f"content digests (corpus {name} is damaged)")
            return
        report.covered.append(f"every byte of corpus {name}")
    run = recorded_run(run_dir, {name: str(folder) for name, folder in folders.items()})
    if set(run.corpora) - set(folders):
        report.not_covered.append("content digests (a corpus is not reachable, or another one)")
        return
    num_steps = 0
    with open_loader(run) as loader:
        for step, (attempt, line) in steps_with_attempts(run_dir).items():
            num_steps += 1
            loader.leave_out(run.skipped_at(attempt))
            if (recomputed := content_digest_of(run, loader, step)) != line.get("content_digest"):
                problem = f"the journal has {line.get('content_digest')}; the corpus gives {recomputed}"
                report.find("journal", f"content_digest of step {step}: {problem}")
    report.covered.append(f"the content of {num_steps} steps")


def score_of(commit: Commit) -> str:
    """Return `data.score` of the run that wrote a checkpoint; "all" for one outside a run directory."""
    run_dir = commit.folder.resolve().parents[1]
    if not record_path(run_dir).is_file():
        return "all"
    return str(read_run(run_dir).content["identity"].get("data.score", "all"))


def corpus_to_score(commit: Commit, given: Path | None) -> tuple[Path, Manifest]:
    """Return the given corpus, or the one that a checkpoint's run was trained on, found through its newest config.

    Raises:
        UsageError: the checkpoint is not in a run directory, or its corpus is gone or another one.
        DataIntegrityError: the manifest is damaged.
    """
    if given is not None:
        return given, open_corpus(given, "--corpus")
    run_dir = commit.folder.resolve().parents[1]
    if not record_path(run_dir).is_file():
        raise UsageError(
            f"{commit.folder} is not in a run directory, so its corpus is not known here. Nothing was scored.",
            hint="give --text FILE..., or --corpus FOLDER",
        )
    [(name, folder)] = recorded_run(run_dir).corpora.items()
    try:
        manifest = open_corpus(Path(folder), f"data.corpora.{name}")
    except UsageError as error:
        raise UsageError(error.message, hint="give --corpus FOLDER, or --text FILE...") from error
    if manifest.corpus_id != commit.corpora.get(name):
        raise UsageError(
            f"data.corpora.{name} ({folder}) is corpus {manifest.corpus_id}, but the checkpoint was trained on "
            f"{commit.corpora.get(name)}. Nothing was scored.",
            hint="give --corpus FOLDER to score another corpus with the same tokenizer",
        )
    return Path(folder), manifest

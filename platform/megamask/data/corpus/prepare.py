"""Preparation of a corpus from text: read, split, train or load a tokenizer, encode, pack, publish atomically.

The inputs are read twice (three times when a tokenizer is trained) and never held in memory: one document, one block
of each split, and about 80 bytes a document are. `options` in the manifest are

    jsonl_text_key, rows_per_block, blocks_per_shard   as configured
    validation_fraction                                decimal string
    tokenizer   {eod_token, pad_token, mask_token} and {vocab_size, training_bytes}, or {json_sha256}, the digest of the
                tokenizer.json that was given, or {source: {kind, files: name -> sha256}} with a pattern where given
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megamask.config.schema.corpus import CorpusConfig, TokenizerConfig
from megamask.data.corpus.best_fit import BEST_FIT_NAME, BEST_FIT_VERSION
from megamask.data.corpus.chat import ChatTemplate, chat_template
from megamask.data.corpus.documents import DOCUMENTS_DIR, write_documents
from megamask.data.corpus.encode import CorpusWriter, Segments, encoded_texts
from megamask.data.corpus.inputs import InputFile, find_inputs
from megamask.data.corpus.pack import PACKER_NAME, PACKER_VERSION, token_dtype
from megamask.data.corpus.provenance import provenance
from megamask.data.corpus.publish import exclusive, folder_being_built
from megamask.data.corpus.scan import Counter, Progress, ScannedCorpus, num_bytes, scan
from megamask.data.corpus.selection import Selector
from megamask.data.corpus.shard import SHARDS_DIR, write_flushed
from megamask.data.corpus.splits import decimal_text
from megamask.data.corpus.tasks import TaskReport, Tasks
from megamask.data.corpus.units import UNIT_BYTES, folder_of
from megamask.data.manifest import MANIFEST, MANIFEST_NAME, PROVENANCE_NAME, Manifest
from megamask.data.tokenizer import TOKENIZER_DIR, CorpusTokenizer, SpecialTokens
from megamask.errors import DataIntegrityError, UsageError
from megamask.resilience.parent_death import die_with_parent
from megamask.storage.durable import storage_errors
from megamask.storage.hashing import canonical_json, sha256_bytes


@dataclass(frozen=True)
class _Job:
    """Description of the corpus to write, once the inputs are known."""

    config: CorpusConfig
    plan: dict[str, Any]
    scanned: ScannedCorpus
    tokenizer: Callable[[], CorpusTokenizer]
    encoded: Callable[[CorpusTokenizer], Iterator[Segments]]


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """Result of a preparation: totals over the splits; bytes are UTF-8 bytes of the text."""

    corpus_id: str
    documents: int
    tokens: int
    sequences: int
    shards: int
    bytes: int
    vocab_size: int
    output_dir: str
    reused: bool
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest, target: Path, warnings: Sequence[str], *, reused: bool) -> PrepareReport:
        """The report of a corpus at `target`."""
        totals = manifest.content["totals"]
        return cls(
            corpus_id=manifest.corpus_id,
            documents=totals["documents"],
            tokens=totals["tokens"],
            sequences=totals["sequences"],
            shards=totals["shards"],
            bytes=totals["text_bytes"],
            vocab_size=manifest.vocab_size,
            output_dir=str(target),
            reused=reused,
            warnings=tuple(warnings),
        )


def build(config: CorpusConfig, progress: Progress = lambda *_: None) -> PrepareReport:
    """Prepare a corpus, or return the same one if it already exists.

    Args:
        config: what to make of which inputs.
        progress: called with (phase, documents done, bytes done, bytes in all or None).

    Raises:
        UsageError: the config cannot be done, or the output folder holds something else; nothing was touched.
        DataIntegrityError: an input is damaged, or the corpus that is already there is.
        StorageError: the disk refused; nothing was published.
    """
    special = _special_tokens(config.tokenizer)
    target = Path(config.output_dir).expanduser().resolve()
    with storage_errors(f"preparing {target}"):
        files = find_inputs(config.inputs, config.exclude)
        _refuse_foreign(target)
        processes = _processes(config, num_bytes(files))
        if not (target / MANIFEST_NAME).is_file() and (processes > 1 or folder_of(target).exists()):
            _run_tasks(config, processes, progress)
            return merge(config, progress)
        loaded = _load_tokenizer(config.tokenizer, special)
        scanned = scan(files, config, progress)

        def tokenizer() -> CorpusTokenizer:
            return loaded or _train(config, scanned, progress)

        def encoded(tokenizer: CorpusTokenizer) -> Iterator[Segments]:
            return encoded_texts(config, scanned, tokenizer, Counter(progress, "encoding", scanned.num_bytes))

        return _publish(config, target, _Job(config, _plan(config, scanned, loaded), scanned, tokenizer, encoded))


def run_task(config: CorpusConfig, task: int, num_tasks: int, progress: Progress = lambda *_: None) -> TaskReport:
    """Read and encode the units of one task of a preparation; skip those already done.

    Args:
        config: what to make of which inputs; the same for all tasks.
        task: number of the task, from 0.
        num_tasks: how many there are; need not be the same for all.
        progress: as of `build`.

    Raises: as `build`; nothing is published.
    """
    target = Path(config.output_dir).expanduser().resolve()
    with storage_errors(f"preparing {target}"):
        _refuse_foreign(target)
        return _tasks(config, target, progress).run(task, num_tasks)


def merge(config: CorpusConfig, progress: Progress = lambda *_: None) -> PrepareReport:
    """Publish the corpus of tasks that are all done, and remove what they kept; raises as `build`."""
    target = Path(config.output_dir).expanduser().resolve()
    with storage_errors(f"preparing {target}"):
        _refuse_foreign(target)
        tasks = _tasks(config, target, progress)
        scanned = tasks.scanned()
        plan = _plan(config, scanned, tasks.loaded)
        job = _Job(config, plan, scanned, tasks.tokenizer, lambda _: tasks.encoded(scanned))
        report = _publish(config, target, job)
        shutil.rmtree(tasks.store.folder)
    return report


def _publish(config: CorpusConfig, target: Path, job: _Job) -> PrepareReport:
    """The corpus of a job, made now unless the same one is already there."""
    warnings = job.scanned.warnings
    manifest = _existing(target, job.plan)
    if manifest is not None:
        return PrepareReport.of(manifest, target, warnings, reused=True)
    with exclusive(target):
        manifest = _existing(target, job.plan)  # another process may have finished it since
        if manifest is not None:
            return PrepareReport.of(manifest, target, warnings, reused=True)
        with folder_being_built(target) as folder:
            manifest = _fill(folder, job)
    return PrepareReport.of(manifest, target, warnings, reused=False)


def _processes(config: CorpusConfig, size: int) -> int:
    if config.processes is not None:
        return config.processes
    return len(os.sched_getaffinity(0)) if size > UNIT_BYTES else 1


def _run_tasks(config: CorpusConfig, processes: int, progress: Progress) -> None:
    """All tasks of a preparation, each in a process of its own where there are several."""
    if processes == 1:
        run_task(config, 0, 1, progress)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=die_with_parent) as pool:
        waiting = [pool.submit(run_task, config, task, processes) for task in range(processes)]
        for done, future in enumerate(waiting):
            progress(f"reading and encoding in {processes} processes", 0, done, processes)
            future.result()


def _tasks(config: CorpusConfig, target: Path, progress: Progress) -> Tasks:
    loaded = _load_tokenizer(config.tokenizer, _special_tokens(config.tokenizer))
    template = sha256_bytes(chat_template(config.chat_template).encode())
    options = {"sequence_length": config.sequence_length, "chat_template_sha256": template} | _options(config, loaded)
    return Tasks(config, options, target, loaded, lambda scanned: _train(config, scanned, progress), progress)


def _train(config: CorpusConfig, scanned: ScannedCorpus, progress: Progress) -> CorpusTokenizer:
    """A tokenizer trained on the training documents."""
    asked, template = config.tokenizer, ChatTemplate(chat_template(config.chat_template))

    def shown(file: InputFile, text: str, where: str) -> str:
        return template.text(text, where) if file.format == "messages" else text

    return CorpusTokenizer.train(
        scanned.training_texts(asked.training_bytes, progress, shown),
        vocab_size=asked.vocab_size or 0,
        special=_special_tokens(asked),
        on_wait=lambda: progress("training the tokenizer", 0, 0, None),
    )


def _special_tokens(config: TokenizerConfig) -> SpecialTokens:
    if (config.vocab_size is None) == (config.path is None):
        given = "neither" if config.path is None else "both"
        raise UsageError(
            f"corpus.tokenizer has {given} of vocab_size and path; exactly one is needed. Nothing was written.",
            hint="corpus.tokenizer.vocab_size=512 trains a tokenizer, corpus.tokenizer.path=FILE loads one",
        )
    special = SpecialTokens(eod=config.eod_token or "", pad=config.pad_token, mask=config.mask_token)
    if config.eod_token is not None or config.path is None:
        special.check()
    return special


def _load_tokenizer(config: TokenizerConfig, special: SpecialTokens) -> CorpusTokenizer | None:
    if config.path is None:
        return None
    has_own_eod = config.eod_token is None
    return CorpusTokenizer.from_file(config.path, special, pattern=config.pattern, has_own_eod=has_own_eod)


def _options(config: CorpusConfig, loaded: CorpusTokenizer | None) -> dict[str, Any]:
    """Return the requested options, as the manifest records them."""
    asked = config.tokenizer
    tokenizer: dict[str, Any] = {
        "eod_token": asked.eod_token if loaded is None else loaded.special.eod,
        "pad_token": asked.pad_token,
        "mask_token": asked.mask_token,
    }
    source = None if loaded is None else loaded.source
    if source is None:
        tokenizer |= {"vocab_size": asked.vocab_size, "training_bytes": asked.training_bytes}
    elif source.kind == "tokenizer_json":
        [tokenizer["json_sha256"]] = source.files.values()
    else:
        tokenizer["source"] = {"kind": source.kind, "files": dict(source.files)}
        tokenizer |= {} if asked.pattern is None else {"pattern": asked.pattern}
    return {
        "jsonl_text_key": config.jsonl_text_key,
        "rows_per_block": config.rows_per_block,
        "blocks_per_shard": config.blocks_per_shard,
        "validation_fraction": decimal_text(config.validation_fraction),
        "tokenizer": tokenizer,
    } | Selector(config).options()


def _plan(config: CorpusConfig, scanned: ScannedCorpus, loaded: CorpusTokenizer | None) -> dict[str, Any]:
    """The part of the manifest that is known before anything is encoded: what was asked, of which inputs."""
    plan: dict[str, Any] = {
        "format": MANIFEST.format,
        "version": MANIFEST.version,
        "sequence_length": config.sequence_length,
        "packer": _packer(config),
        "options": _options(config, loaded) | _chat_options(config, scanned),
        "inputs": [
            {"name": each.file.name, "sha256": each.sha256, "bytes": each.bytes, "documents": taken}
            | each.file.options()
            for each, taken in zip(scanned.inputs, scanned.documents_of_inputs(), strict=True)
        ],
    }
    return plan | ({"steps": list(scanned.steps)} if scanned.steps else {})


def _packer(config: CorpusConfig) -> dict[str, Any]:
    if config.packing == "best_fit":
        return {"name": BEST_FIT_NAME, "version": BEST_FIT_VERSION}
    return {"name": PACKER_NAME, "version": PACKER_VERSION}


def _chat_options(config: CorpusConfig, scanned: ScannedCorpus) -> dict[str, str]:
    """The digest of the chat template, for a corpus with conversations."""
    if all(each.file.format != "messages" for each in scanned.inputs):
        return {}
    return {"chat_template_sha256": sha256_bytes(chat_template(config.chat_template).encode())}


def _refuse_foreign(target: Path) -> None:
    """Refuse an output path that is neither free nor a corpus, before the inputs are read."""
    try:
        is_taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise UsageError(
            f"corpus.output_dir {target} cannot be a folder: {error.strerror}. Nothing was written.",
            hint="choose another corpus.output_dir",
        ) from error
    if is_taken and not (target / MANIFEST_NAME).is_file():
        raise UsageError(
            f"corpus.output_dir {target} exists and is not a corpus. It was not touched.",
            hint="choose another corpus.output_dir, or remove what is there",
        )
    standing = next(folder for folder in target.parents if folder.exists())
    if not standing.is_dir():
        raise UsageError(
            f"corpus.output_dir {target} lies below {standing}, which is not a folder. Nothing was written.",
            hint="choose another corpus.output_dir",
        )


def _existing(target: Path, plan: dict[str, Any]) -> Manifest | None:
    """The corpus at `target` if it is the one that the plan would make; None if the place is free.

    Raises:
        UsageError: something else is there.
        DataIntegrityError: it is the same corpus, but a file of it is missing or damaged.
    """
    _refuse_foreign(target)
    if not (target / MANIFEST_NAME).is_file():
        return None
    manifest = Manifest.load(target)
    different = sorted(key for key in plan if manifest.content.get(key) != plan[key])
    if different:
        raise UsageError(
            f"corpus.output_dir {target} holds another corpus ({manifest.corpus_id[:12]}); these differ: "
            f"{', '.join(different)}. It was not touched.",
            hint="choose another corpus.output_dir, or remove the old corpus",
        )
    for split in manifest.splits.values():
        for shard in split.shards:
            path = target / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                what = "is missing" if size is None else f"has {size} bytes, the manifest has {shard.bytes}"
                raise DataIntegrityError(
                    f"{path} {what}. Nothing was written.", hint="remove the damaged corpus and prepare it again"
                )
    return manifest


def _fill(folder: Path, job: _Job) -> Manifest:
    """Write everything into the folder, the manifest last."""
    tokenizer, scanned = job.tokenizer(), job.scanned
    for name in (TOKENIZER_DIR, SHARDS_DIR, DOCUMENTS_DIR):
        (folder / name).mkdir()
    for name, data in tokenizer.files().items():
        write_flushed(folder / TOKENIZER_DIR / name, data)
    writer = CorpusWriter(folder, job.config, scanned, tokenizer)
    writer.write(job.encoded(tokenizer))
    digest, tables = write_documents(
        folder, scanned.documents.records([(each.file.name, each.sha256) for each in scanned.inputs])
    )
    splits = writer.split_entries()
    content = job.plan | {
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": {
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "eod_token_id": tokenizer.eod_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "mask_token_id": tokenizer.mask_token_id,
        },
        "documents": {"digest": digest, "tables": [{"name": name, "documents": count} for name, count in tables]},
        "splits": {name: split.to_json() for name, split in splits.items()},
        "unused_ids": writer.unused_ids(),
        "totals": {
            "documents": len(scanned.documents),
            "text_bytes": sum(scanned.documents.text_bytes),
            "tokens": sum(split.num_tokens for split in splits.values()),
            "sequences": sum(split.num_rows for split in splits.values()),
            "shards": sum(len(split.shards) for split in splits.values()),
        },
    }
    if packing := writer.packing():
        content |= {"packing": packing}
    data = canonical_json(content)
    write_flushed(folder / PROVENANCE_NAME, provenance(job.config, scanned.inputs, sha256_bytes(data)))
    write_flushed(folder / MANIFEST_NAME, data)
    return Manifest.from_content(content)

"""Training of a byte-level BPE with Hugging Face tokenizers: interruptible, in time about proportional to the text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tokenizers

from megamask.resilience import daemon_threads

# The trainer's time grows with the square of a word's length. A longer word, which no language has, is learned from in
# pieces; shorter ones, and so the merges of ordinary text, do not change.
MAX_WORD_BYTES = 4096
_POLL_S = 0.2
_POLLS_A_CALL = 5


def train_byte_level_bpe(texts: Iterable[str], num_entries: int, *, on_wait: Callable[[], None]) -> str:
    """Learn merges; the same texts in the same order give the same result.

    The library works in a thread of its own, so that Ctrl-C ends the wait: the thread is then abandoned.

    Args:
        texts: what to learn from.
        num_entries: entries wanted, without special tokens.
        on_wait: called about once a second, in the calling thread, once all texts are read.

    Returns:
        tokenizer.json without special tokens.
    Raises:
        Exception: any error of reading the texts.
    """
    model: Any = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = words_to_learn_from()
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=num_entries,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    are_read, failures = threading.Event(), list[BaseException]()

    def read() -> Iterator[str]:
        yield from texts
        are_read.set()

    def train() -> None:
        try:
            model.train_from_iterator(read(), trainer=trainer)
        except BaseException as error:  # noqa: BLE001  raised again in the calling thread
            failures.append(error)

    thread = threading.Thread(target=train, name="megamask-tokenizer-training", daemon=True)
    daemon_threads.watch(thread)
    thread.start()
    polls = 0
    while thread.is_alive():
        thread.join(_POLL_S)
        if are_read.is_set():
            polls += 1
            if polls % _POLLS_A_CALL == 0:
                on_wait()
    if failures:
        raise failures[0]
    model.pre_tokenizer = _byte_level()
    return str(model.to_str())


def words_to_learn_from() -> Any:
    """Return the pre-tokenizer of the training: that of the result, with overlong words cut into pieces."""
    pieces = tokenizers.pre_tokenizers.FixedLength(length=MAX_WORD_BYTES)
    return tokenizers.pre_tokenizers.Sequence([_byte_level(), pieces])


def _byte_level() -> Any:
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

"""Ranks of any number for the tools that compare layouts, forked from one process that has made the imports."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch._dynamo

from megamask.engine import engine as _engine  # noqa: F401 - every rank is forked with the imports made
from megamask.engine.specs import experts as _experts  # noqa: F401

LIMIT_S = 600.0


class RankPool:
    """Processes for cases of any size; each case has its own process group and layout.

    Args:
        folder: for the files at which ranks meet.
    """

    def __init__(self, folder: Path) -> None:
        self._context = multiprocessing.get_context("fork")
        self._folder = folder
        self._number = 0

    def run(self, num_processes: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the answers of all ranks to one call.

        Raises:
            RuntimeError: a rank failed.
        """
        self._number += 1
        store = self._folder / f"store{self._number}"
        queue, all_done = self._context.Queue(), self._context.Event()
        ranks = [
            self._context.Process(
                target=_rank, args=(rank, num_processes, str(store), queue, all_done, function, arguments)
            )
            for rank in range(num_processes)
        ]
        for process in ranks:
            process.start()
        answers: dict[int, Any] = {}
        try:
            while len(answers) < num_processes:
                rank, answer = queue.get(timeout=LIMIT_S)
                if isinstance(answer, _Failure):  # the others would wait for it
                    codes = [process.exitcode for process in ranks]
                    raise RuntimeError(f"rank {rank} failed; exit codes so far {codes}\n{answer.text}")
                answers[rank] = answer
            all_done.set()
        finally:
            for process in ranks:
                process.join(timeout=5 if len(answers) == num_processes else 0)
                if process.is_alive():
                    process.kill()
        return [answers[rank] for rank in range(num_processes)]


class _Failure:
    """A rank's failure record."""

    def __init__(self, text: str) -> None:
        self.text = text


def _rank(
    rank: int,
    world_size: int,
    store: str,
    queue: Any,
    all_done: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=LIMIT_S),
        )
        queue.put((rank, function(*arguments)))
    except BaseException:  # noqa: BLE001 - the parent reports it
        queue.put((rank, _Failure(traceback.format_exc())))
    queue.close()
    queue.join_thread()
    all_done.wait(LIMIT_S)  # a rank that leaves may take with it what the others have not read yet
    os._exit(0)

"""Ranks as threads: a stand-in for the engine's collectives that needs no process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class ThreadShare:
    """One file a rank, which the check looks for; a rank may fail, or wait for the test's word."""

    def __init__(self, engine: ThreadEngine) -> None:
        self.engine, self.content = engine, engine.content

    def write(self, folder: Path, gate: Callable[[], None]) -> list[str]:
        while not self.engine.may_write.wait(0.01):
            gate()
        if self.engine.fail_on_save is not None:
            raise self.engine.fail_on_save
        name = f"state-{self.engine.rank:05d}.safetensors"
        (folder / name).write_bytes(self.content)
        return [name]

    def check(self, folder: Path) -> None:
        for rank in range(self.engine.world.size):
            assert (folder / f"state-{rank:05d}.safetensors").exists()


class ThreadEngine:
    """One rank: the methods of the engine that checkpoints use, with bytes for a state."""

    def __init__(self, world: ThreadWorld, rank: int) -> None:
        self.world, self.rank = world, rank
        self.mesh = SimpleNamespace(rank=rank, world_size=world.size)
        self.content = f"rank {rank}".encode()
        self.loaded_from: Path | None = None
        self.fail_on_save: Exception | None = None
        self.may_write = threading.Event()
        self.may_write.set()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def state_share(self, *, copy: bool) -> ThreadShare:
        return ThreadShare(self)

    def max_over_ranks(self, value: int) -> int:
        return max(self.world.exchange(self.rank, value))

    def load_state(self, folder: Path) -> None:
        self.content = (folder / f"state-{self.rank:05d}.safetensors").read_bytes()
        self.loaded_from = folder

    def gather_objects(self, value: Any) -> list[Any] | None:
        values = self.world.exchange(self.rank, value)
        return values if self.is_main else None  # stricter than the engine: only rank 0 may look

    def broadcast_object(self, value: Any) -> Any:
        return self.world.exchange(self.rank, value)[0]


class ThreadWorld:
    """A group of ranks that meet at every collective call; a rank that stays away makes the others fail in 20 s."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._slots: list[Any] = [None] * size
        self._barrier = threading.Barrier(size)
        self.engines = [ThreadEngine(self, rank) for rank in range(size)]

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        self._barrier.wait(timeout=20)
        values = list(self._slots)
        self._barrier.wait(timeout=20)
        return values

    def run(self, job: Callable[[ThreadEngine], Any]) -> list[Any]:
        """The result, or the exception, of each rank."""

        def guarded(engine: ThreadEngine) -> Any:
            try:
                return job(engine)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                return error

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(guarded, self.engines))

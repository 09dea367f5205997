from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def job() -> Iterator[None]:
    """A job of one process; engines are made and closed inside it."""
    from megamask.engine.backend import destroy_process_group, init_process_group, select_backend

    init_process_group(select_backend())
    yield
    destroy_process_group()


@pytest.fixture
def build(job: None) -> Iterator[Any]:
    """Makes engines, one at a time; making the next one closes the one before."""
    from support.engine_cases import make_engine

    open_engines: list[Any] = []

    def build(*args: Any, **kwargs: Any) -> Any:
        while open_engines:
            open_engines.pop().close()
        open_engines.append(make_engine(*args, **kwargs))
        return open_engines[-1]

    yield build
    while open_engines:
        open_engines.pop().close()

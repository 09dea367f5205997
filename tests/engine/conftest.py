from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def job() -> Iterator[None]:
    """A job of one process. Engines of one layout share its groups: gloo never frees the threads of a group."""
    from megamask.engine.backend import destroy_process_group, init_process_group, select_backend

    init_process_group(select_backend())
    yield
    destroy_process_group()


@pytest.fixture
def build(job: None) -> Any:
    """Makes engines on one process."""
    from support.engine_cases import make_engine

    return make_engine

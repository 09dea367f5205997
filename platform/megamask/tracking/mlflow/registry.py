"""Registered model of a run: one version for each commit, in order, with the alias `best`.

MLflow reserves the alias `latest`: `models:/NAME/latest` is the version registered last, `models:/NAME@best` the one
with the lowest bound. A version has COMMIT.json and no weights, as the logged model that it belongs to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from megamask.tracking.mlflow.entries import CHECKPOINT_TAG, NOTE_TAG

# Answers of a registry that is there and may answer otherwise next time; all others are refusals.
_PASSING = frozenset(
    {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
)
_ALREADY_THERE = "RESOURCE_ALREADY_EXISTS"
_MISSING = "RESOURCE_DOES_NOT_EXIST"
_log = logging.getLogger(__name__)


def registered_name(run_name: str, run_id: str) -> str:
    """Return the name of a run's registered model; unique, because runs of two folders may share a name."""
    return f"{run_name.replace('.', '-')}-{run_id[:8]}"


class Registry:
    """The registered model of one run. A registry that refuses (no permission, none there) is left alone.

    Args:
        client: MLflow's.
        name: of the registered model.
        run_id: MLflow's.
        is_served: whether a server stores the entries; it looks a logged model up by itself.
    """

    def __init__(self, client: Any, name: str, run_id: str, *, is_served: bool) -> None:
        self.name = name
        self._client = client
        self._run_id = run_id
        self._is_served = is_served
        self._versions: dict[str, str] | None = None
        self._has_refused = False

    def register(self, checkpoint: str, model: Any, tags: Mapping[str, str]) -> None:
        """Make a commit a version, once, however often it is sent."""
        self._unless_refused(lambda: self._register(checkpoint, model, tags))

    def set_best(self, checkpoint: str) -> None:
        """Point the alias `best` at a commit's version."""
        self._unless_refused(lambda: self._set_best(checkpoint))

    def mark(self, checkpoint: str, tags: Mapping[str, str]) -> None:
        """Set tags and description of a commit's version, if it has one."""
        self._unless_refused(lambda: self._mark(checkpoint, tags))

    def _register(self, checkpoint: str, model: Any, tags: Mapping[str, str]) -> None:
        if checkpoint in self._known():
            return
        version = self._client.create_model_version(
            self.name,
            # a client on a database would look the logged model up in the store that is global to its process
            source=f"models:/{model.model_id}" if self._is_served else model.artifact_location,
            run_id=self._run_id,
            tags={key: value for key, value in tags.items() if key != NOTE_TAG},
            description=tags.get(NOTE_TAG),
            await_creation_for=0,
            model_id=model.model_id,
        )
        self._known()[checkpoint] = str(version.version)

    def _set_best(self, checkpoint: str) -> None:
        if (version := self._known().get(checkpoint)) is not None:
            self._client.set_registered_model_alias(self.name, "best", version)

    def _mark(self, checkpoint: str, tags: Mapping[str, str]) -> None:
        if (version := self._known().get(checkpoint)) is None:
            return
        for key, value in tags.items():
            if key == NOTE_TAG:
                self._client.update_model_version(self.name, version, value)
            else:
                self._client.set_model_version_tag(self.name, version, key, value)

    def _known(self) -> dict[str, str]:
        """This run's versions by commit; of doubles, which a late answer may have made, the first one stays."""
        if self._versions is None:
            self._make()
            versions: dict[str, str] = {}
            for found in sorted(self._list(), key=lambda version: int(version.version)):
                checkpoint = found.tags.get(CHECKPOINT_TAG) if found.run_id == self._run_id else None
                if checkpoint in versions:
                    self._client.delete_model_version(self.name, str(found.version))
                elif checkpoint is not None:
                    versions[checkpoint] = str(found.version)
            self._versions = versions
        return self._versions

    def _make(self) -> None:
        try:
            self._client.get_registered_model(self.name)
        except Exception as error:
            if _code_of(error) != _MISSING:
                raise
            try:
                self._client.create_registered_model(self.name)
            except Exception as refusal:
                if _code_of(refusal) != _ALREADY_THERE:
                    raise

    def _list(self) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self._client.search_model_versions(f"name = '{self.name}'", page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _unless_refused(self, action: Callable[[], None]) -> None:
        if self._has_refused:
            return
        try:
            action()
        except Exception as error:
            if (code := _code_of(error)) is None or code in _PASSING:
                raise
            self._has_refused = True
            _log.warning("MLflow's model registry refuses %s (%s): checkpoints are not registered", self.name, code)


def _code_of(error: Exception) -> str | None:
    """MLflow's word for an error; None for those of others."""
    code = getattr(error, "error_code", None)
    return code if isinstance(code, str) else None

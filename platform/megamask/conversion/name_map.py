"""Map from each canonical tensor of a network to the published tensor that contains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from megamask.conversion.hub_folder import HubFolder
from megamask.errors import DataIntegrityError
from megamask.models.families.base import Family
from megamask.models.families.published import PublishedTensor, published_tensors
from megamask.models.shapes import EMBEDDING_NAME, HEAD_NAME, canonical_shapes
from megamask.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class NameMap:
    """The tensors of one network in one family's layout.

    Args:
        has_merged_experts: a layer's experts are one tensor a projection.
    """

    family: Family
    spec: ModelSpec
    has_merged_experts: bool = False

    @classmethod
    def of_folder(cls, folder: HubFolder, family: Family) -> NameMap:
        """Read a folder's config, and from its names whether experts are merged; then check the names.

        Raises:
            UsageError: the family does not fit the config. DataIntegrityError: the tensors are of another network.
        """
        spec = family.spec(folder.config)
        merged = cls(family=family, spec=spec, has_merged_experts=True)
        is_merged = any(
            tensor.how == "stack" and tensor.name in folder.tensor_names for tensor in merged.published.values()
        )
        names = merged if is_merged else cls(family=family, spec=spec)
        names.check(folder)
        return names

    @cached_property
    def published(self) -> Mapping[str, PublishedTensor]:
        """Published name -> tensor, in the network's order."""
        return published_tensors(self.family, self.spec, has_merged_experts=self.has_merged_experts)

    @cached_property
    def _places(self) -> Mapping[str, tuple[PublishedTensor, int]]:
        """Canonical name -> the published tensor that holds it, and its number among the parts."""
        return {
            name: (tensor, number)
            for tensor in self.published.values()
            for number, (name, _) in enumerate(tensor.parts)
        }

    def hub_shapes(self) -> dict[str, tuple[int, ...]]:
        """Published name -> shape, in the network's order."""
        return {name: tensor.shape for name, tensor in self.published.items()}

    @property
    def tied_head(self) -> str | None:
        """Name under which some files repeat the embedding of a network whose embeddings are tied."""
        return self.family.hub_name(HEAD_NAME) if self.spec.tie_embeddings else None

    def rectangle(self, folder: HubFolder, canonical: str, index: tuple[slice, ...]) -> torch.Tensor:
        """A part of a canonical tensor, as stored; of a published one that holds several, only its bytes are read.

        Raises:
            DataIntegrityError: as `HubFolder.rectangle`.
        """
        tensor, number = self._places[canonical]
        if tensor.how == "stack":
            return folder.rectangle(tensor.name, tensor.shape, (slice(number, number + 1), *index)).squeeze(0)
        first = sum(shape[0] for _, shape in tensor.parts[:number])
        rows = slice(first + index[0].start, first + index[0].stop)
        return folder.rectangle(tensor.name, tensor.shape, (rows, *index[1:]))

    def tensor(self, folder: HubFolder, canonical: str) -> torch.Tensor:
        """A complete canonical tensor, as stored. Raises as `rectangle`."""
        shape = canonical_shapes(self.spec)[canonical]
        return self.rectangle(folder, canonical, tuple(slice(0, size) for size in shape))

    def check(self, folder: HubFolder) -> None:
        """Refuse a folder whose tensors are not exactly those of the network.

        A stored head of a tied network must equal the embedding: otherwise the flag in config.json is wrong, and
        dropping the head would change the model.

        Raises:
            DataIntegrityError: names the tensors.
        """
        shapes = self.hub_shapes()
        head = self.tied_head
        folder.check_names(shapes, () if head is None else (head,))
        if head is not None and head in folder.tensor_names:
            embedding = self.family.hub_name(EMBEDDING_NAME)
            shape = shapes[embedding]
            if not torch.equal(folder.tensor(head, shape), folder.tensor(embedding, shape)):
                raise DataIntegrityError(
                    f"{folder.path}: config.json ties {head} to {embedding}, but the two stored tensors differ. "
                    "Nothing was converted.",
                    hint=f"set {self.family.keys.tie_embeddings} to false in config.json if the head is its own",
                )

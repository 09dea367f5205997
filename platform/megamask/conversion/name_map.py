"""Map from each canonical tensor of a network to the published tensor that contains it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamask.conversion.hub_folder import HubFolder
from megamask.errors import DataIntegrityError
from megamask.models.families.base import Family
from megamask.models.shapes import canonical_shapes
from megamask.models.spec import ModelSpec

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class NameMap:
    """The tensors of one network in one family's layout."""

    family: Family
    spec: ModelSpec

    def hub_shapes(self) -> dict[str, tuple[int, ...]]:
        """Published name -> shape, in the network's order."""
        return {self.family.hub_name(name): shape for name, shape in canonical_shapes(self.spec).items()}

    def canonical_names(self) -> dict[str, str]:
        """Published name -> canonical name."""
        return {self.family.hub_name(name): name for name in canonical_shapes(self.spec)}

    @property
    def tied_head(self) -> str | None:
        """Name under which some files repeat the embedding of a network whose embeddings are tied."""
        return self.family.hub_name(_HEAD) if self.spec.tie_embeddings else None

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
            embedding = self.family.hub_name(_EMBEDDING)
            shape = shapes[embedding]
            if not torch.equal(folder.tensor(head, shape), folder.tensor(embedding, shape)):
                raise DataIntegrityError(
                    f"{folder.path}: config.json ties {head} to {embedding}, but the two stored tensors differ. "
                    "Nothing was converted.",
                    hint=f"set {self.family.keys.tie_embeddings} to false in config.json if the head is its own",
                )

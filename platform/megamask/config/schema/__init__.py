"""The schema: one frozen, keyword-only dataclass per room."""

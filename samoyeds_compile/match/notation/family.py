"""What the families that match by meaning share: the grouped products that the user named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from samoyeds_compile.match.notation.products import GroupedOp
from samoyeds_compile.match.region import Family

if TYPE_CHECKING:
    from samoyeds_compile.options import Options


class NotationFamily(Family):
    """A family that reads blocks in index notation; ``grouped`` describes opaque grouped products by name."""

    def __init__(self, grouped: Mapping[str, GroupedOp] | None = None) -> None:
        self.grouped = grouped or {}

    def configured(self, options: Options) -> Family:
        """With the grouped products that the user named."""
        return type(self)({name: GroupedOp(roles) for name, roles in options.grouped_mm.items()})

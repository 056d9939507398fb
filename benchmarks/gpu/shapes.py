"""Blocks of published models, and for how many tokens they are measured."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = (8, 256, 4096, 64, 1, 1024, 16384)
"""In the order in which they are measured: if time runs out, the first ones are there for every shape."""
SWIGLU = "silu(gate) * up"


@dataclass(frozen=True)
class Shape:
    """Experts of one layer.

    Attributes:
        name: of the model.
        experts, top_k: E and K.
        hidden, width: H and I.
        layers: with experts, in the whole model.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    width: int
    layers: int

    @property
    def elements(self) -> int:
        """Weights of one expert: gate, up, down."""
        return 3 * self.hidden * self.width


SHAPES = (
    Shape("mixtral-8x7b", 8, 2, 4096, 14336, 32),
    Shape("qwen3-30b-a3b", 128, 8, 2048, 768, 48),
    Shape("deepseek-v2-lite", 64, 6, 2048, 1408, 26),
    Shape("mixtral-8x22b", 8, 2, 6144, 16384, 56),
    Shape("deepseek-v3", 256, 8, 7168, 2048, 58),
)
SMALL = (Shape("small", 4, 2, 64, 32, 2), Shape("ragged", 3, 1, 96, 48, 2))
"""For a dry run, on a machine without a GPU."""

"""The study of one model (one seed): all rows of the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from benchmarks.quality.oneshot import masked, peer_masks, pruned, reconstructed
from benchmarks.quality.peers import Peer, Unstructured, Venom
from benchmarks.quality.recover import recovered_dense, recovered_peer
from examples.small_lm.model import perplexity
from examples.small_lm.recover import recovered
from samoyeds_compile import SparsityConfig

PLAIN = SparsityConfig(1, 1, 32)
SAMOYEDS = SparsityConfig(1, 2, 32)
PATTERNS = (PLAIN, *(SparsityConfig(1, 2, v, group=g) for v in (16, 32, 128) for g in (1, 16, 64)))
METHODS = ("magnitude", "wanda", "router_wanda", "second_order")
PEERS: tuple[Peer, ...] = (Unstructured(0.5), Unstructured(0.25), Venom(16), Venom(64))
DEFAULT = "router_wanda"
RECONSTRUCT = 300
"""Steps for each layer."""
PLATEAU = "at a plateau"

Arm = tuple[dict[str, Any], Callable[[], nn.Module]]
"""What a row is about, and how to make its model."""


@dataclass
class Study:
    """One trained model and the text around it.

    Attributes:
        model: trained, dense, eval.
        unseen: held-out windows [N, S].
        calibration: windows of training text, in batches.
        batches: what is read in training that recovers.
        wide: more windows of training text than ``calibration``, for reconstruction.
    """

    model: nn.Module
    unseen: Tensor
    calibration: list[Tensor]
    batches: list[Tensor]
    wide: list[Tensor]

    def rows(self, done: set[str]) -> Iterator[dict[str, Any]]:
        """One measured model after the other; names in ``done`` are skipped."""
        return self._measured((*self._oneshot(), *self._reconstructed(), *self._recovered()), done)

    def rows_at_plateau(self, done: set[str]) -> Iterator[dict[str, Any]]:
        """The same of a model that more training does not improve: what recovery is worth by itself."""
        return self._measured(self._at_plateau(), done)

    def _measured(self, arms: Iterable[Arm], done: set[str]) -> Iterator[dict[str, Any]]:
        for facts, make in arms:
            name = "|".join(str(value) for value in facts.values())
            if name not in done:
                start = time.time()
                found = perplexity(make(), self.unseen)
                yield {"name": name, **facts, "perplexity": round(found, 4), "seconds": round(time.time() - start, 1)}

    def _oneshot(self) -> Iterator[Arm]:
        yield _facts("one-shot", "dense", "none"), lambda: self.model
        for config in PATTERNS:
            for method in METHODS:
                for permute in (False, True):
                    yield (
                        _facts("one-shot", config, method, permute),
                        lambda c=config, m=method, p=permute: pruned(self.model, c, m, self.calibration, p),
                    )
        for config in (PLAIN, SAMOYEDS):
            yield (
                _facts("one-shot", config, f"{DEFAULT}, refined"),
                lambda c=config: pruned(self.model, c, DEFAULT, self.calibration, False, refine=True),
            )
        for peer in PEERS:
            for method in ("magnitude", DEFAULT):
                yield (
                    _facts("one-shot", peer, method),
                    lambda q=peer, m=method: masked(self.model, self._peer_masks(q, m)),
                )

    def _reconstructed(self) -> Iterator[Arm]:
        group = SparsityConfig(1, 2, 32, group=16)
        arms = ((PLAIN, DEFAULT), (PLAIN, "second_order"), (SAMOYEDS, DEFAULT), (SAMOYEDS, "second_order"))
        for config, method in (*arms, (group, "second_order")):
            yield (
                _facts("reconstructed", config, method, permute=True),
                lambda c=config, m=method: pruned(self.model, c, m, self.wide, True, reconstruct=RECONSTRUCT),
            )
        for peer in (Unstructured(0.5), Unstructured(0.25), Venom(64)):
            yield (
                _facts("reconstructed", peer, DEFAULT),
                lambda q=peer: reconstructed(self.model, self._peer_masks(q, DEFAULT), self.wide, RECONSTRUCT),
            )

    def _recovered(self) -> Iterator[Arm]:
        yield _facts("recovered", "dense", "none"), lambda: recovered_dense(self.model, self.batches)
        arms: tuple[tuple[SparsityConfig, str, dict[str, Any]], ...] = (
            (PLAIN, DEFAULT, {}),
            (SAMOYEDS, DEFAULT, {}),
            (SAMOYEDS, "second_order", {"permute": True, "distill": True}),
            (SAMOYEDS, "magnitude", {}),
            (SAMOYEDS, "second_order", {"permute": True}),
            (SAMOYEDS, DEFAULT, {"training": "sr_ste"}),
            (SparsityConfig(1, 2, 32, group=16), "second_order", {"permute": True}),
        )
        for config, method, how in arms:
            yield (
                _facts("recovered", config, method, **how),
                lambda c=config, m=method, h=how: recovered(self.model, c, m, self.calibration, self.batches, **h),
            )
        for peer in (Venom(64), Unstructured(0.25)):
            yield (
                _facts("recovered", peer, DEFAULT),
                lambda q=peer: recovered_peer(self.model, self._peer_masks(q, DEFAULT), self.batches),
            )

    def _at_plateau(self) -> Iterator[Arm]:
        yield _facts(PLATEAU, "dense at the start", "none"), lambda: self.model
        yield _facts(PLATEAU, "dense", "none"), lambda: recovered_dense(self.model, self.batches)
        arms: tuple[tuple[str, dict[str, Any]], ...] = (
            ("second_order", {"permute": True, "distill": True}),
            (DEFAULT, {}),
            ("magnitude", {}),
        )
        for method, how in arms:
            yield (
                _facts(PLATEAU, SAMOYEDS, method, **how),
                lambda m=method, h=how: recovered(self.model, SAMOYEDS, m, self.calibration, self.batches, **h),
            )
        for peer in (Venom(64), Unstructured(0.25)):
            yield (
                _facts(PLATEAU, peer, DEFAULT),
                lambda q=peer: recovered_peer(self.model, self._peer_masks(q, DEFAULT), self.batches),
            )

    def _peer_masks(self, peer: Peer, method: str) -> dict[str, Tensor]:
        return peer_masks(self.model, peer, method, self.calibration)


def _facts(
    when: str, pattern: object, method: str, permute: bool = False, training: str = "fixed", distill: bool = False
) -> dict[str, Any]:
    return {
        "when": when, "pattern": str(pattern), "method": method, "permute": permute,
        "training": training if when in ("recovered", PLATEAU) else "", "distill": distill,
    }  # fmt: skip

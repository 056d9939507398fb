"""Experts described by the names of their weights: what the op needs to stand in for a hand-written method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from samoyeds_codegen import expr
from samoyeds_compile.errors import IntegrationError
from samoyeds_compile.integrations.experts import run_experts
from samoyeds_compile.integrations.family import routing
from samoyeds_compile.integrations.trial import disagreement


@dataclass(frozen=True)
class Description:
    """Names of weights and biases, as dotted paths from a module; see `decorator.moe_experts`."""

    down: str
    activation: str
    gate_up: str | None = None
    gate: str | None = None
    up: str | None = None
    gate_up_bias: str | None = None
    gate_bias: str | None = None
    up_bias: str | None = None
    down_bias: str | None = None
    interleaved: bool = False
    transposed: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Description:
        """A description out of keyword arguments.

        Raises:
            IntegrationError: an argument is unknown, missing or does not go with the others.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(given) - known)
        _require(not unknown, f"does not know {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
        _require("down" in given and "activation" in given, "needs both down and activation")
        described = cls(**given)
        one = (described.gate_up is None) != (described.up is None)
        _require(one, "needs the first projection: either gate_up, or up (with gate, if there is one)")
        _require(described.gate is None or described.up is not None, "got a gate without up; name both, or gate_up")
        offered = set(expr.GATED_NAMES) if described.gate_up or described.gate else {expr.PLAIN_NAME}
        read = expr.names(described.activation)
        _require(read <= offered, f"has an activation over {sorted(read)}; these weights offer {sorted(offered)}")
        return described

    def run(self, module: nn.Module, x_TH: Tensor, expert_ids_TK: Tensor, expert_weights_TK: Tensor) -> Tensor:
        """[T, H]: what the described method computes."""
        return run_experts(
            x_TH, expert_ids_TK, expert_weights_TK,
            gate=_weights(module, self.gate), up=_weights(module, self.gate_up or self.up),
            down=_weights(module, self.down),
            gate_bias_E=_bias(module, self.gate_bias), up_bias_E=_bias(module, self.gate_up_bias or self.up_bias),
            down_bias_E=_bias(module, self.down_bias),
            activation=self.activation, gate_up_layout=self._layout(),
            weight_layout="in_out" if self.transposed else "out_in",
        )  # fmt: skip

    def problem(self, module: nn.Module, function: Any) -> str | None:
        """Why the description does not fit a method, found by trying both on made-up weights; None if it does."""
        up = _weights(module, self.gate_up or self.up)
        experts = up[0].shape[0] if up[0].dim() == 3 else len(up)
        generator = torch.Generator().manual_seed(0)
        hidden = up[0].shape[-2 if self.transposed else -1]
        x_TH = torch.randn(6, hidden, generator=generator).to(up[0].detach())
        args = (x_TH, *routing(x_TH, experts, generator))
        made_up = {name: _like(p, generator) for name, p in module.named_parameters()}
        with torch.nn.utils.stateless._reparametrize_module(module, made_up):
            return disagreement(function, self.run, (module, *args), x_TH.device)

    def _layout(self) -> str:
        if self.gate_up is not None:
            return "interleaved" if self.interleaved else "concatenated"
        return "separate" if self.gate is not None else "none"


def _like(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of a size that keeps activations away from their linear part."""
    made_up: Tensor = torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1:], default=1) ** 0.5
    return made_up.to(parameter.detach())


def _weights(module: nn.Module, path: str | None) -> list[Tensor]:
    return [] if path is None else _find(module, path.split("."), path)


def _bias(module: nn.Module, path: str | None) -> Tensor | None:
    found = _weights(module, path)
    return None if not found else found[0] if found[0].dim() == 2 else torch.stack(found)


def _find(holder: Any, parts: list[str], path: str) -> list[Tensor]:
    """The tensors at a path; several if it holds a ``*``."""
    if not parts:
        return [holder]
    if parts[0] == "*":
        members: Iterable[Any] = holder.values() if isinstance(holder, nn.ModuleDict) else holder
        return [tensor for member in members for tensor in _find(member, parts[1:], path)]
    _require(hasattr(holder, parts[0]), f"names {path!r}, but {type(holder).__name__} has no {parts[0]!r}")
    return _find(getattr(holder, parts[0]), parts[1:], path)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise IntegrationError(f"moe_experts: the description {problem}")

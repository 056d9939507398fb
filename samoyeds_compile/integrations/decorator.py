"""`moe_experts`: for hand-written experts that Dynamo cannot trace.

``if mask.any()``, ``for e in ids.unique()``, ``experts[i.item()]`` and the like end Dynamo's graph. The decorator goes
on the function, or the method, that runs the experts. Outside compiled code the function runs as it is written. While
Dynamo traces, one of two things stands in for it:

- described, ``@moe_experts(gate_up="w13", down="w2", activation="silu(gate) * up")``: ``samoyeds::moe_experts``;
- bare, ``@moe_experts``: a leaf. The graph stays whole and the numbers are those of the function, which runs as it is
  written. A leaf is *not* made faster, and in training it runs once more in the backward.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn

from samoyeds_compile.integrations.described import Description
from samoyeds_compile.integrations.leaf import TENSOR, Function, Leaves

logger = logging.getLogger(__name__)


@overload
def moe_experts(function: Function, /) -> Function: ...


@overload
def moe_experts(
    *,
    down: str,
    activation: str,
    gate_up: str | None = None,
    gate: str | None = None,
    up: str | None = None,
    gate_up_bias: str | None = None,
    gate_bias: str | None = None,
    up_bias: str | None = None,
    down_bias: str | None = None,
    interleaved: bool = False,
    transposed: bool = False,
) -> Callable[[Function], Function]: ...


def moe_experts(function: Function | None = None, /, **description: Any) -> Any:
    """Keep experts that Dynamo cannot trace from breaking the graph; described, rewrite them.

    The function takes ``hidden_states`` [T, H], ``expert_ids`` [T, K] and ``expert_weights`` [T, K] and returns [T, H]
    in the dtype of ``hidden_states``. A method's ``self`` is a module. A leaf may take more tensors and constants after
    these; a constant is compiled in, as Dynamo does it. A leaf must not write to its arguments.

    A description holds for a method only. Names are dotted paths from ``self``; in a path, ``*`` stands for all members
    of a list, so ``"experts.*.w1.weight"`` names the matrices of experts that are modules of their own. Before its
    first use with a module the description is tried against the function, on made-up weights; if the results differ (as
    they do with active dropout), a warning says so and the function becomes a leaf.

    Args:
        function: what to decorate, without a description.
        **description: with a description:
            gate_up: stack [E, 2I, H] of gate and up, or
            gate, up: stacks [E, I, H]; ``up`` alone for experts without a gate.
            down: stack [E, H, I].
            activation: expression over ``gate`` and ``up``, or over ``x`` without a gate: ``"silu(gate) * up"``.
            gate_up_bias, gate_bias, up_bias, down_bias: [E, width] each.
            interleaved: gate and up alternate in ``gate_up`` instead of following each other.
            transposed: all weights are [E, in, out].

    Raises:
        IntegrationError: the description is incomplete or contradicts itself. While compiling: it names what the module
            does not have. While running: a leaf returned something else than it must, wrote to an argument, or reads
            a tensor with a gradient that is neither an argument nor a parameter of its module.
    """
    if function is not None:
        return _as_leaf(function)
    described = Description.of(description)
    return functools.partial(_as_described, described)


def _as_leaf(function: Function) -> Function:
    return _standing_in(function, _leaf_call(function))


def _as_described(described: Description, function: Function) -> Function:
    call_leaf = _leaf_call(function)

    @torch.compiler.assume_constant_result
    def fits(module: int, training: bool) -> bool:
        problem = described.problem(_object(module), function)
        if problem is not None:
            name = function.__qualname__
            logger.warning("moe_experts: the description of %s does not fit: %s; it runs as a leaf", name, problem)
        return problem is None

    def call(module: nn.Module, *args: Any) -> Tensor:
        if fits(id(module), module.training):  # whose reading makes the answer hold for this mode only
            return described.run(module, *args)
        return call_leaf(module, *args)

    return _standing_in(function, call)


def _standing_in(function: Function, call: Function) -> Function:
    """``function``, but ``call`` while Dynamo traces."""
    order = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        return call(*args, *[kwargs[name] for name in order[len(args) :] if name in kwargs])

    return run


def _leaf_call(function: Function) -> Function:
    """The leaf of a function, as Dynamo traces it."""
    leaves = Leaves(function)

    @torch.compiler.assume_constant_result
    def number(of: int, module: int, *arguments: Any) -> int:
        return leaves.number(_object(module), arguments)

    def call(*args: Any) -> Tensor:
        module = args[0] if isinstance(args[0], nn.Module) else None
        given = args if module is None else args[1:]
        tensors = [arg for arg in given if isinstance(arg, Tensor)]
        found = number(id(leaves), id(module), *[TENSOR if isinstance(arg, Tensor) else arg for arg in given])
        parameters = [] if module is None else [parameter for _, parameter in module.named_parameters()]
        kind = tensors[0].device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        trains = torch.is_grad_enabled()
        leaf = torch.ops.samoyeds.leaf.default
        out: Tensor = leaf(tensors[0], tensors[1:], parameters, found, autocast, trains)[0]
        return out

    return call


def _object(number: int) -> Any:
    """The object with an ``id``, which the caller holds.

    Dynamo guards on an ``id`` that it sees taken, so what is found out about an object is not used for another one. It
    passes no modules to functions whose results it takes as constants before torch 2.12.
    """
    return ctypes.cast(number, ctypes.py_object).value

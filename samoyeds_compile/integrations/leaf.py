"""``samoyeds::leaf``: a function of the user's that no tracing looks into, with gradients.

The graph keeps a number for the function; running the graph runs the function itself, on the module that it belongs to.
Its parameters are operands, so they stay inputs of the graph and receive gradients. The backward runs the function once
more, as activation checkpointing does, from the random state that the forward found.
`torch._dynamo.decorators.leaf_function` has the same purpose, but Inductor does not compile it (torch 2.13).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samoyeds_compile.errors import IntegrationError
from samoyeds_compile.integrations.surroundings import autocast_as, outside_of_kernel, random_states, replaying
from samoyeds_compile.ops.library import define_opaque, register_autograd

Function = Callable[..., Tensor]


Arguments = tuple[Any, ...]
TENSOR = "<tensor>"
"""Stands for a tensor in a leaf's `Arguments`, among the constants."""


class Leaf:
    """A function with its arguments, and the module it is a method of, if it is one.

    Attributes:
        function: what runs.
    """

    def __init__(self, function: Function, module: nn.Module | None, arguments: Arguments) -> None:
        self.function = function
        self._module = None if module is None else weakref.ref(module)  # must not keep the module alive
        self._arguments = arguments

    def run(self, tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """Call the function, with ``parameters`` in the place of the module's own, in their order."""
        given = iter(tensors)
        args = [next(given) if argument == TENSOR else argument for argument in self._arguments]
        module = None if self._module is None else self._module()
        if module is None:
            return self.function(*args)
        names = [name for name, _ in module.named_parameters()]
        with torch.nn.utils.stateless._reparametrize_module(module, dict(zip(names, parameters, strict=True))):
            return self.function(module, *args)


_BY_NUMBER: weakref.WeakValueDictionary[int, Leaf] = weakref.WeakValueDictionary()
"""Compiled code holds numbers and no objects; an entry lives as long as its `Leaves` and its module."""


class Leaves:
    """All leaves of one decorated function: one for each module and each set of constants."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self._plain: dict[Arguments, Leaf] = {}
        self._methods: weakref.WeakKeyDictionary[nn.Module, dict[Arguments, Leaf]] = weakref.WeakKeyDictionary()

    def number(self, module: nn.Module | None, arguments: Arguments) -> int:
        """The number by which compiled code finds a leaf, always the same one for the same module."""
        known = self._plain if module is None else self._methods.setdefault(module, {})
        leaf = known.setdefault(arguments, Leaf(self._function, module, arguments))
        _BY_NUMBER[id(leaf)] = leaf
        return id(leaf)


def leaf(
    x_TH: Tensor,
    others: Sequence[Tensor],
    parameters: Sequence[Tensor],
    number: int,
    autocast: torch.dtype | None,
    trains: bool,
) -> tuple[Tensor, Tensor]:
    """Run a leaf.

    Args:
        x_TH: the function's first argument, the hidden states.
        others: its other arguments that are tensors.
        parameters: the parameters of its module.
        number: what `number_of` gave.
        autocast: the dtype of autocast around the call, None if it is off.
        trains: whether the random state is needed again.

    Returns:
        The function's result, [T, H], and the random state before it ran (empty unless ``trains``).

    Raises:
        IntegrationError: the result is not like the hidden states in shape and dtype.
    """
    tensors, device = [x_TH, *others], x_TH.device
    state = torch.cat(random_states(device)) if trains else torch.empty(0, dtype=torch.uint8)
    versions = [t._version for t in tensors]
    called = _called(number)
    with outside_of_kernel(grad=False), autocast_as(device, autocast):
        out = called.run(tensors, parameters)
    _check(out, x_TH, called.function)
    if [t._version for t in tensors] != versions:
        raise IntegrationError(f"{_name(number)} writes to its arguments; a leaf must not: write out of place")
    fresh = torch.empty(out.shape, dtype=out.dtype, device=out.device)  # no alias of an operand, dense
    return fresh.copy_(out), state


def _leaf_fake(
    x_TH: Tensor,
    others: Sequence[Tensor],
    parameters: Sequence[Tensor],
    number: int,
    autocast: torch.dtype | None,
    trains: bool,
) -> tuple[Tensor, Tensor]:
    size = sum(state.numel() for state in random_states(x_TH.device)) if trains else 0
    return x_TH.new_empty(x_TH.shape), torch.empty(size, dtype=torch.uint8, device="cpu")


def leaf_backward(
    grad_TH: Tensor,
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor],
    state: Tensor,
    number: int,
    autocast: torch.dtype | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of ``tensors`` and ``parameters`` that are ``needed``, in that order."""
    operands = [t.detach().requires_grad_(need) for t, need in zip([*tensors, *parameters], needed, strict=True)]
    wanted = [t for t in operands if t.requires_grad]
    device = tensors[0].device
    with outside_of_kernel(grad=True), replaying(device, state), autocast_as(device, autocast):
        out = _called(number).run(operands[: len(tensors)], operands[len(tensors) :])
    _check_no_other_source(out, wanted, number)
    with outside_of_kernel(grad=True):
        grads = (
            torch.autograd.grad(out, wanted, grad_TH, allow_unused=True) if out.requires_grad else [None] * len(wanted)
        )
    return [_dense_like(t, grad) for t, grad in zip(wanted, grads, strict=True)]


def _leaf_backward_fake(
    grad_TH: Tensor,
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor],
    state: Tensor,
    number: int,
    autocast: torch.dtype | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    return [torch.empty_like(t) for t, need in zip([*tensors, *parameters], needed, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TH, others, parameters, ctx.number, ctx.autocast, _ = inputs
    ctx.count = 1 + len(others)
    ctx.save_for_backward(x_TH, *others, *parameters, output[1])


def _backward(ctx: Any, grad_TH: Tensor, grad_state: Any) -> tuple[Any, ...]:
    *operands, state = ctx.saved_tensors
    needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1], *ctx.needs_input_grad[2]]
    tensors, parameters = operands[: ctx.count], operands[ctx.count :]
    found = iter(
        torch.ops.samoyeds.leaf_backward(grad_TH, tensors, parameters, state, ctx.number, ctx.autocast, needed)
    )
    grads = [next(found) if need else None for need in needed]
    return grads[0], grads[1 : ctx.count], grads[ctx.count :], None, None, None


def _check(out: Any, x_TH: Tensor, function: Function) -> None:
    fits = isinstance(out, Tensor) and out.shape == x_TH.shape and out.dtype == x_TH.dtype
    if not fits:
        got = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        raise IntegrationError(
            f"{function.__qualname__} returned {got}; return one tensor like the hidden states, "
            f"{tuple(x_TH.shape)} {x_TH.dtype}"
        )


def _check_no_other_source(out: Tensor, wanted: Sequence[Tensor], number: int) -> None:
    """A tensor that is neither argument nor parameter would silently stay without its gradient."""
    own, seen, stack = {id(t) for t in wanted}, set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own:
            raise IntegrationError(
                f"{_name(number)} reads a tensor of shape {tuple(variable.shape)} that requires a gradient and is "
                "neither an argument nor a parameter of its module; pass it as an argument"
            )
        stack += [source for source, _ in node.next_functions]


def _called(number: int) -> Leaf:
    found = _BY_NUMBER.get(number)
    if found is None:
        raise IntegrationError(
            f"samoyeds::leaf: number {number} stands for no function of this process; such a graph runs only where it "
            "was captured, while its module lives"
        )
    return found


def _name(number: int) -> str:
    return _called(number).function.__qualname__


def _dense_like(tensor: Tensor, grad: Tensor | None) -> Tensor:
    """A gradient of its own, laid out as tracing was told."""
    like = torch.empty_like(tensor)
    return like.zero_() if grad is None else like.copy_(grad)


_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)  # it may draw numbers, and read the device
define_opaque(
    "leaf(Tensor x, Tensor[] others, Tensor[] parameters, int number, ScalarType? autocast, bool trains) "
    "-> (Tensor, Tensor)",
    leaf, _leaf_fake, _TAGS,
)  # fmt: skip
define_opaque(
    "leaf_backward(Tensor grad, Tensor[] tensors, Tensor[] parameters, Tensor state, int number, "
    "ScalarType? autocast, bool[] needed) -> Tensor[]",
    leaf_backward, _leaf_backward_fake, (torch.Tag.cudagraph_unsafe,),
)  # fmt: skip
register_autograd("leaf", _backward, _setup_context)

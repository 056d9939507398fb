"""`PackedTensor`: a weight that behaves like the dense one and is stored packed.

A wrapper subclass: autograd, Dynamo and AOTAutograd see a tensor of the dense shape; ``__torch_dispatch__`` runs the
few ops that weights of experts meet. What it does not know it refuses, as unpacking unasked would take memory back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.layout import StorageLayout
from samoyeds_compile.sparsity.pack import PackedWeight, pack
from samoyeds_compile.sparsity.solver import require_matrix
from samoyeds_compile.sparsity.strips import fits, from_strips, to_strips

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

aten = torch.ops.aten


@dataclass(frozen=True)
class Form:
    """How the canonical storage lies behind the tensor that is seen.

    Attributes:
        config: the pattern.
        rows, cols: of a dense matrix, output and input features.
        flipped: the tensor is [..., cols, rows].
        interleaved: gate and up rows alternate in the tensor; packed are all gate rows, then all up rows.
        flat: the tensor has the matrices of a stack one below the other, [E * ., .].
        strips: inner tensors are not canonical but in strips (`samoyeds_compile.sparsity.strips`).
        raveled: the tensor is seen as one vector, which FSDP keeps beside each of its shards; no op reads it.
    """

    config: SparsityConfig
    rows: int
    cols: int
    flipped: bool = False
    interleaved: bool = False
    flat: bool = False
    strips: bool = False
    raveled: bool = False

    @property
    def layout(self) -> StorageLayout:
        """Where the rows and columns of a matrix lie in the tensor."""
        return StorageLayout(self.flipped, self.interleaved)

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The pattern and order as arguments of ``samoyeds::unpack``."""
        c = self.config
        return c.n, c.m, c.vector, c.inner, c.group, self.rows, self.cols, self.strips


class PackedTensor(Tensor):
    """A sparse weight [rows, cols] or [E, rows, cols], stored as `PackedWeight` says; ``kept`` are its values.

    On a CPU the same bits lie in strips if they fit, which its kernels read faster; checkpoints are always canonical.

    Frozen: it has no gradient of its own, but gradients flow through its products to what it is multiplied with.
    """

    kept: Tensor
    metadata: Tensor | None
    selection: Tensor | None
    form: Form

    @staticmethod
    def __new__(cls, kept: Tensor, metadata: Tensor | None, selection: Tensor | None, form: Form) -> PackedTensor:
        """Wrap storage."""
        size, strides = _size(kept, form)
        # In inference mode too: a view must be a tensor of the same kind as the weight that it is a view of.
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(
                cls, size, strides=strides, dtype=kept.dtype, device=kept.device, requires_grad=False
            )

    def __init__(self, kept: Tensor, metadata: Tensor | None, selection: Tensor | None, form: Form) -> None:
        self.kept, self.metadata, self.selection, self.form = kept, metadata, selection, form

    @classmethod
    def from_dense(
        cls, weight: Tensor, config: SparsityConfig, *, transposed: bool = False, interleaved: bool = False,
        flat: int = 0, name: str = "weight",
    ) -> PackedTensor:  # fmt: skip
        """Pack a weight that has the pattern.

        Args:
            weight: [rows, cols] or [E, rows, cols]; [.., cols, rows] if ``transposed``.
            config: the pattern.
            transposed: stored [in, out].
            interleaved: rows alternate between gate and up, [gate0, up0, gate1, ...]; they are packed apart, so that no
                choice of sub-rows is between a gate row and an up row.
            flat: how many matrices a weight [E * ., .] has one below the other; 0 if it is a matrix or a stack.
            name: what to call it in an error.

        Raises:
            SparsityError: the weight does not have the pattern, or is no matrix or stack.
        """
        require_matrix(weight, name)
        if weight.dim() > 3:
            raise SparsityError(f"{name}: has {weight.dim()} dimensions; pass a matrix or a stack of them")
        packed = pack(StorageLayout(transposed, interleaved, flat).to_rows(weight.detach(), name), config, name)
        form = Form(config, *packed.shape, flipped=transposed, interleaved=interleaved, flat=bool(flat))
        return cls(packed.values, packed.metadata, packed.selection, form).arranged()

    @property
    def packed(self) -> PackedWeight:
        """The canonical storage; a copy if this is in strips."""
        return from_strips(self._stored) if self.form.strips else self._stored

    @property
    def packed_nbytes(self) -> int:
        """Bytes in memory; ``nbytes`` is what the dense tensor would take."""
        return self._stored.nbytes

    @property
    def _stored(self) -> PackedWeight:
        """What there is, in whatever order."""
        shape = (self.form.rows, self.form.cols)
        return PackedWeight(self.kept, self.metadata, self.selection, shape, self.form.config)

    def arranged(self) -> PackedTensor:
        """In the order that kernels of its device read; itself if it is."""
        return self.in_order(self.belongs_in_strips)

    @property
    def belongs_in_strips(self) -> bool:
        """Whether kernels of its device read strips."""
        form = self.form
        return self.device.type == "cpu" and fits(form.rows, form.cols, form.config, self.dtype)

    def in_order(self, strips: bool) -> PackedTensor:
        """In strips, which its sizes must fit, or canonical; itself if it is."""
        if strips == self.form.strips:
            return self
        made = to_strips(self._stored) if strips else self.packed
        return PackedTensor(made.values, made.metadata, made.selection, replace(self.form, strips=strips))

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """The dense weight, as it was given to `from_dense`."""
        return _dense(self)

    def __tensor_flatten__(self) -> tuple[list[str], Form]:
        """Names of the inner tensors, and what is constant."""
        names = ["kept", "metadata", "selection"]
        return [n for n in names if getattr(self, n) is not None], self.form

    def _stable_hash_for_caching(self) -> str:
        """What AOTAutograd's cache needs to know beside the inner tensors."""
        return repr(self.form)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], form: Form, size: Any, stride: Any) -> PackedTensor:
        """Inverse of ``__tensor_flatten__``."""
        return PackedTensor(inner["kept"], inner.get("metadata"), inner.get("selection"), form)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape, pattern, dtype, device; no values."""
        return f"PackedTensor({list(self.shape)}, {self.form.config}, dtype={self.dtype}, device={self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # Where a graph breaks, Dynamo would trace this method as it does the frames of a model, and fail.
    @classmethod
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an op on packed weights.

        Raises:
            SparsityError: the op is not one that packed weights know.
        """
        kwargs = kwargs or {}
        if func in _KEEP:
            return return_and_correct_aliasing(func, args, kwargs, _KEEP[func](*args, **kwargs))
        name = func._schema.name
        if name in _GROUPED:
            found = _GROUPED[name](*args, **kwargs)
            if found is not None:
                return found
        if func in _PRODUCTS or name in _GROUPED or name.startswith("samoyeds::"):
            return func(*_unpacked(args), **_unpacked(kwargs))
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            return func.decompose(*args, **kwargs)  # in inference mode such ops come here before they are taken apart
        raise SparsityError(
            f"PackedTensor: {name} is not known for packed weights; use .to_dense(), or densify_(model)"
        )

    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Form]:
        """What ``fully_shard`` gathers of this rank's experts, in place of dense weights, and what is constant.

        Raises:
            SparsityError: the ranks do not divide the experts.
        """
        if outer_size[0] % mesh.size():
            raise SparsityError(
                f"PackedTensor: {outer_size[0]} experts cannot be shared by {mesh.size()} ranks; "
                "pass fully_shard(..., ignored_params=...) to keep them whole on each"
            )
        weight = _to_copy(self, dtype=mp_policy.param_dtype) if mp_policy.param_dtype else self
        return tuple(_inner(weight)), weight.form

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], form: Form, param_dtype: torch.dtype, *, out: Any = None
    ) -> tuple[PackedTensor, tuple[Tensor, ...]] | None:
        """All experts, packed, over the gathered storage; ``out`` lies over it already."""
        if out is not None:
            return None
        rest = dict(
            zip([n for n in ("metadata", "selection") if getattr(self, n) is not None], gathered[1:], strict=True)
        )
        return PackedTensor(gathered[0], rest.get("metadata"), rest.get("selection"), form), ()

    def with_inner(self, function: Callable[[Tensor], Tensor], form: Form | None = None) -> PackedTensor:
        """A tensor whose inner tensors are a function of this one's."""
        metadata, selection = (None if t is None else function(t) for t in (self.metadata, self.selection))
        return PackedTensor(function(self.kept), metadata, selection, form or self.form)


def _size(kept: Tensor, form: Form) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Size and strides of the tensor that is seen."""
    rows, cols = (form.cols, form.rows) if form.flipped else (form.rows, form.cols)
    if form.flat:
        return (kept.shape[0] * rows, cols), (cols, 1)
    lead = tuple(kept.shape[:-2])
    if form.raveled:
        return (math.prod(lead) * rows * cols,), (1,)
    return (*lead, rows, cols), (*(rows * cols for _ in lead), *((1, rows) if form.flipped else (cols, 1)))


def _dense(weight: PackedTensor) -> Tensor:
    form = weight.form
    dense: Tensor = torch.ops.samoyeds.unpack(weight.kept, weight.metadata, weight.selection, *form.numbers)
    dense = form.layout.to_stored(dense)
    if form.raveled:
        return dense.flatten()
    return dense.flatten(0, 1) if form.flat else dense


def _unpacked(argument: Any) -> Any:
    """Arguments with every packed weight replaced by the dense one."""
    if isinstance(argument, PackedTensor):
        return _dense(argument)
    if isinstance(argument, dict):
        return {key: _unpacked(value) for key, value in argument.items()}
    if isinstance(argument, (tuple, list)):
        return type(argument)(map(_unpacked, argument))
    return argument


# ---------------------------------------------------------------------------------------------- ops that keep it packed


def _same(weight: PackedTensor, *args: Any, **kwargs: Any) -> PackedTensor:
    return weight.with_inner(torch.Tensor.detach)


def _clone(weight: PackedTensor, **kwargs: Any) -> PackedTensor:
    return weight.with_inner(torch.clone)


def _to_copy(weight: PackedTensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> PackedTensor:
    """``.to``: the dtype is that of the values, the device that of everything."""
    device, non_blocking = kwargs.get("device"), kwargs.get("non_blocking", False)
    if dtype is not None and not dtype.is_floating_point:
        raise SparsityError(f"PackedTensor: cannot be {dtype}; pass a floating dtype, or use .to_dense()")
    stays = dtype in (None, weight.dtype) and device in (None, weight.device)
    source = weight if stays else weight.in_order(strips=False)  # strips depend on both
    moved = source.with_inner(lambda t: t.to(device=device, non_blocking=non_blocking, copy=True))
    found = PackedTensor(moved.kept.to(dtype or moved.kept.dtype), moved.metadata, moved.selection, moved.form)
    return found if stays else found.arranged()


def _transpose(weight: PackedTensor, first: int = -2, second: int = -1) -> PackedTensor:
    rank = weight.dim()
    if weight.form.flat or {first % rank, second % rank} != {rank - 2, rank - 1}:
        raise SparsityError("PackedTensor: only matrices, or each of a stack, can be transposed; use .to_dense()")
    return weight.with_inner(torch.Tensor.detach, replace(weight.form, flipped=not weight.form.flipped))


def _permute(weight: PackedTensor, dims: Sequence[int]) -> PackedTensor:
    """``weight.T`` of a matrix, and permutations that only swap the last two dimensions."""
    order = [dim % weight.dim() for dim in dims]
    if order[:-2] != list(range(weight.dim() - 2)):
        raise SparsityError("PackedTensor: only the last two dimensions can be permuted; use .to_dense()")
    return _same(weight) if order == sorted(order) else _transpose(weight)


def _select(weight: PackedTensor, dim: int, index: Any) -> PackedTensor:
    _require_stack(weight, dim)
    return weight.with_inner(lambda t: t.select(0, index))


def _slice(
    weight: PackedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> PackedTensor:
    """``weight[a:b]``: the stack of some experts."""
    _require_stack(weight, dim)
    return weight.with_inner(lambda t: aten.slice.Tensor(t, 0, start, end, step))


def _view(weight: PackedTensor, size: Sequence[int]) -> PackedTensor:
    """A flat weight as a stack, a stack as a flat weight, or either as it is."""
    forms = [weight.form, *([replace(weight.form, flat=not weight.form.flat)] if weight.kept.dim() == 3 else [])]
    forms.append(replace(weight.form, flat=False, raveled=True))
    for form in forms:
        if _fits(size, _size(weight.kept, form)[0]):
            return weight.with_inner(torch.Tensor.detach, form)
    raise SparsityError("PackedTensor: is viewed as matrices of its experts only; use .to_dense()")


def _expand(weight: PackedTensor, size: Sequence[int], **kwargs: Any) -> PackedTensor:
    """To the size that it has, as ``matmul`` does."""
    if len(size) != weight.dim() or any(s not in (-1, w) for s, w in zip(size, weight.shape, strict=True)):
        raise SparsityError(f"PackedTensor: {list(weight.shape)} cannot be repeated as {list(size)}; use .to_dense()")
    return _same(weight)


def _fits(size: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether sizes, one of which may be left open, are these."""
    alike = len(size) == len(whole) and list(size).count(-1) < 2
    return alike and all(s in (-1, w) for s, w in zip(size, whole, strict=True))


def _index(weight: PackedTensor, indices: Sequence[Tensor | None]) -> PackedTensor:
    """``weight[ids]``: a stack of the matrices named."""
    if len(indices) != 1 or indices[0] is None or indices[0].dim() != 1:
        raise SparsityError("PackedTensor: is indexed by one vector of expert ids only; use .to_dense()")
    _require_stack(weight, 0)
    ids = indices[0]
    return weight.with_inner(lambda t: t[ids])


def _require_stack(weight: PackedTensor, dim: int) -> None:
    if weight.dim() != 3 or dim % 3 != 0:
        raise SparsityError("PackedTensor: only experts of a stack can be selected; use .to_dense()")


def _split(weight: PackedTensor, size: int, dim: int = 0) -> list[PackedTensor]:
    """Stacks of some experts each, as ``chunk`` makes them."""
    experts = weight.kept.shape[0]
    return [_slice(weight, dim, first, min(first + size, experts)) for first in range(0, experts, size)]


def _new_zeros(weight: PackedTensor, size: Sequence[int], **kwargs: Any) -> PackedTensor:
    """An empty stack, for experts of the same form to be copied into."""
    alike = (None, False, weight.dtype, weight.device, weight.layout)
    if weight.dim() != 3 or tuple(size[1:]) != tuple(weight.shape[1:]) or any(v not in alike for v in kwargs.values()):
        raise SparsityError("PackedTensor: new ones are stacks of experts of the same form; use .to_dense()")
    return weight.with_inner(lambda t: t.new_zeros((size[0], *t.shape[1:])))


def _as_strided(weight: PackedTensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> PackedTensor:
    """The tensor as it is, of which FSDP asks for exactly that."""
    if tuple(size) != tuple(weight.shape) or tuple(stride) != weight.stride() or offset:
        raise SparsityError("PackedTensor: has no other strides than its own; use .to_dense()")
    return _same(weight)


def _copy(weight: PackedTensor, source: Tensor, non_blocking: bool = False) -> PackedTensor:
    """``load_state_dict``: from packed weights of the same form, or dense ones that have the pattern."""
    if not isinstance(source, PackedTensor):
        form = weight.form
        flat = weight.kept.shape[0] if form.flat else 0
        source = PackedTensor.from_dense(
            source, form.config, transposed=form.flipped, interleaved=form.interleaved, flat=flat
        )
    if replace(source.form, strips=weight.form.strips) != weight.form:
        raise SparsityError(f"PackedTensor: {source.form} cannot be copied into {weight.form}; load the same config")
    in_order = _to_copy(source, dtype=weight.dtype).in_order(weight.form.strips)
    for mine, theirs in zip(_inner(weight), _inner(in_order), strict=True):
        mine.copy_(theirs, non_blocking=non_blocking)
    return weight


def _inner(weight: PackedTensor) -> list[Tensor]:
    return [t for t in (weight.kept, weight.metadata, weight.selection) if t is not None]


_KEEP: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.expand.default: _expand,
    aten.index.Tensor: _index,
    aten.copy_.default: _copy,
    aten.split.Tensor: _split,
    aten.new_zeros.default: _new_zeros,
    aten.as_strided.default: _as_strided,
}
_PRODUCTS = frozenset(
    (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.linear.default, aten.mv.default)
)


# ------------------------------------------------------------------------------------------------ grouped products


def _grouped_mm(x: Tensor, weight: Any, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """``torch._grouped_mm`` of rows with a packed stack [E, in, out]; None where only the dense weight will do."""
    plain = isinstance(weight, PackedTensor) and not isinstance(x, PackedTensor) and bias is None and out_dtype is None
    return _packed_product(x, weight, offs, True) if plain and offs is not None else None


def _expert_linear(x: Tensor, weights: Sequence[Any], offsets: Tensor, in_out: bool) -> Any:
    single = len(weights) == 1 and isinstance(weights[0], PackedTensor) and weights[0].dim() == 3
    return _packed_product(x, weights[0], offsets, in_out) if single else None


def _token_linear(x: Tensor, order: Tensor, slot: Tensor, weights: Sequence[Any], offsets: Tensor, in_out: bool) -> Any:
    return _expert_linear(x[order // max(slot.shape[1], 1)], weights, offsets, in_out)


def _packed_product(x: Tensor, weight: PackedTensor, offsets: Tensor, in_out: bool) -> Tensor | None:
    form = weight.form
    if form.interleaved or x.dim() != 2 or weight.dim() != 3:
        return None
    weight = weight if weight.dtype == x.dtype else _to_copy(weight, dtype=x.dtype)
    by_rows = in_out != form.flipped  # the sum runs over the rows of the canonical matrix
    product: Tensor = torch.ops.samoyeds.packed_grouped_mm(
        x, offsets, by_rows, weight.kept, weight.metadata, weight.selection, *weight.form.numbers
    )
    return product


_GROUPED: dict[str, Callable[..., Any]] = {
    "aten::_grouped_mm": _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm,
    "samoyeds::expert_linear": _expert_linear,
    "samoyeds::token_linear": _token_linear,
}

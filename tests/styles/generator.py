"""MoE blocks put together at random: one module, made of pieces that are chosen independently.

`specs` draws a `Spec`; ``Generated(spec)`` is the block. A piece is a function; `DISPATCHES` says which pieces bring
rows to the experts, `COMBINES` which bring results back, and which of the two fit each other.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.blocks import grouped_mm
from tests.styles.capacity import first_come
from tests.styles.parts import GATED, PLAIN, ROUTERS, Assignment, Block, Expert, Mlp, parameter


@dataclass(frozen=True)
class Spec:
    """One point on every axis.

    Attributes:
        tight: experts have places for about half of the rows; the others are dropped.
    """

    dispatch: str
    combine: str
    activation: str
    bias: bool
    transposed: bool
    packing: str
    storage: str
    router: str
    shared: str
    weight_before: bool
    experts: int
    top_k: int
    hidden: int
    width: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    tight: bool = False


class Generated(Block):
    """The block that a `Spec` describes."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec.hidden, spec.width, spec.experts, spec.top_k, spec.activation, spec.router)
        self.spec, self.weight_before = spec, spec.weight_before
        self.weights = Stacks(spec) if spec.storage == "stacked" else Lists(spec)
        self.shared = Mlp(spec.hidden, spec.width) if spec.shared != "none" else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, ids = self.route(flat)
        base = self.shared(flat) if self.shared is not None and self.spec.shared == "base" else None
        out = DISPATCHES[self.spec.dispatch].run(self, flat, weights, ids, base)
        if self.shared is not None and base is None:
            out = out + self.shared(flat)
        return out.reshape(x.shape)

    def expert(self, e: int) -> Expert:
        return self.weights.expert(e)

    def capacity(self, tokens: int) -> int:
        """Places of an expert."""
        half = -(-tokens * self.top_k // (2 * self.num_experts))
        return max(half if self.spec.tight else tokens, 1)

    def assignments(self, x: Tensor) -> list[Assignment]:
        """Without the rows that find no place: they come token after token or choice after choice."""
        found, tokens = super().assignments(x), x.numel() // self.hidden
        if not self.spec.tight:
            return found
        if not self.spec.combine.startswith("tokens"):
            found = [found[t * self.top_k + k] for k in range(self.top_k) for t in range(tokens)]
        kept = first_come([e for _, e, _ in found], self.num_experts, self.capacity(tokens))
        return [assignment for assignment, keep in zip(found, kept, strict=True) if keep]

    def shared_part(self, x_TH: Tensor) -> Tensor:
        return torch.zeros_like(x_TH) if self.shared is None else self.shared(x_TH)

    def ffn(self, x: Tensor, product: Callable[[Tensor, str], Tensor]) -> Tensor:
        """Up, activation, down; ``product(x, name)`` multiplies by a weight and adds its bias."""
        if self.activation in PLAIN:
            h = PLAIN[self.activation](product(x, "up"))
        elif self.spec.packing == "separate":
            h = GATED[self.activation](product(x, "gate"), product(x, "up"))
        elif self.spec.packing == "concatenated":
            gate, up = product(x, "up").chunk(2, dim=-1)
            h = GATED[self.activation](gate, up)
        else:
            z = product(x, "up")
            h = GATED[self.activation](z[..., ::2], z[..., 1::2])
        return product(h, "down")


# ------------------------------------------------------------------------------------------------- weights


class Stacks(nn.Module):
    """Weights of all experts in one tensor each: [E, out, in], or [E, in, out] if transposed."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        for name, (rows, columns) in sizes_of(spec).items():
            shape = (columns, rows) if spec.transposed else (rows, columns)
            setattr(self, name, parameter(spec.experts, *shape, scale=columns**-0.5))
            setattr(self, f"{name}_bias", parameter(spec.experts, rows, scale=0.3) if spec.bias else None)

    def one(self, e: int, x: Tensor, name: str) -> Tensor:
        weight, bias = getattr(self, name)[e], getattr(self, f"{name}_bias")
        if self.spec.transposed:
            y = x @ weight
            return y if bias is None else y + bias[e]
        return F.linear(x, weight, None if bias is None else bias[e])

    def matrix(self, name: str) -> Tensor:
        """[E, in, out]."""
        return getattr(self, name) if self.spec.transposed else getattr(self, name).transpose(1, 2)

    def bias(self, name: str) -> Tensor | None:
        return getattr(self, f"{name}_bias")

    def expert(self, e: int) -> Expert:
        weights = {name: self.matrix(name)[e].t() for name in sizes_of(self.spec)}
        biases = {name: None if self.bias(name) is None else self.bias(name)[e] for name in weights}
        return unpacked(self.spec, weights, biases)


class Lists(nn.Module):
    """A module an expert, with a linear for each weight."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {name: nn.Linear(columns, rows, bias=spec.bias) for name, (rows, columns) in sizes_of(spec).items()}
            )
            for _ in range(spec.experts)
        )

    def one(self, e: int, x: Tensor, name: str) -> Tensor:
        return self.experts[e][name](x)

    def expert(self, e: int) -> Expert:
        linears = dict(self.experts[e].items())
        return unpacked(self.spec, {n: m.weight for n, m in linears.items()}, {n: m.bias for n, m in linears.items()})


def sizes_of(spec: Spec) -> dict[str, tuple[int, int]]:
    """(out, in) of every weight."""
    up = {"up": (spec.width, spec.hidden)}
    if spec.activation in GATED:
        up = {"gate": up["up"], **up} if spec.packing == "separate" else {"up": (2 * spec.width, spec.hidden)}
    return {**up, "down": (spec.hidden, spec.width)}


def unpacked(spec: Spec, weights: dict[str, Tensor], biases: dict[str, Tensor | None]) -> Expert:
    """Gate and up apart."""
    up, up_bias = weights["up"], biases["up"]
    if spec.activation in PLAIN:
        return Expert(None, up, weights["down"], None, up_bias, biases["down"])
    if spec.packing == "separate":
        return Expert(weights["gate"], up, weights["down"], biases["gate"], up_bias, biases["down"])
    halves = [(None, None) if t is None else halve(t, spec.packing) for t in (up, up_bias)]
    return Expert(halves[0][0], halves[0][1], weights["down"], halves[1][0], halves[1][1], biases["down"])


def halve(packed: Tensor, packing: str) -> tuple[Tensor, Tensor]:
    return packed.chunk(2) if packing == "concatenated" else (packed[::2], packed[1::2])


# ----------------------------------------------------------------------- loops: one expert after another


def rows_of(block: Generated, e: int, ids: Tensor, mask: Tensor | None, how: str) -> tuple[Tensor, Tensor]:
    """Tokens and slots of expert e."""
    if how == "one_hot":
        slot, token = torch.where(mask[e])
        return token, slot
    if how == "nonzero":
        where = (ids == e).nonzero()
        return where[:, 0], where[:, 1]
    return torch.where(ids == e)


def loop(how: str) -> "Run":
    def run(block: Generated, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor | None) -> Tensor:
        mask = F.one_hot(ids, block.num_experts).permute(2, 1, 0) if how == "one_hot" else None
        out = torch.zeros_like(x) if base is None else base
        for e in range(block.num_experts):
            token, slot = rows_of(block, e, ids, mask, how)
            weight = weights[token, slot, None]
            rows = x[token] * weight if block.weight_before else x[token]
            y = block.ffn(rows, lambda r, name, e=e: block.weights.one(e, r, name))
            out = ADD[block.spec.combine](out, token, y if block.weight_before else y * weight)
        return out

    return run


def mask_loop(block: Generated, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor | None) -> Tensor:
    """Boolean masks of the flat ids read repeated tokens and write the slots."""
    rows, flat = x.repeat_interleave(block.top_k, dim=0), ids.view(-1)
    if block.weight_before:
        rows = rows * weights.reshape(-1, 1)
    y = torch.zeros_like(rows)
    for e in range(block.num_experts):
        y[flat == e] = block.ffn(rows[flat == e], lambda r, name, e=e: block.weights.one(e, r, name))
    return from_slots(block, y, weights, base)


def split(block: Generated, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor | None) -> Tensor:
    """Rows sorted by expert, split by counts on the host, concatenated."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    sizes = F.one_hot(flat, block.num_experts).sum(dim=0).tolist()
    parts = sorted_rows(block, x, weights, order).split(sizes)
    results = [block.ffn(part, lambda r, name, e=e: block.weights.one(e, r, name)) for e, part in enumerate(parts)]
    return from_sorted(block, x, torch.cat(results), weights, order, base)


# ----------------------------------------------------------------------------------- stacks: all at once


def grouped(block: Generated, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor | None) -> Tensor:
    """Grouped products of sorted rows."""
    sorted_ids, order = torch.sort(ids.reshape(-1))
    counts = torch.histc(sorted_ids.float(), bins=block.num_experts, min=0, max=block.num_experts - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)

    def product(rows: Tensor, name: str) -> Tensor:
        bias, matrix = block.weights.bias(name), block.weights.matrix(name)
        narrow = matrix.dtype == torch.bfloat16
        y = torch._grouped_mm(rows, matrix, offs=offsets) if narrow else grouped_mm(rows, matrix, offsets)
        return y if bias is None else y + bias[sorted_ids]

    y = block.ffn(sorted_rows(block, x, weights, order), product)
    return from_sorted(block, x, y, weights, order, base)


def gather_bmm(block: Generated, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor | None) -> Tensor:
    """Weights gathered for all T * K slots."""
    flat = ids.reshape(-1)
    rows = x.repeat_interleave(block.top_k, dim=0)

    def product(rows: Tensor, name: str) -> Tensor:
        bias, matrix = block.weights.bias(name), getattr(block.weights, name)
        if block.spec.transposed:
            y = torch.bmm(rows.unsqueeze(1), matrix[flat]).squeeze(1)
        else:
            y = torch.bmm(matrix[flat], rows.unsqueeze(-1)).squeeze(-1)
        return y if bias is None else y + bias[flat]

    if block.weight_before:
        rows = rows * weights.reshape(-1, 1)
    return from_slots(block, block.ffn(rows, product), weights, base)


def gather_einsum(block: Generated, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor | None) -> Tensor:
    """Weights gathered as [T, K, ...], einsums."""
    rows = x[:, None] * weights[..., None] if block.weight_before else x

    def product(rows: Tensor, name: str) -> Tensor:
        bias, matrix = block.weights.bias(name), getattr(block.weights, name)
        left = "ti" if rows.dim() == 2 else "tai"
        y = torch.einsum(f"{left},{'taio' if block.spec.transposed else 'taoi'}->tao", rows, matrix[ids])
        return y if bias is None else y + bias[ids]

    y = block.ffn(rows, product)
    return from_slots(block, y.reshape(-1, x.shape[-1]), weights, base)


def gather_matmul(block: Generated, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor | None) -> Tensor:
    """Weights gathered as [T, K, ...], ``@`` with a column."""
    rows = x[:, None] * weights[..., None] if block.weight_before else x[:, None]

    def product(rows: Tensor, name: str) -> Tensor:
        bias, matrix = block.weights.bias(name), getattr(block.weights, name)[ids]
        matrix = matrix.mT if block.spec.transposed else matrix
        y = (matrix @ rows.unsqueeze(-1)).squeeze(-1)
        return y if bias is None else y + bias[ids]

    return from_slots(block, block.ffn(rows, product).flatten(0, 1), weights, base)


# ------------------------------------------------------------------------------ dense: experts times tokens


def scattered(block: Generated, weights: Tensor, ids: Tensor) -> Tensor:
    """[T, E]."""
    if block.spec.combine == "one_hot":
        return (F.one_hot(ids, block.num_experts).to(weights.dtype) * weights.unsqueeze(-1)).sum(dim=1)
    return torch.zeros(ids.shape[0], block.num_experts, dtype=weights.dtype).scatter(1, ids, weights)


def dense_einsum(block: Generated, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor | None) -> Tensor:
    """Einsums [T, H] -> [T, E, I] -> [T, E, H]."""

    def product(rows: Tensor, name: str) -> Tensor:
        bias, matrix = block.weights.bias(name), getattr(block.weights, name)
        left = "ti" if rows.dim() == 2 else "tei"
        y = torch.einsum(f"{left},{'eio' if block.spec.transposed else 'eoi'}->teo", rows, matrix)
        return y if bias is None else y + bias

    out = torch.einsum("teh,te->th", block.ffn(x, product), scattered(block, weights, ids))
    return out if base is None else base + out


def dense_bmm(block: Generated, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor | None) -> Tensor:
    """Tokens repeated for every expert, ``bmm``, sum over experts."""

    def product(rows: Tensor, name: str) -> Tensor:
        bias, matrix = block.weights.bias(name), block.weights.matrix(name)
        y = torch.bmm(rows, matrix)
        return y if bias is None else y + bias[:, None, :]

    scores = scattered(block, weights, ids).t().unsqueeze(-1)
    rows = x.repeat(block.num_experts, 1).view(block.num_experts, -1, x.shape[-1])
    out = block.ffn(rows * scores, product) if block.weight_before else block.ffn(rows, product) * scores
    return out.sum(dim=0) if base is None else base + out.sum(dim=0)


def dense_loop(block: Generated, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor | None) -> Tensor:
    """Every expert on all tokens, one after another."""
    scores = scattered(block, weights, ids) if block.spec.combine != "compare" else None
    out = torch.zeros_like(x) if base is None else base
    for e in range(block.num_experts):
        y = block.ffn(x, lambda r, name, e=e: block.weights.one(e, r, name))
        column = (weights * (ids == e)).sum(-1, keepdim=True) if scores is None else scores[:, e : e + 1]
        out = out + column * y
    return out


# ------------------------------------------------------------------------------------------------ places


def places(block: Generated, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor | None) -> Tensor:
    """A buffer with a place for every token at every expert; nothing is dropped."""
    experts, capacity, flat = block.num_experts, max(x.shape[0], 1), ids.reshape(-1)
    position = (F.one_hot(flat, experts).cumsum(dim=0) - 1).gather(1, flat.unsqueeze(1)).squeeze(1)
    slot = flat * capacity + position
    rows = x.repeat_interleave(block.top_k, dim=0)
    buffer = x.new_zeros(experts * capacity, x.shape[-1])
    buffer[slot] = rows * weights.reshape(-1, 1) if block.weight_before else rows

    def product(rows: Tensor, name: str) -> Tensor:
        bias, matrix = block.weights.bias(name), block.weights.matrix(name)
        y = torch.bmm(rows, matrix)
        return y if bias is None else y + bias.unsqueeze(1)

    y = block.ffn(buffer.view(experts, capacity, -1), product).view(experts * capacity, -1)
    return from_slots(block, y[slot], weights, base)


def one_hot_places(block: Generated, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor | None) -> Tensor:
    """Dispatch and combination by tensors [T, E, C] that are 0 but for the places of a token."""
    how, _, spelling = block.spec.combine.partition("_")
    tokens, experts, capacity = x.shape[0], block.num_experts, block.capacity(x.shape[0])
    combine = TABLES[how](block, weights, ids)
    dispatch = combine.bool().to(x.dtype)

    def product(rows: Tensor, name: str) -> Tensor:
        bias, matrix = block.weights.bias(name), block.weights.matrix(name)
        y = torch.bmm(rows, matrix)
        return y if bias is None else y + bias.unsqueeze(1)

    if spelling == "matmul":
        rows = dispatch.reshape(tokens, experts * capacity).t() @ x
        y = block.ffn(rows.view(experts, capacity, -1), product)
        out = combine.reshape(tokens, experts * capacity) @ y.reshape(experts * capacity, -1)
    else:
        y = block.ffn(torch.einsum("sec,sm->ecm", dispatch, x), product)
        out = torch.einsum("sec,ecm->sm", combine, y)
    return out if base is None else base + out


def table_of_choices(block: Generated, weights: Tensor, ids: Tensor) -> Tensor:
    """Places choice after choice: a later one starts after the rows of earlier ones, all or those that were kept."""
    capacity, experts = block.capacity(ids.shape[0]), block.num_experts
    parts, filled = [], 0
    for k in range(block.top_k):
        mask = F.one_hot(ids[:, k], experts)
        places = mask.cumsum(dim=0) - 1 + filled
        kept = mask * (places < capacity)
        filled = filled + (kept if block.spec.combine.startswith("kept") else mask).sum(dim=0, keepdim=True)
        at = F.one_hot((places * kept).sum(dim=1), capacity)
        parts.append((weights[:, k, None] * kept).unsqueeze(-1) * at.unsqueeze(1))
    return sum(parts[1:], parts[0])


def table_of_tokens(block: Generated, weights: Tensor, ids: Tensor) -> Tensor:
    """Places token after token: one mask for all choices."""
    capacity, shape = block.capacity(ids.shape[0]), (ids.shape[0], block.num_experts)
    mask = torch.zeros(shape, dtype=torch.bool).scatter(1, ids, True)
    places = mask.cumsum(dim=0) - 1
    kept = mask & (places < capacity)
    scores = torch.zeros(shape, dtype=weights.dtype).scatter(1, ids, weights) * kept
    return torch.einsum("se,sec->sec", scores, F.one_hot(places * kept, capacity).to(weights.dtype))


def table_of_slots(block: Generated, weights: Tensor, ids: Tensor) -> Tensor:
    """Places choice after choice, counted in one row of all slots."""
    tokens, capacity = ids.shape[0], block.capacity(ids.shape[0])
    mask = F.one_hot(ids, block.num_experts)
    flat = mask.transpose(0, 1).reshape(block.top_k * tokens, block.num_experts)
    places = ((flat.cumsum(dim=0) - 1) * flat).sum(dim=1).view(block.top_k, tokens).t()
    at = places.unsqueeze(-1) == torch.arange(capacity)
    return (weights[..., None, None] * mask.unsqueeze(-1) * at.unsqueeze(2)).sum(dim=1)


TABLES: dict[str, Callable[[Generated, Tensor, Tensor], Tensor]] = {
    "choices": table_of_choices,
    "kept": table_of_choices,
    "tokens": table_of_tokens,
    "slots": table_of_slots,
}
"""Weights [T, E, C] of the places of each token."""


# ---------------------------------------------------------------------------------------------- combines


def sorted_rows(block: Generated, x: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    rows = x[order // block.top_k]
    return rows * weights.reshape(-1)[order].unsqueeze(-1) if block.weight_before else rows


def from_sorted(block: Generated, x: Tensor, y: Tensor, weights: Tensor, order: Tensor, base: Tensor | None) -> Tensor:
    """Rows in the order of experts back to tokens."""
    weigh_first = block.spec.combine in (*ADD, "weighted_sum") and not block.weight_before
    if weigh_first:
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
    if block.spec.combine in ADD:
        return ADD[block.spec.combine](torch.zeros_like(x) if base is None else base, order // block.top_k, y)
    if block.spec.combine == "weighted_sum":
        y = y[torch.argsort(order)]
    else:
        unsorted = torch.empty_like(y)
        unsorted[order] = y
        y = unsorted
    return from_slots(block, y, None if weigh_first else weights, base)


def from_slots(block: Generated, y: Tensor, weights: Tensor | None, base: Tensor | None) -> Tensor:
    """Rows in the order of slots back to tokens; ``weights`` are None if they are in the rows already."""
    hidden, how = y.shape[-1], block.spec.combine
    if block.weight_before:
        weights = None
    if weights is not None and how in (*ADD, "weighted_sum"):
        y, weights = y * weights.reshape(-1, 1), None
    if how in ADD:
        tokens = y.shape[0] // block.top_k
        token = torch.arange(tokens).repeat_interleave(block.top_k)
        return ADD[how](y.new_zeros(tokens, hidden) if base is None else base, token, y)
    y = y.view(y.shape[0] // block.top_k, block.top_k, hidden)
    if weights is None:
        out = y.sum(dim=1)
    elif how == "einsum":
        out = torch.einsum("tkh,tk->th", y, weights)
    else:
        out = (y * weights.unsqueeze(-1)).sum(dim=1)
    return out if base is None else base + out


def add_rows(out: Tensor, token: Tensor, y: Tensor) -> Tensor:
    out[token] += y
    return out


ADD: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "index_add": lambda out, token, y: out.index_add(0, token, y),
    "index_add_": lambda out, token, y: out.index_add_(0, token, y),
    "scatter_add": lambda out, token, y: out.scatter_add(0, token.unsqueeze(-1).expand_as(y), y),
    "index_put_": lambda out, token, y: out.index_put_((token,), y, accumulate=True),
    "iadd": add_rows,
}
"""Ways to add rows to tokens. ``iadd`` loses all but one of the rows of a token, so it is for one expert at a time."""

Run = Callable[[Generated, Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Dispatch:
    """A way to bring rows to experts, and what it goes with.

    Attributes:
        sparse: it is to become sparse altogether; not only the products in the middle.
    """

    pattern: str
    run: Run
    combines: tuple[str, ...]
    stacked: bool = True
    lists: bool = False
    sparse: bool = False


_adds = tuple(name for name in ADD if name != "iadd")
_slots = ("sum", "einsum", "weighted_sum")
_tables = tuple(f"{how}_{spelling}" for how in TABLES for spelling in ("einsum", "matmul"))
DISPATCHES: dict[str, Dispatch] = {
    "grouped": Dispatch("P1", grouped, (*_slots, *_adds)),
    "gather_bmm": Dispatch("P2", gather_bmm, (*_slots, *_adds)),
    "gather_einsum": Dispatch("P2", gather_einsum, (*_slots, *_adds)),
    "gather_matmul": Dispatch("P2", gather_matmul, (*_slots, *_adds)),
    "where": Dispatch("P3", loop("where"), tuple(ADD), lists=True),
    "one_hot": Dispatch("P3", loop("one_hot"), tuple(ADD), lists=True),
    "nonzero": Dispatch("P3", loop("nonzero"), tuple(ADD), lists=True),
    "mask": Dispatch("P3", mask_loop, (*_slots, *_adds), lists=True),
    "split": Dispatch("P3", split, (*_slots, *_adds), lists=True),
    "dense_einsum": Dispatch("P4", dense_einsum, ("scatter", "one_hot")),
    "dense_bmm": Dispatch("P4", dense_bmm, ("scatter", "one_hot")),
    "dense_loop": Dispatch("P4", dense_loop, ("scatter", "one_hot", "compare"), lists=True),
    "places": Dispatch("P5", places, (*_slots, *_adds)),
    "one_hot_places": Dispatch("P5", one_hot_places, _tables, sparse=True),
}


def specs(dispatch: str | None = None) -> st.SearchStrategy[Spec]:
    """Any block; of one way of dispatching if that is given.

    Drawn in one piece: hypothesis varies single draws of what it has seen, which leaves most combinations out.
    """
    return st.binary(min_size=8, max_size=8).map(
        lambda seed: random_spec(random.Random(seed + str(dispatch).encode()), dispatch)
    )


def random_spec(chance: random.Random, dispatch: str | None = None) -> Spec:
    """A spec with every axis drawn on its own, as far as they fit each other."""
    name = dispatch or chance.choice(sorted(DISPATCHES))
    kind, experts, router = DISPATCHES[name], chance.randint(2, 5), chance.choice(ROUTERS)
    storage = chance.choice(["stacked", "modules"]) if kind.lists else "stacked"
    dtype = chance.choice([torch.float32, torch.float32, torch.bfloat16])
    aligned = name == "grouped" and dtype == torch.bfloat16  # ``torch._grouped_mm`` wants rows of 16 bytes
    sizes = [8, 16, 24] if aligned else range(3, 21)
    tokens = chance.choice([0, 1, *range(1, 18)])
    hidden, width, bias = chance.choice(sizes), chance.choice(sizes), chance.random() < 0.4
    same = name not in ("dense_einsum", "dense_loop", "one_hot_places") and not (name == "dense_bmm" and bias)
    return Spec(
        dispatch=name,
        combine=chance.choice(kind.combines),
        activation=chance.choice(["silu", "silu", "gelu", "clamped", "relu2", "plain_gelu"]),
        bias=bias,
        transposed=storage == "stacked" and chance.random() < 0.4,
        packing=chance.choice(["separate", "concatenated", "interleaved"]),
        storage=storage,
        router=router,
        shared=chance.choice(["none", "none", "added", "base"]),
        weight_before=same and chance.random() < 0.2,  # of dense blocks, only these are the same mixture
        experts=experts,
        top_k=1 if router == "argmax" else chance.randint(1, min(3, experts)),
        hidden=hidden,
        width=width,
        shape=(tokens, hidden) if chance.random() < 0.5 else (2, tokens // 2, hidden),
        dtype=dtype,
        tight=name == "one_hot_places" and chance.random() < 0.5,
    )


def build(spec: Spec) -> tuple[Generated, Tensor]:
    """The block and its input, always the same for the same spec."""
    torch.manual_seed(0)
    block = Generated(spec).to(spec.dtype)
    return block, torch.randn(spec.shape).to(spec.dtype)

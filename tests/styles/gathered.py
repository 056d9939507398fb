"""P2 beyond transformers: the weights of every token's experts are gathered, and multiplied in batches."""

import torch
from torch import Tensor

from tests.styles.parts import GATED, Block, Expert, parameter, stacked_expert


class Separate(Block):
    """w1 and w3 [E, I, H], w2 [E, H, I]; all the other way round if ``transposed``."""

    def __init__(
        self, hidden: int, width: int, experts: int, top_k: int, activation: str = "silu", bias: bool = False,
        router: str = "renorm", transposed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(hidden, width, experts, top_k, activation, router)
        up, down = ((hidden, width), (width, hidden)) if transposed else ((width, hidden), (hidden, width))
        self.w1, self.w3, self.w2 = parameter(experts, *up), parameter(experts, *up), parameter(experts, *down)
        self.b1 = parameter(experts, width, scale=0.5) if bias else None
        self.b3 = parameter(experts, width, scale=0.5) if bias else None
        self.b2 = parameter(experts, hidden, scale=0.5) if bias else None
        self.transposed = transposed

    def expert(self, e: int) -> Expert:
        return stacked_expert(e, self.w1, self.w3, self.w2, self.transposed, (self.b1, self.b3, self.b2))


class GptFast(Separate):
    """gpt-fast: weights [T, A, O, I] by plain indexing, einsums with the names of the project."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.view(-1, shape[-1])
        weights, ids = self.route(x)
        w1, w3, w2 = self.w1[ids], self.w3[ids], self.w2[ids]
        gate = torch.einsum("ti,taoi -> tao", x, w1)
        h = GATED[self.activation](gate, torch.einsum("ti, taoi -> tao", x, w3))
        outs = torch.einsum("tao, taio -> tai", h, w2)
        return torch.einsum("tai,ta -> ti", outs, weights).reshape(shape)


class GptOssReference(Block):
    """gpt-oss reference model: packed interleaved weights and biases, indexed with an ellipsis, residual added."""

    def __init__(
        self, hidden: int, width: int, experts: int, top_k: int, activation: str = "clamped",
        router: str = "topk_softmax", residual: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(hidden, width, experts, top_k, activation, router)
        self.mlp1_weight, self.mlp2_weight = parameter(experts, 2 * width, hidden), parameter(experts, hidden, width)
        self.mlp1_bias = parameter(experts, 2 * width, scale=0.5)
        self.mlp2_bias = parameter(experts, hidden, scale=0.5)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        t = torch.einsum("beck,bk->bec", self.mlp1_weight[ids, ...], x) + self.mlp1_bias[ids, ...]
        t = GATED[self.activation](t[..., ::2], t[..., 1::2])
        t = torch.einsum("beck,bek->bec", self.mlp2_weight[ids, ...], t)
        t += self.mlp2_bias[ids, ...]
        t = torch.einsum("bec,be->bc", t, weights)
        return x + t if self.residual else t

    def expert(self, e: int) -> Expert:
        w, b = self.mlp1_weight[e], self.mlp1_bias[e]
        return Expert(w[::2], w[1::2], self.mlp2_weight[e], b[::2], b[1::2], self.mlp2_bias[e])

    def shared_part(self, x_TH: Tensor) -> Tensor:
        return x_TH if self.residual else torch.zeros_like(x_TH)


class Baddbmm(Separate):
    """[T * K] weight gathers, ``baddbmm`` with the gathered biases; weights are stored [E, in, out]."""

    def __init__(self, hidden: int, width: int, experts: int, top_k: int, **axes: object) -> None:
        super().__init__(hidden, width, experts, top_k, **{"bias": True, "transposed": True, **axes})

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, ids = self.route(x)
        flat = ids.flatten()
        rows = x.unsqueeze(1).expand(-1, self.top_k, -1).reshape(-1, 1, shape[-1])
        gate = torch.baddbmm(self.b1[flat].unsqueeze(1), rows, self.w1[flat])
        up = torch.baddbmm(self.b3[flat].unsqueeze(1), rows, self.w3[flat])
        y = torch.baddbmm(self.b2[flat].unsqueeze(1), GATED[self.activation](gate, up), self.w2[flat])
        y = y.view(-1, self.top_k, shape[-1]) * weights[..., None]
        return y.sum(1).reshape(shape)


class FlatBmm(Separate):
    """[T * K] weight gathers with ``index_select``, ``bmm``, ``index_add`` back to the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, ids = self.route(x)
        flat = ids.view(-1)
        tokens = torch.arange(x.shape[0], device=x.device).repeat_interleave(self.top_k)
        columns = x[tokens].unsqueeze(-1)
        gate = torch.bmm(self.w1.index_select(0, flat), columns).squeeze(-1)
        h = GATED[self.activation](gate, torch.bmm(self.w3.index_select(0, flat), columns).squeeze(-1))
        y = torch.bmm(self.w2.index_select(0, flat), h.unsqueeze(-1)).squeeze(-1) * weights.view(-1, 1)
        return torch.zeros_like(x).index_add_(0, tokens, y).reshape(shape)


class MatrixVector(Separate):
    """``w[ids] @ x[..., None]`` on [T, K, I, H], with or without biases."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, ids = self.route(x)
        column = x[:, None, :, None]
        gate, up = (self.w1[ids] @ column).squeeze(-1), (self.w3[ids] @ column).squeeze(-1)
        if self.b1 is not None:
            gate, up = gate + self.b1[ids], up + self.b3[ids]
        y = (self.w2[ids] @ GATED[self.activation](gate, up).unsqueeze(-1)).squeeze(-1)
        if self.b2 is not None:
            y = y + self.b2[ids]
        return (y * weights.unsqueeze(-1)).sum(dim=-2).reshape(shape)


class RowMatrix(Separate):
    """``x[:, None, None] @ w[ids]``, weights stored [E, in, out], combined by a matrix product over k."""

    def __init__(self, hidden: int, width: int, experts: int, top_k: int, **axes: object) -> None:
        super().__init__(hidden, width, experts, top_k, **{"transposed": True, **axes})

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, ids = self.route(x)
        row = x[:, None, None]
        gate, up = torch.matmul(row, self.w1[ids]), torch.matmul(row, self.w3[ids])
        y = torch.matmul(GATED[self.activation](gate, up), self.w2[ids]).squeeze(2)
        return torch.matmul(weights.unsqueeze(1), y).squeeze(1).reshape(shape)

"""P1 beyond transformers: rows sorted by expert, one grouped product for each weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

import tests.styles.gmm  # noqa: F401  registers zoo::gmm
from tests.styles.parts import GATED, Block, Expert, Mlp, parameter, stacked_expert


class Titan(Block):
    """torchtitan: router with a bias for the choice, counts kept in a buffer, separate w1, w2, w3, ``scatter_add``.

    Args:
        score_before: the scores multiply the rows before the experts.
        shared: a shared expert, whose output is what the routed rows are added to.
        run: ``grouped`` (``torch._grouped_mm``), ``public`` (``F.grouped_mm``) or ``loop`` (split and concatenate).
        cast: operands are cast to bfloat16 for the products, as the project does for any model. Under Dynamo
            ``torch._grouped_mm`` takes nothing else; in eager mode it also multiplies float32.
    """

    def __init__(
        self, hidden: int, width: int, experts: int, top_k: int, activation: str = "silu",
        router: str = "sigmoid_bias", score_before: bool = True, shared: bool = False, run: str = "grouped",
        cast: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(hidden, width, experts, top_k, activation, router)
        self.weight_before, self.run, self.cast = score_before, run, cast
        self.w1, self.w3 = parameter(experts, width, hidden), parameter(experts, width, hidden)
        self.w2 = parameter(experts, hidden, width)
        self.shared_experts = Mlp(hidden, width) if shared else None
        self.register_buffer("tokens_per_expert", torch.zeros(experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bs, slen, dim = x.shape
        x = x.view(-1, dim)
        top_scores, selected = self.route(x)
        counts = torch.histc(selected.view(-1).float(), bins=self.num_experts, min=0, max=self.num_experts)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts)
        order = torch.argsort(selected.view(-1), stable=True)
        scores = top_scores.view(-1)[order]
        tokens = (order // self.top_k).reshape(-1, 1).expand(-1, dim)
        rows = torch.gather(x, dim=0, index=tokens)
        if self.weight_before:
            rows = (rows.to(torch.float32) * scores.reshape(-1, 1)).to(x.dtype)
        routed = self.run_loop(rows, counts) if self.run == "loop" else self.run_grouped(rows, counts)
        if not self.weight_before:
            routed = (routed.to(torch.float32) * scores.reshape(-1, 1)).to(x.dtype)
        out = torch.zeros_like(x) if self.shared_experts is None else self.shared_experts(x)
        out = out.scatter_add(dim=0, index=tokens, src=routed)
        return out.reshape(bs, slen, dim)

    def run_grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        product = torch._grouped_mm if self.run == "grouped" else F.grouped_mm
        operands = x, self.w1, self.w2, self.w3
        rows, w1, w2, w3 = [t.bfloat16() for t in operands] if self.cast else operands
        gate = product(rows, w1.transpose(-2, -1), offs=offsets)
        h = GATED[self.activation](gate, product(rows, w3.transpose(-2, -1), offs=offsets))
        return product(h, w2.transpose(-2, -1), offs=offsets).type_as(x)

    def run_loop(self, x: Tensor, counts: Tensor) -> Tensor:
        sizes = counts.long().tolist()
        outs = []
        for e, part in enumerate(torch.split(x, split_size_or_sections=sizes, dim=0)):
            gate = torch.matmul(part, self.w1[e].transpose(-2, -1))
            h = GATED[self.activation](gate, torch.matmul(part, self.w3[e].transpose(-2, -1)))
            outs.append(torch.matmul(h, self.w2[e].transpose(-2, -1)))
        return torch.cat(outs, dim=0)

    def expert(self, e: int) -> Expert:
        return stacked_expert(e, self.w1, self.w3, self.w2, False)

    def shared_part(self, x_TH: Tensor) -> Tensor:
        return torch.zeros_like(x_TH) if self.shared_experts is None else self.shared_experts(x_TH)


class MegaBlocks(Block):
    """Dropless MegaBlocks: an opaque grouped product; w2 is stored [E, I, H]; results added by ``index_add``."""

    def __init__(
        self, hidden: int, width: int, experts: int, top_k: int, activation: str = "silu", router: str = "renorm",
        sizes: str = "bincount",
    ) -> None:  # fmt: skip
        super().__init__(hidden, width, experts, top_k, activation, router)
        self.w1, self.v1 = parameter(experts, width, hidden), parameter(experts, width, hidden)
        self.w2 = parameter(experts, width, hidden)
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.view(-1, shape[-1])
        weights, ids = self.route(x)
        flat = ids.flatten()
        _, indices = torch.sort(flat)
        if self.sizes == "bincount":
            sizes = torch.bincount(flat, minlength=self.num_experts)
        else:
            sizes = torch.histc(flat.float(), self.num_experts, 0, self.num_experts - 1).long()
        rows = x.index_select(0, indices // self.top_k)
        gate = torch.ops.zoo.gmm(rows, self.w1, sizes, True)
        h = GATED[self.activation](gate, torch.ops.zoo.gmm(rows, self.v1, sizes, True))
        y = torch.ops.zoo.gmm(h, self.w2, sizes, False) * weights.flatten()[indices].unsqueeze(-1)
        out = torch.zeros_like(x).index_add(0, indices // self.top_k, y)
        return out.view(shape)

    def expert(self, e: int) -> Expert:
        return Expert(self.w1[e], self.v1[e], self.w2[e].t())

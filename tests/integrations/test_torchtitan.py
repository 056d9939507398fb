"""torchtitan's own blocks, compiled by its own code under ``--compile.backend samoyeds``.

Not among the dependencies of the tests: it needs wandb, datasets and more. To run these, ``pip install torchtitan``.
"""

import copy
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from samoyeds_compile import backend
from samoyeds_compile.report.model import GraphReport

titan = pytest.importorskip("torchtitan.models.common.moe", reason="torchtitan is not installed")
EXPERTS, TOP_K, DIM = 4, 2, 32


class TransformerBlock(nn.Module):
    """The half of a block that has experts; attention of torchtitan needs a GPU."""

    def __init__(self) -> None:
        super().__init__()
        from torchtitan.models.common.config_utils import (
            make_moe_config,
            make_routed_experts_config,
            make_router_config,
        )

        normal = partial(nn.init.normal_, std=0.2)
        weights = dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), normal)
        router = make_router_config(
            dim=DIM, num_experts=EXPERTS, top_k=TOP_K, route_norm=True, gate_param_init={"weight": normal}
        )
        experts = make_routed_experts_config(
            dim=DIM, hidden_dim=48, num_experts=EXPERTS, top_k=TOP_K, param_init=weights, comm_backend="standard"
        )
        self.norm = nn.RMSNorm(DIM)
        self.moe = make_moe_config(num_experts=EXPERTS, router=router, routed_experts=experts).build()

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD + self.moe(self.norm(x_BLD))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({str(i): TransformerBlock() for i in range(2)})
        for block in self.layers.values():
            block.moe.init_states()

    def forward(self, x_BLD: Tensor) -> Tensor:
        for block in self.layers.values():
            x_BLD = block(x_BLD)
        return x_BLD


def run(model: nn.Module, length: int) -> list[Tensor]:
    """Output and gradients."""
    x = torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(length), requires_grad=True)
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


@pytest.mark.inductor
def test_apply_compile() -> None:
    """One graph a block (torchtitan asks for ``fullgraph``), its experts rewritten, results those of eager mode."""
    from torchtitan.config import CompileConfig
    from torchtitan.distributed.compile import apply_compile

    model, reports = Model(), []
    eager, original = copy.deepcopy(model), backend.optimize

    def optimize(*args: object) -> GraphReport:
        reports.append(original(*args))
        return reports[-1]

    dims = mock.Mock(tp_enabled=False)
    with mock.patch.object(backend, "optimize", optimize), torch._dynamo.config.patch(capture_scalar_outputs=True):
        apply_compile(model, compile_config=CompileConfig(enable=True, backend="samoyeds"), parallel_dims=dims)
        for length in (6, 9):
            for found, expected in zip(run(model, length), run(eager, length), strict=True):
                torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.detach().abs().max()))
    blocks = [block for report in reports for block in report.blocks]
    assert blocks and all((block.family, block.rewritten) == ("sorted_rows", True) for block in blocks)

"""What two processes run; each case is compared with one process that sees all tokens, in eager mode.

    torchrun --nproc-per-node 2 -m tests.distributed.cases FOLDER [NAME ...]

Every rank writes ``FOLDER/<rank>.json``: for each case the largest deviation and what was rewritten, or the error.
"""

import copy
import datetime
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.parallel_utils import _use_local_dtensor_params
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from samoyeds_compile import DistributedError, Report, SparsityConfig
from samoyeds_compile.integrations.distributed import require_agreement
from samoyeds_compile.sparsity import PackedTensor, best_mask
from tests.integrations.test_training_loops import LanguageModel, batch, loss_of

STEPS, RANKS = 2, 2
Result = dict[str, Any]


def result(report: Report, found: Sequence[Tensor], expected: Sequence[Tensor]) -> Result:
    """Deviation relative to the largest entry of what is expected."""
    pairs = list(zip(found, expected, strict=True))
    scales = [float(e.detach().abs().max()) for _, e in pairs]
    assert all(f.shape == e.shape for f, e in pairs) and min(scales) > 0
    deviation = max(float((f - e).detach().abs().max()) / scale for (f, e), scale in zip(pairs, scales, strict=True))
    return {
        "deviation": deviation, "graphs": len(report.graphs), "rewritten": len(report.rewritten),
        "collectives": sorted({", ".join(graph.collectives) for graph in report.graphs if graph.collectives}),
        "agree": agreement(report),
        "left": [f"{block.module}: {block.reason}" for block in report.blocks if not block.rewritten],
        "discarded": [graph.discarded or graph.problem for graph in report.graphs if graph.discarded or graph.problem],
    }  # fmt: skip


def agreement(report: Report) -> str:
    """What the check of all ranks says; empty if they agree."""
    try:
        require_agreement(report)
    except DistributedError as error:
        return str(error)
    return ""


def how(report: Report) -> dict[str, Any]:
    return {"backend": "samoyeds", "options": {"base": "aot_eager", "report": report}}


def language_model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel()


# ------------------------------------------------------------------------------------------------- data parallel


def train(forward: Callable[..., Tensor], parameters: Any, rows: slice) -> list[Tensor]:
    """Losses of some steps on the rows of each batch that are this rank's."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for step in range(STEPS):
        loss = loss_of(forward, torch.cat([batch(10 * step), batch(10 * step + 1)])[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def trained_alone() -> tuple[Tensor, list[Tensor]]:
    """Losses on all rows, [STEPS], and the parameters afterwards."""
    model = language_model()
    losses = train(model, model.parameters(), slice(None))
    return torch.stack(losses), list(model.parameters())


def mean_of_ranks(losses: list[Tensor]) -> Tensor:
    total = torch.stack(losses)
    dist.all_reduce(total)
    return total / RANKS


def own_rows() -> slice:
    rank = dist.get_rank()
    return slice(3 * rank, 3 * rank + 3)


def ddp(**settings: Any) -> Result:
    model, report = language_model(), Report()
    wrapped = torch.compile(DistributedDataParallel(model, **settings), **how(report))
    losses = mean_of_ranks(train(wrapped, model.parameters(), own_rows()))
    expected, parameters = trained_alone()
    return result(report, [losses, *model.parameters()], [expected, *parameters])


def ddp_small_buckets() -> Result:
    """Dynamo cuts the graph where a bucket of gradients is full, through a block if need be."""
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1024):
        return ddp(bucket_cap_mb=0.004)


def ddp_without_its_optimizer() -> Result:
    """The remedy that the report names."""
    with torch._dynamo.config.patch(optimize_ddp=False):
        return ddp_small_buckets()


def fsdp() -> Result:
    """Blocks compiled, then sharded, as torchtitan does."""
    model, report = language_model(), Report()
    for block in model.blocks:
        block.compile(**how(report))
        fully_shard(block)
    fully_shard(model)
    losses = mean_of_ranks(train(model, model.parameters(), own_rows()))
    expected, parameters = trained_alone()
    whole = [p.full_tensor() for p in model.parameters()]
    return result(report, [losses, *whole], [expected, *parameters])


def pack(experts: nn.Module) -> None:
    """Prune the projections to a quarter of their values and pack them."""
    for name, parameter in list(experts.named_parameters()):
        config = SparsityConfig(1, 2, 16)
        kept = torch.stack([best_mask(matrix.detach().abs(), config) for matrix in parameter])
        packed = PackedTensor.from_dense(torch.where(kept, parameter.detach(), 0), config)
        setattr(experts, name, nn.Parameter(packed, requires_grad=False))


class Packed(nn.Module):
    """Frozen packed experts between layers that learn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.before, self.after = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.experts = mixtral_experts()
        pack(self.experts)

    def forward(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        return self.after(self.experts(self.before(x), ids, scores))


def fsdp_packed() -> Result:
    """Each rank holds half of the packed experts, and gathers the rest packed, when it needs them."""
    model, alone, report = Packed(), Packed(), Report()
    own = sum(t.numel() for t in (alone.experts.down_proj.kept, alone.experts.gate_up_proj.kept)) // RANKS
    model.experts.compile(**how(report))
    fully_shard(model.experts)
    fully_shard(model)
    shards = [p.to_local() for p in model.experts.parameters()]
    assert all(isinstance(s, PackedTensor) for s in shards) and sum(s.kept.numel() for s in shards) == own
    found, expected = [], []
    for _ in range(STEPS):
        for runs, module in ((found, model), (expected, alone)):
            x, ids, scores = routed(3, (0, 1, 2, 3))
            out = module(x, ids, scores)
            out.square().sum().backward()
            whole = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in learned(module)]
            runs += [out.detach(), *(g.clone() for g in whole)]
            module.zero_grad()
    return result(report, found, expected)


def learned(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def tensor_parallel() -> Result:
    """Every expert's width split over the ranks: parameters are DTensors, their shards are multiplied, one sum."""
    mesh, whole, report = init_device_mesh("cpu", (RANKS,)), mixtral_experts(), Report()
    experts, rank = copy.deepcopy(whole), dist.get_rank()
    gate, up = (part.chunk(RANKS, 1)[rank] for part in whole.gate_up_proj.detach().chunk(2, dim=1))
    shards = {"gate_up_proj": torch.cat([gate, up], 1), "down_proj": whole.down_proj.detach().chunk(RANKS, 2)[rank]}
    for (name, shard), dim in zip(shards.items(), (1, 2), strict=True):
        setattr(experts, name, nn.Parameter(DTensor.from_local(shard.contiguous(), mesh, [Shard(dim)])))

    @torch.compile(**how(report))
    def local(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        with _use_local_dtensor_params(experts):
            return experts(x, ids, scores)

    def forward(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        x, scores = (
            DTensor.from_local(t, mesh, [Replicate()]).to_local(grad_placements=[Partial()]) for t in (x, scores)
        )
        return DTensor.from_local(local(x, ids, scores), mesh, [Partial()]).full_tensor()

    *found, into, out = run_experts(forward, list(experts.parameters()), 0, (0, 1, 2, 3))
    *expected, all_into, all_out = run_experts(whole, list(whole.parameters()), 0, (0, 1, 2, 3))
    mine = torch.cat([part.chunk(RANKS, 1)[rank] for part in all_into.chunk(2, dim=1)], 1)
    expected += [mine, all_out.chunk(RANKS, 2)[rank]]
    return result(report, [*found, local_of(into), local_of(out)], expected)


# ----------------------------------------------------------------------------------------------- expert parallel

EXPERTS, HIDDEN, TOKENS, TOP_K = 4, 16, 7, 2


def mixtral_experts() -> nn.Module:
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=24, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts.train()


def routed(seed: int, among: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, global expert ids and routing weights, with only the experts ``among`` chosen."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    choice = torch.rand(TOKENS, len(among), generator=generator).topk(TOP_K).indices
    return x, torch.tensor(among)[choice], torch.rand(TOKENS, TOP_K, generator=generator)


ROUTINGS = {"uneven": (0, 1, 2, 3), "an expert without tokens": (0, 2, 3), "a rank without tokens": (0, 1)}


def gradients(outputs: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    probe = torch.arange(outputs.numel()).cos().view(outputs.shape)
    return list(torch.autograd.grad((outputs * probe).sum(), inputs, allow_unused=False))


def run_experts(forward: Callable[..., Tensor], weights: Sequence[Tensor], seed: int, among: Sequence[int]):
    """Output and the gradients of tokens, routing weights and expert weights."""
    x, ids, scores = routed(seed, among)
    x, scores = x.requires_grad_(), scores.requires_grad_()
    out = forward(x, ids, scores)
    return [out.detach(), *gradients(out, [x, scores, *weights])]


def local_of(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def expert_parallel(implementation: str) -> Result:
    """Experts of transformers, split by the library itself; each rank has tokens of its own, or all have the same."""
    mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("ep", "tp"))
    shared = implementation == "all_reduce"
    found, expected, report = [], [], Report()
    whole, rank = mixtral_experts(), dist.get_rank()
    experts = copy.deepcopy(whole)
    model = nn.ModuleDict({"experts": experts})
    plan = {"experts.gate_up_proj": "grouped_gemm", "experts.down_proj": "grouped_gemm"}
    plan["experts"] = "ep_dispatch_experts"
    apply_expert_parallelism(model, mesh["ep"], mesh["ep" if shared else "tp"], plan, implementation)
    forward = torch.compile(experts, **how(report))
    own = slice(2 * rank, 2 * rank + 2)
    for seed, among in enumerate(ROUTINGS.values()):
        seeds = [10 * seed] if shared else [10 * seed, 10 * seed + 1]
        mine = run_experts(forward, list(experts.parameters()), seeds[rank % len(seeds)], among)
        found += [*mine[:3], *(local_of(g) for g in mine[3:])]
        alone = [run_experts(whole, list(whole.parameters()), s, among) for s in seeds]
        expected += alone[rank % len(seeds)][:3]
        expected += [torch.stack([run[i] for run in alone]).sum(0)[own] for i in (3, 4)]
    keep = [i for i, e in enumerate(expected) if e.abs().max() > 0]
    assert all(float(found[i].abs().max()) == 0 for i in set(range(len(found))) - set(keep))
    return result(report, [found[i] for i in keep], [expected[i] for i in keep])


def all_to_all() -> Result:
    return expert_parallel("all_to_all")


def all_reduce() -> Result:
    return expert_parallel("all_reduce")


class Dispatched(nn.Module):
    """Rows sent to the experts' ranks and back, written as torchtitan's ``AllToAllTokenDispatcher`` is.

    Without a mesh all experts are here and nothing is sent.
    """

    def __init__(self, whole: nn.Module, mesh: DeviceMesh | None) -> None:
        super().__init__()
        own = slice(None) if mesh is None else slice(2 * mesh.get_local_rank(), 2 * mesh.get_local_rank() + 2)
        gate, up = (part[own].detach().clone() for part in whole.gate_up_proj.chunk(2, dim=1))
        self.w1_EFD, self.w3_EFD = nn.Parameter(gate.bfloat16()), nn.Parameter(up.bfloat16())
        self.w2_EDF = nn.Parameter(whole.down_proj[own].detach().clone().bfloat16())
        self.mesh = mesh

    def forward(self, x_TD: Tensor, ids_TK: Tensor, scores_TK: Tensor) -> Tensor:
        order = torch.argsort(ids_TK.view(-1), stable=True)
        counts_E = torch.histc(ids_TK.view(-1).float(), bins=EXPERTS, min=0, max=EXPERTS - 1).long()
        rows_ND = x_TD[order // TOP_K]
        y_ND = self.experts(rows_ND, counts_E) if self.mesh is None else self.elsewhere(rows_ND, counts_E)
        weighted = (y_ND.float() * scores_TK.view(-1)[order].unsqueeze(-1)).to(x_TD.dtype)
        token = (order // TOP_K).unsqueeze(-1).expand(-1, x_TD.shape[1])
        return torch.zeros_like(x_TD).scatter_add(0, token, weighted)

    def elsewhere(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        """What the experts of all ranks make of the rows, which are sorted by expert."""
        counts = counts_E.view(RANKS, -1)
        received = torch.ops._c10d_functional.wait_tensor(all_to_all_single(counts, None, None, self.mesh))
        sent_sizes, sizes = counts.sum(1).tolist(), received.sum(1).tolist()
        rows_RD = all_to_all_single_autograd(rows_ND, sizes, sent_sizes, self.mesh)
        index, per_expert = self.by_expert(received, rows_RD.shape[0])
        y_RD = self.experts(rows_RD[index], per_expert)
        back_RD = y_RD.new_empty(rows_RD.shape)
        back_RD[index] = y_RD
        return all_to_all_single_autograd(back_RD, sent_sizes, sizes, self.mesh)

    def by_expert(self, counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """From rank-major order to expert-major."""
        flat = counts.view(-1)
        starts = (flat.cumsum(0) - flat).view(counts.shape).t().reshape(-1)
        lengths = counts.t().reshape(-1)
        segments = torch.arange(lengths.shape[0]).repeat_interleave(lengths, output_size=total)
        within = torch.arange(total) - (lengths.cumsum(0) - lengths)[segments]
        return starts[segments] + within, counts.sum(0)

    def experts(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        offsets = counts_E.cumsum(0, dtype=torch.int32)
        rows = x_RD.bfloat16()
        h = nn.functional.silu(torch._grouped_mm(rows, self.w1_EFD.transpose(-2, -1), offs=offsets))
        h = h * torch._grouped_mm(rows, self.w3_EFD.transpose(-2, -1), offs=offsets)
        return torch._grouped_mm(h, self.w2_EDF.transpose(-2, -1), offs=offsets).type_as(x_RD)


def torchtitan() -> Result:
    """As torchtitan compiles it, one graph with the sizes of the exchange captured; against one process."""
    report, found, expected, rank = Report(), [], [], dist.get_rank()
    alone, module = (Dispatched(mixtral_experts(), mesh) for mesh in (None, init_device_mesh("cpu", (RANKS,))))
    forward, own = torch.compile(module, fullgraph=True, **how(report)), slice(2 * rank, 2 * rank + 2)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for seed, among in enumerate(ROUTINGS.values()):
            found += run_experts(forward, list(module.parameters()), 10 * seed + rank, among)
            runs = [run_experts(alone, list(alone.parameters()), 10 * seed + r, among) for r in range(RANKS)]
            expected += [*runs[rank][:3], *(sum(run[i] for run in runs)[own] for i in (3, 4, 5))]
    keep = [i for i, e in enumerate(expected) if e.abs().max() > 0]
    assert all(float(found[i].abs().max()) == 0 for i in set(range(len(found))) - set(keep))
    return result(report, [found[i] for i in keep], [expected[i] for i in keep])


def ranks_apart() -> Result:
    """One rank is told to leave its block alone: the results are the same, and the check says which rank it is."""
    torch.manual_seed(0)
    block, report = LanguageModel(), Report()
    options = how(report)["options"] | {"rewrite": dist.get_rank() == 0}
    with torch.no_grad():
        found = torch.compile(block, backend="samoyeds", options=options)(batch(0))
        return result(report, [found], [block(batch(0))])


CASES = [
    ddp,
    ddp_small_buckets,
    ddp_without_its_optimizer,
    fsdp,
    fsdp_packed,
    tensor_parallel,
    all_to_all,
    all_reduce,
    torchtitan,
    ranks_apart,
]


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    results: dict[str, Result] = {}
    for case in CASES:
        if names and case.__name__ not in names:
            continue
        torch._dynamo.reset()
        try:
            results[case.__name__] = case()
        except Exception:
            results[case.__name__] = {"error": traceback.format_exc()}
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

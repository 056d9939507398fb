"""The worked examples of docs/troubleshooting.md: a program, an edit that spoils it, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

LOOP = """\
import torch
from torch import nn
from torch.nn.functional import silu


class Expert(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(silu(gate) * up)


class MoE(nn.Module):
    def __init__(self, hidden=16, width=24, experts=4, top_k=2):
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, width) for _ in range(experts))

    def run(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        return self.run(x, ids, weights)


def model_and_inputs():
    return MoE().eval(), torch.randn(6, 16)
"""

SORTED = """\
import torch
import transformers.integrations.moe
from torch import nn
from torch.nn.functional import silu

grouped_mm = torch.ops.transformers.grouped_mm_fallback


class MoE(nn.Module):
    def __init__(self, hidden=16, width=24, experts=4, top_k=2):
        super().__init__()
        self.num_experts, self.top_k = experts, top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * width, hidden) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * 0.3)

    def activate(self, z):
        gate, up = z.chunk(2, dim=-1)
        return silu(gate) * up

    def run(self, x, ids, weights):
        sorted_ids, order = torch.sort(ids.flatten())
        counts = torch.histc(sorted_ids.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        h = self.activate(grouped_mm(x[order // self.top_k], self.gate_up.transpose(1, 2), offsets))
        y = grouped_mm(h, self.down.transpose(1, 2), offsets)
        y = y * weights.flatten()[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel())
        return y[back].view(*ids.shape, -1).sum(dim=1)

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        return self.run(x, ids, weights)


def model_and_inputs():
    return MoE().eval(), torch.randn(6, 16)
"""

MIXTRAL = """\
import torch
from transformers import MixtralConfig, MixtralForCausalLM

SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)


def model_and_inputs():
    model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_local_experts=4, **SIZES)).eval()
    return model, {"input_ids": torch.zeros(1, 8, dtype=torch.long), "use_cache": False}
"""

PROGRAMS = {"loop.py": LOOP, "sorted.py": SORTED, "mixtral.py": MIXTRAL}
Edits = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Trouble:
    """One example.

    Attributes:
        title: what one sees.
        program: which of `PROGRAMS`.
        edits: what to replace in it by what, so that it goes wrong.
        remarks: what a reader should know beyond what the tool prints.
        fix: what to replace in the edited program so that it goes well; the edits undone by default.
        fixed: False if nothing in the program needs to change.
        grad: whether gradients are on.
        options: of the backend, beside the defaults.
    """

    title: str
    program: str
    edits: Edits
    remarks: str
    fix: Edits | None = None
    fixed: bool = True
    grad: bool = False
    environment: tuple[tuple[str, str], ...] = ()


WRITTEN = "experts = nn.ModuleList(Expert(hidden, width) for _ in range(experts))"
HIT_LOOP = """        for e in torch.unique(ids).tolist():
            expert = self.experts[e]
"""
LOOP_HEAD = "        for e, expert in enumerate(self.experts):\n"
DECORATED = "    @samoyeds_compile.moe_experts\n    def run(self, x, ids, weights):\n"
DESCRIBED = (
    '    @samoyeds_compile.moe_experts(gate_up="experts.*.gate_up.weight", down="experts.*.down.weight",\n'
    '                                  activation="silu(gate) * up")\n    def run(self, x, ids, weights):\n'
)
RUN = "    def run(self, x, ids, weights):\n"
IMPORT = ("import torch\n", "import torch\n\nimport samoyeds_compile\n")

TROUBLES = (
    Trouble(
        "Experts of transformers that run one by one",
        "mixtral.py",
        (("    return model, {", '    model.set_experts_implementation("eager")\n    return model, {'),),
        "Whoever loads the model chose `eager`; transformers' default for compiled models is a form that is matched.",
    ),
    Trouble(
        "A loop over the experts that were hit",
        "loop.py",
        ((LOOP_HEAD, HIT_LOOP),),
        "How often the loop runs depends on the tokens, so no graph holds it. Loop over all experts: those without "
        "tokens cost nothing once the block is rewritten.",
    ),
    Trouble(
        "The same loop, where the code has to stay as it is",
        "loop.py",
        (IMPORT, (LOOP_HEAD, HIT_LOOP), (RUN, DECORATED)),
        "`@moe_experts` without arguments only keeps the graph whole. With the names of the weights the block is "
        "rewritten ([more](integrations.md#loops-of-your-own)).",
        fix=((DECORATED, DESCRIBED),),
    ),
    Trouble(
        "Tokens counted on the host",
        "loop.py",
        ((LOOP_HEAD, LOOP_HEAD + "            if int((ids == e).sum()) == 0:\n                continue\n"),),
        "The test for an empty expert saves nothing: an expert without tokens has no rows to compute.",
    ),
    Trouble(
        "Somebody switched the compiler off",
        "loop.py",
        ((RUN, "    @torch.compiler.disable\n" + RUN),),
        "Such decorators outlive the reason for them.",
    ),
    Trouble(
        "A call that breaks the graph",
        "loop.py",
        (
            (
                "        out = torch.zeros_like(x)\n",
                "        out = torch.zeros_like(x)\n        torch._dynamo.graph_break()\n",
            ),
        ),
        "Here it is written out; more often a library that logs or that calls into C does it. "
        "`TORCH_LOGS=graph_breaks` shows the whole stack.",
    ),
    Trouble(
        "An activation that mixes tokens",
        "sorted.py",
        (("silu(gate) * up", "silu(gate - gate.mean(dim=0)) * up"),),
        "A mean over rows makes the result of one token depend on which others came along; no block of experts does "
        "that.",
    ),
    Trouble(
        "An activation with a running sum",
        "sorted.py",
        (("silu(gate) * up", "silu(gate.cumsum(dim=0)) * up"),),
        "As before: `dim=0` runs over tokens.",
    ),
    Trouble(
        "The hidden rows are read elsewhere",
        "sorted.py",
        (("        y = grouped_mm(h,", "        self.largest = h.abs().max()\n        y = grouped_mm(h,"),),
        "After the rewrite these rows do not exist any more. Measure in eager mode, or in a hook that is not compiled.",
    ),
    Trouble(
        "Rows that are not sorted",
        "sorted.py",
        (("torch.sort(ids.flatten())", "(ids.flatten(), torch.arange(ids.numel()))"),),
        "The products take the rows of one expert after the other, so this computes something else than it seems to.",
    ),
    Trouble(
        "Sorted the other way round",
        "sorted.py",
        (("torch.sort(ids.flatten())", "torch.sort(ids.flatten(), descending=True)"),),
        "The offsets count expert 0 first; rows of the last expert come first.",
    ),
    Trouble(
        "A histogram of other bins",
        "sorted.py",
        (("min=0, max", "min=1, max"),),
        "Expert 0 is not counted, so the rows of all others are shifted.",
    ),
    Trouble(
        "Rows put back by the wrong permutation",
        "sorted.py",
        (("y[back]", "y[order]"),),
        "`order` says where sorted rows come from; what is needed is its inverse.",
    ),
    Trouble(
        "The largest contribution instead of the sum",
        "sorted.py",
        ((".sum(dim=1)", ".amax(dim=1)"),),
        "It is a mixture of another kind, which no rewrite covers. It runs on Inductor.",
    ),
    Trouble(
        "The rewrite is switched off",
        "sorted.py",
        (),
        "Everything is found and reported, and nothing is changed.",
        environment=(("SAMOYEDS_REWRITE", "0"),),
    ),
    Trouble(
        "The input is overwritten on the way",
        "sorted.py",
        (("        y = grouped_mm(h,", "        x.zero_()\n        y = grouped_mm(h,"),),
        "The replacement reads its inputs at the end of the block, where they would be zero by then.",
    ),
    Trouble(
        "Experts that are no mixture",
        "loop.py",
        (
            (
                "        return self.run(x, ids, weights)\n",
                "        return torch.stack([expert(x) for expert in self.experts]).mean(0)\n",
            ),
        ),
        "Every expert runs on every token with the same weight: an ensemble. Nothing is wrong; it runs on Inductor.",
        fixed=False,
    ),
    Trouble(
        "Inputs that do not reach the experts",
        "loop.py",
        (
            (
                "        return self.run(x, ids, weights)\n",
                "        return self.run(x, ids, weights) if self.training else x\n",
            ),
        ),
        "`explain` follows one call. Call it with the arguments, and in the mode, that you use in earnest.",
    ),
    Trouble(
        "Rewritten, but no kernel: gradients",
        "loop.py",
        (),
        "Kernels for inference do not keep what a backward needs.",
        grad=True,
        fixed=False,
    ),
    Trouble(
        "Rewritten, but no kernel: the dtype",
        "sorted.py",
        (("MoE().eval(), torch.randn(6, 16)", "MoE().double().eval(), torch.randn(6, 16).double()"),),
        "Kernels exist for the dtypes that models are run in.",
    ),
    Trouble(
        "Rewritten, but no kernel: how weights are stored",
        "sorted.py",
        (
            ("torch.randn(experts, 2 * width, hidden)", "torch.randn(experts, hidden, 2 * width)"),
            ("torch.randn(experts, hidden, width)", "torch.randn(experts, width, hidden)"),
            ("self.gate_up.transpose(1, 2)", "self.gate_up"),
            ("self.down.transpose(1, 2)", "self.down"),
            ("torch.randn(6, 16)", "torch.randn(600, 16)"),
        ),
        "With weights stored `[in, out]` kernels beat libraries only while few tokens come for each expert.",
    ),
    Trouble(
        "A router that stays as it is",
        "loop.py",
        (
            (
                "self.router(x).softmax(-1).topk(self.top_k, dim=-1)",
                "self.router(x).sigmoid().sqrt().topk(self.top_k, dim=-1)",
            ),
        ),
        "Only the router stays; the experts are rewritten. It is a few small operations that Inductor fuses.",
        fixed=False,
        environment=(("SAMOYEDS_FUSE_ROUTERS", "1"),),
    ),
)

"""The op by each kind of kernels on a CUDA device, in graphs; what the lowering takes; candidates that are measured."""

import pytest
import torch

from samoyeds_codegen.gpu import choose as chooser
from samoyeds_codegen.gpu.candidate import KINDS, candidates
from samoyeds_codegen.gpu.cost import Block
from samoyeds_codegen.gpu.device import device_of
from samoyeds_codegen.gpu.results import key, stored
from samoyeds_codegen.gpu.tune import tune
from samoyeds_codegen.triton.spec import ExpertsSpec, Pattern
from samoyeds_compile import SparsityConfig
from samoyeds_compile.lower.gpu import gpu_kernels
from samoyeds_compile.ops import reference
from tests.ops.operands import double, operands
from tests.ops.test_sparse_experts import packed_operands

AVAILABLE = torch.cuda.is_available()
CAPABILITY = torch.cuda.get_device_capability() if AVAILABLE else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not AVAILABLE, reason="needs a CUDA device"),
    pytest.mark.skipif(AVAILABLE and CAPABILITY < (8, 0), reason="needs sparse tensor cores, sm_80"),
]
CONFIGS = [
    SparsityConfig(1, 1, 32),
    SparsityConfig(1, 2, 32),
    SparsityConfig(1, 2, 64),
    SparsityConfig(1, 2, 128, group=64),
    SparsityConfig(2, 4, 64),
]
FORMS = [("concatenated", torch.float16)]
FORMS += [(layout, torch.bfloat16) for layout in ("concatenated", "interleaved", "separate", "none")]
DTYPES = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def on_cuda(args):
    return [[t.cuda() for t in a] if isinstance(a, list) else a.cuda() if torch.is_tensor(a) else a for a in args]


def kinds_of(config):
    """That have kernels for a pattern on this device."""
    pattern = Pattern(config.n, config.m, config.vector, config.group)
    spec = ExpertsSpec("bfloat16", pattern, "silu(gate) * up", True)
    return [kind for kind in KINDS if candidates(spec, (kind,), CAPABILITY)]


def skip_unless(kind, config):
    if kind not in kinds_of(config):
        pytest.skip("no such kernel for this pattern and device")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layout", "dtype"), FORMS, ids=str)
@torch.no_grad()
def test_op(layout, kind, config, dtype):
    skip_unless(kind, config)
    for tokens in (0, 1, 40, 500):
        dense, packed = packed_operands(operands(1, tokens, 2, 5, 192, 160, layout, "out_in", True, dtype), config)
        found = torch.ops.samoyeds.experts_gpu(*on_cuda(packed), dtype, None, kind).cpu()
        expected = reference.moe_experts(*double(dense)).view(tokens, 192)
        assert float((found.double() - expected).norm()) <= DTYPES[dtype] * float(expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cuda_graph(kind):
    """No call waits for the device; a graph that was captured with one routing computes another."""
    config = SparsityConfig(1, 2, 64)
    skip_unless(kind, config)
    _, packed = packed_operands(operands(0, 40, 2, 4, 128, 96, "concatenated", "out_in", True, torch.bfloat16), config)
    args = on_cuda(packed)

    def call():
        return torch.ops.samoyeds.experts_gpu(*args, torch.bfloat16, None, kind)

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for ids in (args[1].flip(0), torch.zeros_like(args[1]), torch.full_like(args[1], -1)):
        args[1].copy_(ids)
        graph.replay()
        assert torch.equal(captured, call())


@pytest.mark.parametrize("config", [CONFIGS[2], CONFIGS[3]], ids=str)
@torch.no_grad()
def test_lowering_takes_what_is_proven(config):
    """Every kind that this device has an instruction for."""
    _, packed = packed_operands(operands(0, 40, 2, 4, 128, 96, "concatenated", "out_in", False, torch.bfloat16), config)
    args = on_cuda(packed)
    found = gpu_kernels(args[1], *args[3:6], *args[9:], torch.bfloat16, bias=False)
    assert found.kinds.split() == kinds_of(config), found.text


def test_measured_candidates(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMOYEDS_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    spec, block = ExpertsSpec("bfloat16", Pattern(1, 2, 128), "silu(gate) * up", True), Block(8, 512, 256)
    device = torch.device("cuda", torch.cuda.current_device())
    numbers = device_of(device)
    kinds = tuple(kinds_of(SparsityConfig(1, 2, 128)))
    tune(spec, block, [16, 4096], device, numbers, kinds, progress=False)
    for slots in (16, 4096):
        times = stored(numbers)[key(spec, block, slots)]
        assert len(times) > 1 and all(ms > 0 for ms in times.values())
        taken = chooser.choose(spec, block, slots, numbers, " ".join((*kinds, "tuned")))
        assert str(taken) == min(times, key=times.__getitem__)
        assert taken in candidates(spec, kinds, CAPABILITY)
    chooser.forget()

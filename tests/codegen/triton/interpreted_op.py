"""`samoyeds::experts_gpu` and its lowering, in Triton's interpreter: CPU tensors stand in for a CUDA device."""

import itertools

import pytest
import torch

from samoyeds_codegen.triton import emit as emitter
from samoyeds_codegen.triton import prove_gradients
from samoyeds_codegen.triton.emit import template
from samoyeds_codegen.triton.kernel import projection
from samoyeds_codegen.triton.prove import proven
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.spec import Pattern
from samoyeds_compile import Report, SparsityConfig
from samoyeds_compile.errors import OperandError
from samoyeds_compile.lower import gpu, kernels, stages
from samoyeds_compile.lower.gpu import gpu_kernels, switched_off
from samoyeds_compile.lower.kernels import gpu_choice
from samoyeds_compile.ops import reference
from samoyeds_compile.ops.experts_gpu import gpu_spec, weight_form
from samoyeds_compile.sparsity import PackedTensor
from tests.blocks import Block
from tests.codegen.triton.cases import spec_of
from tests.ops.operands import ACTIVATIONS, double, operands
from tests.ops.test_sparse_experts import packed_operands

LAYOUTS = list(ACTIVATIONS)


def canonical(args, dtype=torch.float32):
    return torch.ops.samoyeds.experts_gpu(*args, dtype, None)


def assert_right(args, expected_of=None, tolerance=1e-5):
    called = torch.ops.samoyeds.gpu_experts.default
    with torch.no_grad(), torch.profiler.profile() as profile:
        found = canonical(args, args[0].dtype)
    assert any(event.name == str(called).removesuffix(".default").replace(".", "::") for event in profile.events())
    expected = reference.moe_experts(*double(expected_of or args))
    assert float((found.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("layout", "weight_layout"), list(itertools.product(LAYOUTS, ["out_in", "in_out"])))
def test_dense(layout, weight_layout, bias):
    assert_right(operands(0, 6, 2, 3, 24, 20, layout, weight_layout, bias))


@pytest.mark.parametrize(
    "config", [SparsityConfig(1, 1, 16), SparsityConfig(1, 2, 32, group=3), SparsityConfig(2, 4, 16)]
)
@pytest.mark.parametrize(("layout", "weight_layout"), [*zip(LAYOUTS, ["out_in", "in_out"] * 2, strict=True)])
def test_packed(layout, weight_layout, config):
    dense, packed = packed_operands(operands(1, 6, 2, 3, 40, 36, layout, weight_layout, True), config)
    assert_right(packed, dense)


SEPARATE = [("concatenated", "up,down"), ("interleaved", "up"), ("separate", "gate,up,down"), ("none", "down")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize(("layout", "separate"), SEPARATE)
def test_matrices_that_lie_apart(layout, separate, weight_layout, dtype):
    """A stack beside them is read as matrices as well."""
    args = operands(1, 6, 2, 3, 24, 20, layout, weight_layout, True, dtype, separate=separate)
    assert_right(args, tolerance=1e-5 if dtype == torch.float32 else 3e-2)


def test_a_matrix_that_is_replaced_is_followed():
    """No table is kept from call to call."""
    args = operands(1, 6, 2, 3, 24, 20, "separate", "out_in", False, separate="gate,up,down")
    assert_right(args)
    args[4][1] = torch.randn(20, 24)
    assert_right(args)


def test_matrices_of_different_strides_are_refused():
    args = operands(1, 6, 2, 3, 24, 20, "separate", "out_in", False, separate="gate,up,down")
    args[4][1] = args[4][1].t().contiguous().t()
    assert "differ in strides" in gpu_spec(*args[3:6], *args[9:], torch.float32)
    kernel = spec_of("float32", None, ACTIVATIONS["separate"]).name.replace("gated", "gated-matrices")
    with pytest.raises(OperandError, match="differ in shape, strides"):
        torch.ops.samoyeds.gpu_experts(*args[:9], kernel, 20, "separate", "out_in", torch.float32, "triton")


@pytest.mark.parametrize(
    "config", [SparsityConfig(1, 1, 16), SparsityConfig(1, 2, 32, group=3), SparsityConfig(2, 4, 16)], ids=str
)
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize(("layout", "separate"), SEPARATE)
def test_packed_matrices_that_lie_apart(layout, separate, weight_layout, config):
    """Values, metadata and selection of each expert, wherever they are; a stack beside them is read so as well."""
    args = operands(1, 6, 2, 3, 40, 36, layout, weight_layout, True, separate=separate)
    dense, packed = packed_operands(args, config)
    assert gpu_spec(*packed[3:6], *packed[9:], torch.float32).separate
    assert_right(packed, dense)


def test_operands_of_packed_weights_are_counted():
    _, args = packed_operands(operands(6, 4, 2, 3, 32, 32, "separate", "out_in", True), SparsityConfig(1, 2, 32))
    args[3:6] = [[w.packed.values, w.packed.metadata] for (w,) in args[3:6]]
    kernel = spec_of("float32", Pattern(1, 2, 32), ACTIVATIONS["separate"]).name
    with pytest.raises(OperandError, match="gate has 2 tensors; pass 3 for a stack"):
        torch.ops.samoyeds.gpu_experts(*args[:9], kernel, 32, "separate", "out_in", torch.float32, "triton")


def test_half_precision():
    dense, packed = packed_operands(
        operands(2, 5, 2, 3, 40, 36, "concatenated", "out_in", True, torch.bfloat16), SparsityConfig(1, 2, 32)
    )
    assert_right(packed, dense, 3e-2)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_and_narrow_bias(tokens):
    args = operands(3, tokens, 2, 3, 24, 20, "concatenated", "out_in", False)
    args[7] = torch.randn(3, 1)
    with torch.no_grad():
        found = canonical(args)
    torch.testing.assert_close(
        found.double(), reference.moe_experts(*double(args)).view(tokens, 24), rtol=1e-4, atol=1e-5
    )


def test_columns_of_rows_need_not_be_contiguous():
    args = operands(3, 5, 2, 3, 24, 20, "concatenated", "out_in", False)
    args[0] = args[0].t().contiguous().t()
    assert_right(args)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weighting": "input"}, "what goes into"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_reasons(change, word):
    """Said, and the result is that of the canonical op."""
    args = operands(4, 5, 2, 3, 24, 20, "concatenated", "out_in", True, **change)
    dtype = args[0].dtype
    assert word in gpu_spec(*args[3:6], *args[9:], dtype)
    found = gpu_kernels(*args[1:2], *args[3:6], *args[9:], dtype, bias=True)
    assert (found.kinds, found.text) == ("", gpu_spec(*args[3:6], *args[9:], dtype))
    assert torch.equal(canonical(args, dtype), torch.ops.samoyeds.moe_experts(*args, dtype, None))


@pytest.mark.parametrize(
    ("config", "width", "word"),
    [
        (SparsityConfig(3, 4, 32), 20, "3:4"),
        (SparsityConfig(1, 2, 32, inner="none"), 20, "1:2:32"),
        (SparsityConfig(2, 4, 32), 18, "within a block of 4"),
    ],
)
def test_reasons_of_packed_weights(config, width, word):
    _, args = packed_operands(operands(4, 5, 2, 3, 24, width, "concatenated", "out_in", False), config)
    assert word in gpu_spec(*args[3:6], *args[9:], torch.float32)


def test_gradients_beside_packed_weights():
    """Kernels have those; that of a packed weight itself takes the other way, and is nowhere wanted by itself."""
    _, args = packed_operands(operands(5, 4, 2, 3, 32, 32, "concatenated", "out_in", False), SparsityConfig(1, 2, 32))
    args[0].requires_grad_()
    canonical(args).sum().backward()
    assert args[0].grad.abs().sum() > 0
    found = gpu_kernels(*args[1:2], *args[3:6], *args[9:], torch.float32, bias=False)
    assert "and its gradients" in found.text and not any(w.requires_grad for (w,) in args[4:6])
    assert {"triton_backward_back_1.py", "triton_backward_up_0.py"} <= found.texts().keys()


@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_opcheck(sparse):
    args = operands(6, 4, 2, 3, 32, 32, "separate", "out_in", True)
    kernel = spec_of("float32", Pattern(1, 2, 32) if sparse else None, ACTIVATIONS["separate"]).name
    if sparse:
        _, args = packed_operands(args, SparsityConfig(1, 2, 32))
        args[3:6] = [[w.packed.values, w.packed.metadata, w.packed.selection] for (w,) in args[3:6]]
    torch.library.opcheck(
        torch.ops.samoyeds.gpu_experts.default, (*args[:9], kernel, 32, "separate", "out_in", torch.float32, "triton"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


@pytest.mark.parametrize("index", [3, 4, 5, 6, 8])
def test_operands_that_would_be_read_beyond_their_end_are_refused(index):
    args = operands(6, 4, 2, 3, 32, 32, "separate", "out_in", True)
    args[index] = args[index][:-1] if torch.is_tensor(args[index]) else [args[index][0][:, :-1]]
    kernel = spec_of("float32", None, ACTIVATIONS["separate"]).name
    with pytest.raises(OperandError):
        torch.ops.samoyeds.gpu_experts(*args[:9], kernel, 32, "separate", "out_in", torch.float32, "triton")


def test_form_of_weights():
    args = operands(6, 4, 2, 3, 32, 48, "interleaved", "in_out", False)
    assert weight_form(*args[3:6], "interleaved", "in_out", False) == Form(True, True, True, False)
    args = operands(6, 4, 2, 3, 24, 48, "concatenated", "out_in", True)
    assert weight_form(*args[3:6], "concatenated", "out_in", True) == Form(False, False, False, True)


# -------------------------------------------------------------------------------------------------- the whole way


@pytest.fixture
def as_if_cuda(monkeypatch):
    """Blocks on the CPU are lowered as those on a CUDA device are."""

    def choose(ids, gate, up, down, *options, bias=False, triton=None, measure=False, layouts=None):
        packed = isinstance(up[0], PackedTensor)
        return gpu_choice(packed, gpu_kernels(ids, gate, up, down, *options, bias=bias, measure=measure))

    monkeypatch.setattr(stages, "choose_kernel", choose)
    proven.cache_clear()
    yield
    proven.cache_clear()


def compiled_and_eager(report, dump=None):
    model, x = Block(width=32).eval(), torch.randn(6, 16)
    with torch.no_grad():
        compiled = torch.compile(model, backend="samoyeds", options={"report": report, "dump": dump})
        return compiled(x), model(x)


def test_compiled(as_if_cuda, tmp_path):
    report = Report()
    found, expected = compiled_and_eager(report, tmp_path)
    torch.testing.assert_close(found, expected)
    assert "Triton kernels of float32 dense swiglu" in str(report)
    texts = sorted((tmp_path / "graph_000" / "kernels").iterdir())
    assert {path.name.rsplit("_", 1)[0] for path in texts} == {"triton_up", "triton_down"}
    assert all("@triton.jit" in path.read_text() for path in texts)


def training_step(model, x, forward):
    out = forward(x)
    return [out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))]


@pytest.mark.parametrize(("style", "bias"), [("grouped", False), ("gathered", True)])
def test_compiled_training_step(as_if_cuda, style, bias, tmp_path):
    """The result and the gradients of all parameters, through AOTAutograd; both ops are in its graphs."""
    report, model, x = Report(), Block(style, width=32, bias=bias), torch.randn(6, 16)
    compiled = torch.compile(
        model, backend="samoyeds", options={"report": report, "dump": tmp_path, "base": "aot_eager"}
    )
    with torch.profiler.profile() as profile:
        found = training_step(model, x, compiled)
    for mine, theirs in zip(found, training_step(model, x, model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert {"samoyeds::gpu_experts", "samoyeds::gpu_experts_backward"} <= {event.name for event in profile.events()}
    assert "Triton kernels of float32 dense swiglu and its gradients" in str(report)
    texts = {path.name.rsplit("_", 1)[0] for path in (tmp_path / "graph_000" / "kernels").iterdir()}
    assert texts == {"triton_up", "triton_down", "triton_backward", "triton_backward_up", "triton_backward_down"}


def test_compiled_training_with_a_wrong_gradient(as_if_cuda, monkeypatch):
    """It is refused, the report says so, and training is PyTorch's."""
    monkeypatch.setattr(gpu, "gradients_proven", lambda *a: prove_gradients.prove_gradients(*a, outer=lambda *b: None))
    report, model, x = Report(), Block(width=32), torch.randn(6, 16)
    compiled = torch.compile(model, backend="samoyeds", options={"report": report, "base": "aot_eager"})
    for mine, theirs in zip(training_step(model, x, compiled), training_step(model, x, model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert "Triton kernels were refused: the gradient of a float32 weight" in str(report)


@pytest.mark.parametrize(
    ("packed", "option", "reason"),
    [(True, None, None), (False, None, "not timed"), (False, True, None), (True, False, "switched off")],
)
def test_option(packed, option, reason):
    """Packed weights take kernels unless told otherwise, dense ones only if told to."""
    found = switched_off(packed, option)
    assert found is None if reason is None else reason in found


def test_compiled_with_a_wrong_kernel(as_if_cuda, monkeypatch):
    """It is refused, the report says so, and the products are PyTorch's."""

    def planted(name):
        return template(name).replace("tl.dot(w, x,", "tl.dot(w, 2 * x,")

    monkeypatch.setattr(emitter, "template", planted)
    projection.cache_clear()
    report = Report()
    found, expected = compiled_and_eager(report)
    projection.cache_clear()
    torch.testing.assert_close(found, expected)
    assert "Triton kernels were refused: up float32 dense swiglu" in str(report)


def test_weights_of_the_cpu_keep_their_kernel():
    """Also where Triton interprets."""
    args = operands(7, 4, 2, 3, 32, 32, "concatenated", "out_in", False)
    with torch.no_grad():
        choice = kernels.choose_kernel(args[1], *args[3:6], *args[9:], torch.float32)
    assert not choice.kinds and choice.op in (None, torch.ops.samoyeds.experts_dense.default)

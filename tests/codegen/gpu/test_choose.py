"""Which candidate the cost model takes, and that measured results overrule it; no device, no time."""

import json
from dataclasses import replace

import pytest
import torch

from samoyeds_codegen.cuda.spec import MOST_EXPERTS, VARIANTS
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.gpu import choose as chooser
from samoyeds_codegen.gpu.candidate import KINDS, TOKENS, candidates, projection, variant_of
from samoyeds_codegen.gpu.choose import choose, regime
from samoyeds_codegen.gpu.cost import Block, answered_share, cost, wgmma_share
from samoyeds_codegen.gpu.device import NONE, Device, device_of
from samoyeds_codegen.gpu.results import keep, key, of_block, path, stored
from samoyeds_codegen.gpu.tune import MOST, tune
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.spec import ExpertsSpec, Pattern
from samoyeds_compile.lower.gpu import usable

H200 = Device("H200", (9, 0), 132, 1.98e9, 4.8e12)
A100 = Device("A100", (8, 0), 108, 1.41e9, 2.0e12)
BLACKWELL = Device("RTX 5090", (12, 0), 170, 2.4e9, 1.8e12)
MIXTRAL, QWEN = Block(8, 4096, 14336), Block(128, 2048, 768)
SWIGLU = "silu(gate) * up"
ALL = " ".join(KINDS)


def spec(n=1, m=2, vector=128, dtype="bfloat16", group=1) -> ExpertsSpec:
    return ExpertsSpec(dtype, Pattern(n, m, vector, group), SWIGLU, True)


DENSE = ExpertsSpec("bfloat16", None, SWIGLU, True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMOYEDS_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    chooser.forget()
    yield
    chooser.forget()


def kinds_of(found) -> set[str]:
    return {candidate.kind for candidate in found}


@pytest.mark.parametrize(
    ("block", "device", "kinds"),
    [
        (spec(), H200, set(KINDS)),
        (spec(vector=32), H200, {"triton", "mma", "wgmma", "pairs", "token_pairs"}),
        (spec(), A100, {"triton", "mma"}),
        (DENSE, H200, {"triton"}),
        (spec(dtype="float32"), H200, {"triton"}),
        (spec(vector=16), H200, {"triton"}),
    ],
)
def test_candidates(block, device, kinds) -> None:
    """A kind without a kernel for a block or a device is no candidate, whatever the reason."""
    found = candidates(block, KINDS, device.capability)
    assert kinds_of(found) == kinds and len(found) <= 14 and len({str(c) for c in found}) == len(found)


def test_candidates_are_what_runs() -> None:
    block = spec(vector=64)
    for candidate in candidates(block, tuple(TOKENS), H200.capability):
        for op in ("up", "down"):
            kernel = projection(block, op, candidate.kind, candidate.slots, H200.capability)
            assert kernel.slots == candidate.slots and kernel.variant == variant_of(candidate.kind)


@pytest.mark.parametrize("device", [H200, A100, BLACKWELL], ids=lambda d: d.name)
@pytest.mark.parametrize("pattern", [(1, 1, 32), (1, 2, 32), (2, 4, 64)], ids=str)
@pytest.mark.parametrize("block", [MIXTRAL, QWEN], ids=["mixtral", "qwen"])
def test_a_choice_for_every_size(block, pattern, device) -> None:
    """Of all that are allowed, by any number of slots; tiles never shrink as tokens become more."""
    tiles = []
    for slots in (0, 1, 2, 16, 128, 1000, 16384, 1 << 20):
        found = choose(spec(*pattern), block, slots, device, ALL)
        assert found in candidates(spec(*pattern), KINDS, device.capability)
        tiles.append(found.slots)
    assert tiles[-1] > tiles[0]


def test_few_tokens_take_small_tiles_and_many_large_ones() -> None:
    """One token of 8 experts is padding in any larger tile; 2,048 slots of each would read weights again and again."""
    for kinds in ("triton", "mma", "wgmma"):
        found = candidates(spec(), (kinds,), H200.capability)
        assert choose(spec(), MIXTRAL, 2, H200, kinds).slots == min(c.slots for c in found)
        assert choose(spec(), MIXTRAL, 16384, H200, kinds).slots == max(c.slots for c in found)


def test_cost_obeys_its_bounds() -> None:
    """No block is faster than memory gives its weights, and more slots never take less time."""
    for block_spec, density in ((spec(), 0.28125), (spec(1, 1, 32), 0.5625), (DENSE, 1.0)):
        weights = 3 * 2 * density * MIXTRAL.experts * MIXTRAL.hidden * MIXTRAL.width
        for candidate in candidates(block_spec, KINDS, H200.capability):
            times = [cost(candidate, block_spec, MIXTRAL, s, H200) for s in (1, 16, 256, 4096, 65536)]
            assert times == sorted(times)
            assert times[2] > weights / H200.bandwidth


def test_share_of_sparse_warpgroups() -> None:
    """KERNELS: 0.50 of the sparse rate with 128 tokens, as shared memory is the limit."""
    assert wgmma_share(128) == pytest.approx(0.5, abs=0.01)
    assert wgmma_share(16) < 0.2 and wgmma_share(128, VARIANTS["pairs"]) < wgmma_share(128)


def test_share_of_weights_in_registers() -> None:
    """More of the rate with many tokens; few are multiplied before the cache answers."""
    assert wgmma_share(128) < wgmma_share(128, VARIANTS["registers"]) < 2 / 3
    assert wgmma_share(128, VARIANTS["register_pairs"]) > wgmma_share(128, VARIANTS["token_pairs"])
    assert answered_share(16, H200) < 0.2 < 1 < answered_share(128, H200)


def test_pairs_read_weights_once() -> None:
    """That is less from the cache with many tokens; with few, one of two blocks has nothing but copies to do."""
    one, two = (candidates(spec(), (kind,), H200.capability)[-1] for kind in ("wgmma", "pairs"))
    assert two.slots == 2 * one.slots
    many, few = ([cost(c, spec(), MIXTRAL, slots, H200) for c in (one, two)] for slots in (65536, 64))
    assert many[1] < 0.9 * many[0] and few[1] > few[0]


def test_pairs_read_tokens_once() -> None:
    """They are more bytes than packed weights are, so that is worth more."""
    alone, weights, rows = (
        cost(candidates(spec(), (kind,), H200.capability)[-1], spec(), MIXTRAL, 65536, H200)
        for kind in ("wgmma", "pairs", "token_pairs")
    )
    assert rows < weights < alone


def test_more_experts_than_a_routing_plan_of_cuda_has() -> None:
    """Triton's is PyTorch's, for any number."""
    many = replace(MIXTRAL, experts=MOST_EXPERTS + 1)
    assert choose(spec(), many, 16384, H200, ALL).kind == "triton"
    with pytest.raises(UnsupportedSpecError, match="1025 experts"):
        choose(spec(), many, 16384, H200, "mma wgmma")
    ids = torch.zeros(4, 2, dtype=torch.int64)
    refused = usable(spec(), Form(), many, ids, torch.device("cpu"), measure=False)[1]
    assert "not 1025" in refused["mma"] and "1025" not in refused["triton"]


def test_regimes() -> None:
    assert [regime(s) for s in (0, 1, 2, 3, 128, 129)] == [1, 1, 2, 4, 128, 256]


def test_device_that_is_none() -> None:
    assert device_of(torch.device("cpu")) is NONE


class Timer:
    """Milliseconds by the number of the call."""

    def __init__(self, *times: float) -> None:
        self.times, self.calls = list(times), 0

    def __call__(self, call: object) -> float:
        assert callable(call)
        self.calls += 1
        return self.times[(self.calls - 1) % len(self.times)]


SMALL = Block(2, 64, 32)


def tuned(timer: Timer, slots=(8,), kinds=KINDS) -> None:
    tune(spec(), SMALL, slots, torch.device("cpu"), A100, kinds, timer, progress=False)


def test_measured_results_decide() -> None:
    """The third that is measured is the fastest; without the word the model still decides."""
    before = choose(spec(), SMALL, 8, A100, ALL)
    tuned(Timer(3.0, 2.0, 1.0, 4.0, 5.0, 6.0))
    times = stored(A100)[key(spec(), SMALL, 8)]
    assert len(times) <= MOST and min(times, key=times.__getitem__) == list(times)[2]
    assert str(choose(spec(), SMALL, 8, A100, f"{ALL} tuned")) == list(times)[2]
    assert choose(spec(), SMALL, 8, A100, ALL) == before
    tuned(Timer(1.0), slots=(64,))
    keep(A100, {key(spec(), QWEN, 8): {"x": 1.0}})
    assert of_block(spec(), SMALL, A100).keys() == {key(spec(), SMALL, 8), key(spec(), SMALL, 64)}
    assert choose(spec(), SMALL, 4096, A100, f"{ALL} tuned") == choose(spec(), SMALL, 4096, A100, ALL)


def test_nothing_is_measured_twice() -> None:
    timer = Timer(1.0)
    tuned(timer, (5, 8))  # of one regime
    once = timer.calls
    tuned(timer)
    assert timer.calls == once > 1
    tuned(timer, (8, 64))
    assert timer.calls > once


def test_a_result_of_a_kind_that_is_not_allowed_is_not_taken() -> None:
    tuned(Timer(1.0, 9.0))
    assert choose(spec(), SMALL, 8, A100, "mma tuned").kind == "mma"


def test_candidates_that_fail_are_left_out() -> None:
    """The first three raise; of the rest the fastest is taken."""

    class Failing(Timer):
        def __call__(self, call: object) -> float:
            if super().__call__(call) == 0:
                raise RuntimeError("an illegal instruction")
            return float(self.calls)

    tuned(Failing(0, 0, 0, 1, 1, 1))
    times = stored(A100)[key(spec(), SMALL, 8)]
    assert str(choose(spec(), SMALL, 8, A100, f"{ALL} tuned")) == next(iter(times))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 3}', json.dumps({"a": {"b": "c"}})])
def test_a_file_that_makes_no_sense(text) -> None:
    path(A100).write_text(text)
    assert stored(A100) == {}
    assert choose(spec(), SMALL, 8, A100, f"{ALL} tuned") == choose(spec(), SMALL, 8, A100, ALL)
    keep(A100, {"x": {"y": 1.0}})
    assert stored(A100) == {"x": {"y": 1.0}}


def test_a_cache_that_cannot_be_written(monkeypatch) -> None:
    """The model decides then."""
    monkeypatch.setenv("SAMOYEDS_CACHE_DIR", "/proc/nowhere")
    tuned(Timer(1.0))
    assert choose(spec(), SMALL, 8, A100, f"{ALL} tuned") == choose(spec(), SMALL, 8, A100, ALL)

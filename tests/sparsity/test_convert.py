"""`convert_checkpoint` writes what `sparsify_` and `save_sparse` would, without ever holding the model."""

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    core_model_loading,
)

from samoyeds_compile.errors import CheckpointError, SparsityError
from samoyeds_compile.sparsity import PackedTensor, SparsityConfig, load_sparse, load_sparse_, save_sparse, sparsify_
from samoyeds_compile.sparsity.convert import convert_checkpoint
from samoyeds_compile.sparsity.shards import INDEX, ShardWriter
from tests.sparsity.experts_models import ListedModel, build

PATTERN = SparsityConfig(1, 2, 32)
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


class ListedConfig(PreTrainedConfig):
    model_type = "samoyeds_listed"


class ListedForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ListedConfig

    def __init__(self, config: ListedConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(ListedModel() for _ in range(3))
        self.post_init()


AutoConfig.register(ListedConfig.model_type, ListedConfig)
AutoModelForCausalLM.register(ListedConfig, ListedForCausalLM)


def mixtral(layers: int = 3, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(num_local_experts=4, num_key_value_heads=2, num_hidden_layers=layers, **SIZES, **changes)
    return MixtralForCausalLM(config)


MODELS = {
    "mixtral": mixtral,
    "tied, bfloat16": lambda: mixtral(tie_word_embeddings=True).to(torch.bfloat16),
    "listed": lambda: ListedForCausalLM(ListedConfig()),
} | {name: lambda name=name: build(name)[0] for name in ("qwen3_moe", "gpt_oss", "nemotron_h", "dbrx", "jetmoe")}


def convert(folder: Path, output: Path, **arguments):
    return convert_checkpoint(
        str(folder), AutoConfig.from_pretrained(folder), output, PATTERN, progress=False, **arguments
    )


def same(a: Tensor, b: Tensor) -> bool:
    if not isinstance(a, PackedTensor) or not isinstance(b, PackedTensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    parts = zip(a.__tensor_flatten__()[0], b.__tensor_flatten__()[0], strict=True)
    return a.form == b.form and all(n == m and same(getattr(a, n), getattr(b, m)) for n, m in parts)


@pytest.mark.parametrize("shard", ["50KB", "1GB"])
@pytest.mark.parametrize("name", MODELS)
def test_is_what_sparsify_makes(name, shard, tmp_path):
    """Bit for bit, from one file or several, into one or several; the report is the same too."""
    MODELS[name]().save_pretrained(tmp_path / "dense", max_shard_size=shard)
    several = (tmp_path / "dense" / INDEX).exists()
    assert several == (shard == "50KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    expected = sparsify_(model, PATTERN, method="magnitude", progress=False)
    save_sparse(model, tmp_path / "whole.safetensors")
    report = convert(tmp_path / "dense", tmp_path / "packed", shard_bytes=30_000 if several else 1 << 30)
    assert report == expected
    files = list((tmp_path / "packed").glob("*.safetensors"))
    assert len(files) > 2 if several else len(files) == 1
    one, other = load_sparse(tmp_path / "whole.safetensors"), load_sparse(tmp_path / "packed")
    assert one.keys() == other.keys()
    assert [key for key in one if not same(one[key], other[key])] == []
    assert sum(isinstance(tensor, PackedTensor) for tensor in other.values()) == len(expected.parameters)


def test_loads_into_a_model(tmp_path):
    model = mixtral().eval()
    model.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed", shard_bytes=10_000)
    fresh, ids = mixtral().eval(), torch.arange(6)[None]
    load_sparse_(fresh, tmp_path / "packed")
    sparsify_(model, PATTERN, method="magnitude", progress=False)
    assert torch.equal(model(ids).logits, fresh(ids).logits)


@pytest.fixture
def alive() -> Iterator[Callable[[], int]]:
    """Bytes of all tensors with values that were made since."""

    def count() -> int:
        storages = {}
        for found in gc.get_objects():
            if issubclass(type(found), Tensor) and type(found) is not PackedTensor and found.device.type == "cpu":
                storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
        return sum(storages.values())

    gc.freeze()  # what there is already is not listed, which would take long
    yield count
    gc.unfreeze()


def test_holds_one_parameter_at_a_time(tmp_path, monkeypatch, alive):
    """At every point where a parameter is complete or a tensor is written; the model is many times larger."""
    model = mixtral(layers=12)
    model.save_pretrained(tmp_path / "dense", max_shard_size="300KB")
    whole = sum(p.nbytes for p in model.parameters())
    stack = max(p.nbytes for p in model.parameters())
    assert alive() >= whole
    del model
    gc.collect()
    assert alive() < stack
    most = [0]

    def watched(function):
        def watching(*args, **kwargs):
            most.append(alive())
            return function(*args, **kwargs)

        return watching

    monkeypatch.setattr(core_model_loading, "set_param_for_module", watched(core_model_loading.set_param_for_module))
    monkeypatch.setattr(ShardWriter, "add", watched(ShardWriter.add))
    monkeypatch.setattr(ShardWriter, "_write", watched(ShardWriter._write))
    shard = 50_000
    convert(tmp_path / "dense", tmp_path / "packed", shard_bytes=shard)
    assert len(most) > 50 and max(most) >= stack
    # The dense parameter, what it is merged of, its packed form, and what waits for its file.
    assert max(most) <= 2.5 * stack + shard < whole / 6


def lacking(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_experts(folder):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if "layers.2" not in name or "experts" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def infinite(folder):
    tensors = load_file(folder / "model.safetensors")
    next(t for name, t in tensors.items() if "layers.2" in name and "experts" in name)[0, 0] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_eight_bits(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "experts" in name)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def changed_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def index_of(content):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / INDEX).write_text(content)

    return change


BAD = {
    "q_proj.weight: the checkpoint lacks it": (CheckpointError, lacking),
    "model.layers.2.mlp.experts.*lacks it": (CheckpointError, without_experts),
    "infinite or NaN": (SparsityError, infinite),
    "cannot be read": (CheckpointError, truncated),
    "has neither model.safetensors nor": (CheckpointError, lambda f: (f / "model.safetensors").unlink()),
    "is quantized": (CheckpointError, changed_config(quantization_config={"quant_method": "fp8"})),
    "experts.*is quantized": (CheckpointError, in_eight_bits),
    "is no index": (CheckpointError, index_of("{")),
    "lie beside their index": (CheckpointError, index_of('{"weight_map": {"a": "../a.safetensors"}}')),
    "which is in its index": (CheckpointError, index_of('{"weight_map": {"a": "a.safetensors"}}')),
    "instead of": (CheckpointError, changed_config(vocab_size=65)),
}


@pytest.mark.parametrize("why", BAD)
def test_bad_checkpoints_leave_nothing(why, tmp_path):
    mixtral().save_pretrained(tmp_path / "dense")
    error, change = BAD[why]
    change(tmp_path / "dense")
    with pytest.raises(error, match=why):
        convert(tmp_path / "dense", tmp_path / "out" / "packed", shard_bytes=1000)
    assert not any(path.is_file() for path in tmp_path.glob("out/**/*")) and not (tmp_path / "out" / "packed").exists()


def test_interrupted(tmp_path, monkeypatch):
    """Ctrl-C while the third file is written."""
    mixtral().save_pretrained(tmp_path / "dense")
    write = ShardWriter._write

    def interrupted(self):
        if len(self.files) == 2:
            assert [path.name for path in tmp_path.iterdir() if path.name.startswith("making-")]
            raise KeyboardInterrupt
        write(self)

    monkeypatch.setattr(ShardWriter, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "dense", tmp_path / "packed", shard_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_does_not_overwrite(tmp_path):
    mixtral().save_pretrained(tmp_path / "dense")
    (tmp_path / "packed").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        convert(tmp_path / "dense", tmp_path / "packed")
    assert not list((tmp_path / "packed").iterdir())


def test_tensors_without_a_place_are_noted(tmp_path):
    mixtral().save_pretrained(tmp_path / "dense")
    changed_config(num_hidden_layers=2)(tmp_path / "dense")
    report = convert(tmp_path / "dense", tmp_path / "packed")
    assert "have no place in the model" in report.notes[0] and "layers.2" in report.notes[0]
    assert not any("layers.2" in name for name in load_sparse(tmp_path / "packed"))


def rewrite_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


DAMAGES = {
    "is not there": lambda f: (f / INDEX).unlink(),
    "has no model-00001": lambda f: (f / "model-00001.safetensors").unlink(),
    "its files lack more": lambda f: rewrite_index(f, lambda where: where.update(more="model-00001.safetensors")),
}


@pytest.mark.parametrize("why", DAMAGES)
def test_damaged_folders(why, tmp_path):
    mixtral().save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed", shard_bytes=30_000)
    DAMAGES[why](tmp_path / "packed")
    with pytest.raises(CheckpointError, match=why):
        load_sparse(tmp_path / "packed")

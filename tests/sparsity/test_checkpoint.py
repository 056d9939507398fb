"""Files of packed weights: what is written comes back, and nothing else is taken for it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from samoyeds_compile.errors import CheckpointError
from samoyeds_compile.sparsity import PackedTensor, SparsityConfig, load_sparse, load_sparse_, save_sparse
from tests.sparsity.test_tensor import pruned

CONFIGS = [SparsityConfig(1, 2, 32), SparsityConfig(1, 1, 16), SparsityConfig(2, 4, 16, "none", 2)]


class Model(nn.Module):
    """A packed matrix, a packed stack, packed matrices one below the other, and a dense parameter."""

    def __init__(self, config: SparsityConfig) -> None:
        super().__init__()
        self.one = nn.Parameter(PackedTensor.from_dense(pruned((24, 40), config), config), requires_grad=False)
        stack = PackedTensor.from_dense(pruned((3, 20, 7), config, True), config, transposed=True)
        flat = PackedTensor.from_dense(pruned((3, 20, 7), config).view(60, 7), config, flat=3)
        both = {"stack": stack, "flat": flat}
        self.inner = nn.ParameterDict({name: nn.Parameter(w, requires_grad=False) for name, w in both.items()})
        self.bias = nn.Parameter(torch.randn(24))
        self.register_buffer("steps", torch.tensor(3))

    def weights(self):
        return [self.one.to_dense(), *(w.to_dense() for w in self.inner.values()), self.bias, self.steps]


def same(a: Model, b: Model) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.weights(), b.weights(), strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back(config, dtype, tmp_path):
    model, other = Model(config).to(dtype), Model(config).to(dtype)
    save_sparse(model, tmp_path / "w.safetensors")
    state = load_sparse(tmp_path / "w.safetensors")
    assert state.keys() == model.state_dict().keys() and isinstance(state["one"], PackedTensor)
    other.load_state_dict(state)
    assert same(model, other) and other.one.form == model.one.form
    assert "one.values" in load_file(tmp_path / "w.safetensors")  # any reader of safetensors can open it


def test_into_a_dense_model(tmp_path):
    """Parameters become packed where the file has packed ones."""
    model, dense = Model(CONFIGS[0]), Model(CONFIGS[0])
    dense.one = nn.Parameter(torch.randn(24, 40))
    dense.inner["stack"] = nn.Parameter(torch.randn(3, 20, 7))
    save_sparse(model, tmp_path / "w.safetensors")
    load_sparse_(dense, tmp_path / "w.safetensors")
    assert isinstance(dense.one, PackedTensor) and same(model, dense)


def damaged(path, **changes):
    """The file with tensors replaced, removed (None), or another header."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    header = changes.pop("header", header)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path, metadata=header)


def other_version(path):
    damaged(path, header={"samoyeds": json.dumps({"version": 2, "packed": {}})})


def truncated(path):
    path.write_bytes(path.read_bytes()[:-40])


def twice(path):
    model = nn.Module()
    config = SparsityConfig(2, 4, 16)
    model.one = nn.Parameter(PackedTensor.from_dense(pruned((8, 32), config), config), requires_grad=False)
    save_sparse(model, path)
    damaged(path, one__selection=load_file(path)["one.selection"] * 0)


DAMAGES = {
    "format version 2": other_version,
    "holds no packed weights": lambda p: damaged(p, header={}),
    "is damaged": lambda p: damaged(p, header={"samoyeds": "{"}),
    "cannot be read": truncated,
    "has no metadata": lambda p: damaged(p, one__metadata=None),
    "has values of shape": lambda p: damaged(p, one__values=torch.zeros(4, 4)),
    "has metadata of dtype": lambda p: damaged(p, one__metadata=load_file(p)["one.metadata"].int()),
    "sub-rows that do not exist": lambda p: damaged(p, one__selection=load_file(p)["one.selection"] + 2),
    "or one twice": twice,
    "do not ascend": lambda p: damaged(p, one__metadata=load_file(p)["one.metadata"] * 0),
}


@pytest.mark.parametrize("why", DAMAGES)
def test_damaged_files(why, tmp_path):
    model, path = Model(CONFIGS[0]), tmp_path / "w.safetensors"
    save_sparse(model, path)
    DAMAGES[why](path)
    with pytest.raises(CheckpointError, match=why):
        load_sparse(path)


def test_another_model(tmp_path):
    """The model is unchanged."""
    save_sparse(Model(CONFIGS[0]), tmp_path / "w.safetensors")
    for change in (
        lambda m: setattr(m, "more", nn.Parameter(torch.ones(2))),
        lambda m: setattr(m, "bias", nn.Parameter(torch.ones(3))),
    ):
        model = Model(CONFIGS[0])
        change(model)
        before = [w.clone() for w in model.weights()]
        with pytest.raises(CheckpointError, match=r"(load it into its own model|made of)"):
            load_sparse_(model, tmp_path / "w.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(before, model.weights(), strict=True))

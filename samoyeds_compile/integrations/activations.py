"""What an activation module of torch or transformers computes, as an expression of `samoyeds_codegen.expr`."""

from __future__ import annotations

from torch import nn

from samoyeds_compile.integrations.family import Unsupported

_BY_CLASS: dict[str, str] = {
    "GELU": "gelu({})",
    "GELUActivation": "gelu({})",
    "GELUTanh": "gelu({}, 'tanh')",
    "Mish": "mish({})",
    "MishActivation": "mish({})",
    "NewGELUActivation": "gelu({}, 'tanh')",
    "PytorchGELUTanh": "gelu({}, 'tanh')",
    "ReLU": "relu({})",
    "ReLUSquaredActivation": "square(relu({}))",
    "SiLU": "silu({})",
    "SiLUActivation": "silu({})",
    "Sigmoid": "sigmoid({})",
    "Tanh": "tanh({})",
}


def expression_of(activation: nn.Module, of: str) -> str:
    """The expression that an activation module computes of the name ``of``.

    Raises:
        Unsupported: the module is none that is known here.
    """
    template = _BY_CLASS.get(type(activation).__name__)
    if template is None or getattr(activation, "approximate", "none") not in ("none", "tanh"):
        raise Unsupported(f"its activation {type(activation).__name__} is not known here")
    if type(activation) is nn.GELU and activation.approximate == "tanh":
        template = "gelu({}, 'tanh')"
    return template.format(of)

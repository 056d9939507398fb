"""Catalogue of the MoE families in the installed transformers, each as a tiny model with random weights.

The list of families comes from the library itself: every Experts class which is decorated with
`transformers.integrations.use_experts_implementation`. `tests.models.recipes` says, as data, what a family
needs besides the common toy sizes; a family without a recipe is attempted with the common sizes alone, so a
newer transformers with new families is covered without an edit here.
"""

import ast
import copy
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.models.recipes import RECIPES, TINY, UNDECORATED, Recipe

DECORATOR = "use_experts_implementation"
WEIGHT_STD = 0.05
# Guards the attempts without a recipe: a config whose size fields we do not know keeps its full size.
MAX_PARAMETERS = 20_000_000


class CannotBuild(Exception):
    """No recipe gives a model which contains the wanted class; `reason` says what went wrong."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class ExpertsClass:
    """One class of experts in a modeling file of transformers; `id` is stable and fit for a test id."""

    module: str
    name: str
    model_type: str
    id: str

    def load(self) -> type[nn.Module]:
        return getattr(importlib.import_module(self.module), self.name)


# ---------------------------------------------------------------------------------------- enumeration


@functools.cache
def decorated_experts_classes() -> list[ExpertsClass]:
    """All classes decorated with `use_experts_implementation` in the installed library, sorted by id."""
    found = [(path, name) for path in _modeling_files() for name in _decorated_names(path)]
    per_folder = Counter(path.parent.name for path, _ in found)
    entries = [_entry(path, name, per_folder[path.parent.name] > 1) for path, name in found]
    return sorted(entries, key=lambda entry: entry.id)


@functools.cache
def undecorated() -> list[ExpertsClass]:
    """Families whose MoE is not decorated: look-alikes, and loops which Dynamo cannot capture."""
    present = {path.parent.name for path in _modeling_files()}
    present -= {entry.model_type for entry in decorated_experts_classes()}
    return [
        ExpertsClass(f"transformers.models.{folder}.modeling_{folder}", recipe.experts, folder, folder)
        for folder, recipe in UNDECORATED.items()
        if folder in present
    ]


def _modeling_files() -> list[Path]:
    spec = importlib.util.find_spec("transformers.models")
    return sorted(Path(spec.submodule_search_locations[0]).glob("*/modeling_*.py"))


def _decorated_names(path: Path) -> list[str]:
    """Names of the decorated classes of one file, which is parsed and not imported."""
    source = path.read_text(encoding="utf-8")
    if f"@{DECORATOR}" not in source:  # Parsing all of the library's modeling files takes over ten seconds.
        return []
    classes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))
    return [node.name for node in classes if any(map(_is_the_decorator, node.decorator_list))]


def _is_the_decorator(decorator: ast.expr) -> bool:
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    return DECORATOR in (getattr(target, "id", None), getattr(target, "attr", None))


def _entry(path: Path, name: str, shares_folder: bool) -> ExpertsClass:
    folder = path.parent.name
    module = f"transformers.models.{folder}.{path.stem}"
    return ExpertsClass(module, name, folder, f"{folder}-{name}" if shares_folder else folder)


# ---------------------------------------------------------------------------------------------- build


def recipe_of(experts_class: ExpertsClass) -> Recipe:
    """The recipe of a class: its own, its family's, or an empty one."""
    if experts_class.id in UNDECORATED:
        return UNDECORATED[experts_class.id]
    return RECIPES.get(experts_class.id) or RECIPES.get(experts_class.model_type) or Recipe()


def build(experts_class: ExpertsClass, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A tiny model in eval mode which contains `experts_class`; equal seeds give equal weights."""
    model_class = _model_class(experts_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        recipe = recipe_of(experts_class)
        model = _construct(model_class, recipe, dtype)
        _keep_in_fp32(model, dtype)
        _randomise(model, recipe)
    return model.eval()


@functools.cache
def _model_class(experts_class: ExpertsClass) -> type[PreTrainedModel]:
    """The first candidate which can be constructed and contains the experts."""
    recipe = recipe_of(experts_class)
    reasons = []
    for candidate in _candidates(experts_class, recipe):
        reason = _obstacle(candidate, recipe, experts_class.load())
        if reason is None:
            return candidate
        reasons.append(f"{candidate.__name__}: {reason}")
    raise CannotBuild("; ".join(reasons) or f"no model class in {experts_class.module}")


def _candidates(experts_class: ExpertsClass, recipe: Recipe) -> list[type[PreTrainedModel]]:
    module = importlib.import_module(experts_class.module)
    if recipe.model:
        return [getattr(module, recipe.model)]
    ranked = [(rank, cls) for cls in _model_classes(module) if (rank := _rank(cls)) is not None]
    return [cls for _, cls in sorted(ranked, key=lambda pair: pair[0])]


def _model_classes(module: ModuleType) -> Iterator[type[PreTrainedModel]]:
    for cls in vars(module).values():
        is_model = inspect.isclass(cls) and issubclass(cls, PreTrainedModel)
        if is_model and cls.__module__ == module.__name__:
            yield cls


def _rank(model_class: type[PreTrainedModel]) -> int | None:
    """Preference of a model class, lowest first; None for classes which do not take tokens."""
    arguments = inspect.signature(model_class.forward).parameters
    if not {"input_ids", "inputs_embeds"} & set(arguments):
        return None
    suffixes = ("ForCausalLM", "TextModel", "Model")
    return next((rank for rank, suffix in enumerate(suffixes) if model_class.__name__.endswith(suffix)), None)


def _obstacle(model_class: type[PreTrainedModel], recipe: Recipe, wanted: type[nn.Module]) -> str | None:
    """Why `model_class` does not do, found out on the meta device, where even a huge model costs nothing."""
    try:
        with torch.device("meta"):
            model = _construct(model_class, recipe, torch.float32)
    except CannotBuild as error:
        return error.reason
    if not any(isinstance(module, wanted) for module in model.modules()):
        return f"contains no {wanted.__name__}"
    size = sum(parameter.numel() for parameter in model.parameters())
    return f"{size} parameters in spite of the toy sizes" if size > MAX_PARAMETERS else None


def _construct(model_class: type[PreTrainedModel], recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return model_class._from_config(_tiny_config(model_class.config_class, recipe), dtype=dtype)
    except Exception as error:  # Configs and models of any family may object in any way.
        raise CannotBuild(f"{type(error).__name__}: {error}") from error


def _tiny_config(config_class: type, recipe: Recipe) -> Any:
    fields = _field_names(config_class)
    values = {key: value for key, value in TINY.items() if key in fields} | dict(recipe.config)
    return config_class(**copy.deepcopy(values))


def _field_names(config_class: type) -> set[str]:
    """Names which a config takes: dataclass fields, and for older, handwritten configs the arguments."""
    names = set(inspect.signature(config_class.__init__).parameters)
    if dataclasses.is_dataclass(config_class):
        names |= {field.name for field in dataclasses.fields(config_class)}
    return names


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Do what `from_pretrained` does: some routers and norms stay in fp32, and their forward relies on it."""
    patterns = set()
    if dtype in (torch.float16, torch.bfloat16):
        patterns |= set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns):
            tensor.data = tensor.data.float()


@torch.no_grad()
def _randomise(model: nn.Module, recipe: Recipe) -> None:
    """Draw weights which make every term of the model count.

    The library's own initialisation leaves biases, router corrections and hash routes at zero and norms at
    one, where a rewrite could drop them unnoticed.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape) * WEIGHT_STD * _gain(name, recipe)
        parameter.copy_(noise if parameter.dim() >= 2 else parameter + noise)
    for name, buffer in model.named_buffers():
        if "bias" in name and buffer.is_floating_point():
            buffer.copy_(torch.randn(buffer.shape) * WEIGHT_STD)
        elif name.endswith("tid2eid"):
            buffer.copy_(_hash_routes(buffer, model.config.n_routed_experts))


def _gain(name: str, recipe: Recipe) -> float:
    return next((gain for fragment, gain in recipe.gains.items() if fragment in name), 1.0)


def _hash_routes(table: Tensor, num_experts: int) -> Tensor:
    """Random distinct experts for each token id (deepseek_v4 routes its first layers by such a table)."""
    vocabulary, top_k = table.shape
    return torch.rand(vocabulary, num_experts).topk(top_k, dim=-1).indices


# ------------------------------------------------------------------------------------ inputs, outputs


def inputs(
    experts_class: ExpertsClass, model: nn.Module, batch: int = 2, seq: int = 16, seed: int = 1
) -> dict[str, Tensor]:
    """Arguments for the model's forward, equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    names = recipe_of(experts_class).feed or _feed(model)
    return {name: _argument(name, model, (batch, seq), generator).to(model.device) for name in names}


def _feed(model: nn.Module) -> list[str]:
    """The tokens in the form which the forward takes them, and the decoder's where there is one."""
    arguments = inspect.signature(model.forward).parameters
    main = next(name for name in ("input_ids", "inputs_embeds") if name in arguments)
    return [main] + [name for name in ("decoder_input_ids",) if name in arguments]


def _argument(name: str, model: nn.Module, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    config = model.config.get_text_config()
    if name.endswith("input_ids"):  # Ids below 3 are the special tokens.
        return torch.randint(3, config.vocab_size, shape, generator=generator)
    if name == "dataset_index":
        return torch.arange(shape[0]) % config.num_experts
    if name == "inputs_embeds":
        return WEIGHT_STD * torch.randn((*shape, config.hidden_size), generator=generator).to(model.dtype)
    if name == "pixel_values":
        size = (shape[0], config.num_channels, *config.image_size)
        return torch.randn(size, generator=generator).to(model.dtype)
    raise ValueError(f"do not know how to make {name!r}")


def logits_of(output: Any) -> Tensor:
    """The main tensor of a model's output: logits, hidden state, or the last feature map of a backbone."""
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    if getattr(output, "feature_maps", None) is not None:
        return output.feature_maps[-1]
    return output[0]


def loss_of(output: Any) -> Tensor:
    """A scalar to take gradients of.

    A fixed projection and not the mean square, which after a final norm hardly depends on the weights.
    """
    values = logits_of(output).float().flatten()
    probe = torch.arange(values.numel(), device=values.device).cos()
    return (values * probe).sum() / values.numel() ** 0.5


# --------------------------------------------------------------------------------------- MoE blocks


def moe_blocks(model: nn.Module, experts_class: ExpertsClass | None = None) -> list[str]:
    """Paths of the modules whose class is `experts_class`; of all decorated classes if none is given."""
    entries = decorated_experts_classes() if experts_class is None else [experts_class]
    wanted = {(entry.module, entry.name) for entry in entries}
    return [path for path, module in model.named_modules() if _is_one_of(module, wanted)]


def _is_one_of(module: nn.Module, wanted: set[tuple[str, str]]) -> bool:
    """Compares names, so that the modeling files of all the other families need not be imported."""
    return any((cls.__module__, cls.__qualname__) in wanted for cls in type(module).__mro__)

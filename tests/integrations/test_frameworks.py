"""Training scripts of other libraries, unchanged but for the line that names the backend: losses of eager mode."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import lightning_fabric
import peft
import pytest
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

import samoyeds_compile
from samoyeds_compile import Report
from tests.integrations.test_training_loops import LanguageModel, loss_of
from tests.integrations.test_training_loops import batch as ids_of

STEPS = 3


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The name is known to accelerate during the test only, and its singletons start anew."""
    tables = ("_member_names_", "_member_map_", "_value2member_map_")
    before = {table: copy.copy(getattr(DynamoBackend, table)) for table in tables}
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # the Trainer sets it, and leaves it
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    samoyeds_compile.integrations.accelerate.register()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    for table, entries in before.items():
        setattr(DynamoBackend, table, entries)


def options(report: Report) -> dict[str, Any]:
    """The libraries copy options deeply, so a report in there would be filled unseen."""
    return {"base": "aot_eager", "report": lambda graph: report(graph)}


def assert_all_rewritten(report: Report) -> None:
    assert report.rewritten and len(report.rewritten) == len(report.blocks)


# ------------------------------------------------------------------------------------------------------- Trainer


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, head_dim=8,
    )  # fmt: skip
    return MixtralForCausalLM(config).train()


def trained(path: Path, model: nn.Module, **settings: Any) -> list[float]:
    """Losses that the Trainer logs, with accumulated and clipped gradients."""
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(32, (16, 12), generator=torch.Generator())]
    arguments = TrainingArguments(
        output_dir=str(path), report_to=[], use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_steps=STEPS, learning_rate=5e-3, disable_tqdm=True, logging_steps=1, save_strategy="no", **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_with_a_model_compiled_in_place(tmp_path: Path) -> None:
    expected, model, report = trained(tmp_path, mixtral()), mixtral(), Report()
    model.compile(backend="samoyeds", options=options(report))
    assert trained(tmp_path, model) == pytest.approx(expected, rel=1e-5)
    assert_all_rewritten(report)


def test_trainer_takes_the_name(registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--torch_compile_backend samoyeds``; the Trainer passes no options, so they come from the environment."""
    graphs: list[Any] = []
    monkeypatch.setenv("SAMOYEDS_BASE", "aot_eager")
    monkeypatch.setattr("samoyeds_compile.backend._log", graphs.append)
    expected = trained(tmp_path, mixtral())
    assert trained(tmp_path, mixtral(), torch_compile_backend="samoyeds") == pytest.approx(expected, rel=1e-5)
    assert graphs and all(block.rewritten for graph in graphs for block in graph.blocks)
    assert sum(len(graph.blocks) for graph in graphs) == len(graphs)


# ----------------------------------------------------------------------------------------------- accelerate, Fabric


def accelerated(plugin: TorchDynamoPlugin | None) -> list[float]:
    torch.manual_seed(0)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, dynamo_plugin=plugin, gradient_accumulation_steps=2)
    model = LanguageModel()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for step in range(2 * STEPS):
        with accelerator.accumulate(model):
            loss = loss_of(model, ids_of(step))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_accelerate(registered: None) -> None:
    """By regions, which is the longer way; as a whole is what the Trainer does above."""
    report, expected = Report(), accelerated(None)
    plugin = TorchDynamoPlugin(backend="samoyeds", options=options(report), use_regional_compilation=True)
    assert accelerated(plugin) == pytest.approx(expected, rel=1e-5)
    assert_all_rewritten(report)


def test_registering_twice_changes_nothing(registered: None) -> None:
    member, names = DynamoBackend("SAMOYEDS"), list(DynamoBackend)
    samoyeds_compile.integrations.accelerate.register()
    assert DynamoBackend("SAMOYEDS") is member is copy.deepcopy(member) and list(DynamoBackend) == names
    assert member.value == "SAMOYEDS" and "SAMOYEDS" in DynamoBackend and isinstance(member, DynamoBackend)
    with pytest.raises(ValueError, match="not a valid DynamoBackend"):
        TorchDynamoPlugin(backend="samoyed")


def fabricated(compile_: Callable[[nn.Module], Any]) -> list[float]:
    torch.manual_seed(0)
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = LanguageModel()
    wrapped, optimizer = fabric.setup(compile_(model), torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for step in range(STEPS):
        loss = loss_of(wrapped, ids_of(step))
        fabric.backward(loss)
        fabric.clip_gradients(wrapped, optimizer, max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_fabric() -> None:
    """``setup`` unwraps a compiled model and compiles it again around its own wrapper, options kept."""
    report, expected = Report(), fabricated(lambda model: model)
    found = fabricated(lambda model: torch.compile(model, backend="samoyeds", options=options(report)))
    assert found == pytest.approx(expected, rel=5e-3)
    assert_all_rewritten(report)


# ----------------------------------------------------------------------------------------------------------- peft

TARGETS = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


def adapted(path: Path, compile_: Callable[[nn.Module], None]) -> list[float]:
    model = mixtral()
    torch.manual_seed(1)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS))
    learned = {name.rpartition("lora_")[0] for name, p in lora.named_parameters() if p.requires_grad}
    assert len(learned) == 4
    assert all("lora_" in name for name, p in lora.named_parameters() if p.requires_grad)
    compile_(lora)
    return trained(path, lora)


def test_lora(tmp_path: Path) -> None:
    """Only adapters learn; those of stacked experts are added to the weights in each forward, inside the graph."""
    report = Report()
    expected = adapted(tmp_path, lambda model: None)
    how = {"backend": "samoyeds", "options": options(report)}
    assert adapted(tmp_path, lambda model: model.compile(**how)) == pytest.approx(expected, rel=1e-5)
    assert_all_rewritten(report)

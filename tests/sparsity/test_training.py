"""Recovery training: masks that hold through real training, equal runs after a resume, and what is refused."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.report.model import Report
from samoyeds_compile.sparsity import SparsityConfig, best_mask, validate
from samoyeds_compile.sparsity.training import (
    Distillation,
    SparseTraining,
    SparseTrainingCallback,
    StorageLayout,
    bake_,
    dense_masters,
    distillation_loss,
    make_trainable_,
    masked_parameters,
)

CONFIG = SparsityConfig(1, 2, 16)
METHODS = ["fixed", "sr_ste"]
SIZES = dict(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, head_dim=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TRANSPOSED = {"gate_up_proj": StorageLayout(transposed=True, interleaved=True), "down_proj": StorageLayout(True)}


def mixtral(seed: int = 0) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**SIZES)).train()


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]


def prepared(seed: int = 0) -> MixtralForCausalLM:
    model = mixtral(seed)
    return make_trainable_(model, names_of(model), CONFIG)


def batch(step: int, rows: int = 2) -> dict[str, Tensor]:
    """Counting upwards from anywhere: easy to learn in a few steps."""
    start = torch.randint(3, 30, (rows, 1), generator=torch.Generator().manual_seed(step))
    ids = 3 + (start + torch.arange(12)) % 29
    return {"input_ids": ids, "labels": ids}


class Run:
    """A plain loop with AdamW and accumulated gradients."""

    def __init__(self, model: nn.Module, training: SparseTraining, accumulate: int = 1) -> None:
        self.model, self.training, self.accumulate = model, training, accumulate
        training.attach(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)

    def step(self, step: int, forward=None) -> float:
        total = 0.0
        for part in range(self.accumulate):
            loss = (self.model if forward is None else forward)(
                **batch(step * self.accumulate + part)
            ).loss / self.accumulate
            loss.backward()
            total += loss.item()
        self.training.before_step()
        self.optimizer.step()
        self.training.step()
        self.optimizer.zero_grad()
        return total

    def states(self):
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict(), self.training.state_dict()])

    def load(self, states) -> None:
        for part, state in zip((self.model, self.optimizer, self.training), states, strict=True):
            part.load_state_dict(state)


def assert_pattern(model: nn.Module) -> None:
    """What the forward reads has the pattern, while the masters are dense."""
    masked = masked_parameters(model)
    assert len(masked) == 4
    for parameter in masked:
        validate(getattr(parameter.module, parameter.leaf), CONFIG)
        assert (parameter.master != 0).float().mean() > 0.9


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_training_keeps_the_pattern_and_learns(method, accumulate):
    run = Run(prepared(), SparseTraining(CONFIG, method=method, decay=1e-2), accumulate)
    masks = [p.mask.clone() for p in masked_parameters(run.model)]
    losses = []
    for step in range(12):
        losses.append(run.step(step))
        assert_pattern(run.model)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    same = [torch.equal(a, b.mask) for a, b in zip(masks, masked_parameters(run.model), strict=True)]
    assert all(same) if method == "fixed" else not any(same)
    run.model.eval()
    before = run.model(**batch(99)).logits
    assert run.training.finish() is run.model
    assert type(run.model.model.layers[0].mlp.experts) is type(mixtral().model.layers[0].mlp.experts)
    assert run.model.state_dict().keys() == mixtral().state_dict().keys()
    for name in names_of(run.model):
        validate(run.model.get_parameter(name), CONFIG, name)
    assert torch.equal(run.model(**batch(99)).logits, before)


def test_sr_ste_against_its_formula():
    """One step of SGD on a linear layer, masks and gradients by hand."""
    torch.manual_seed(0)
    layer, x, lr, decay = nn.Linear(32, 8, bias=False), torch.randn(5, 32), 0.5, 0.1
    weight = layer.weight.detach().clone()
    mask = best_mask(weight.abs(), CONFIG)
    pruned = (weight * mask).requires_grad_()
    F.linear(x, pruned).square().sum().backward()
    expected = weight - lr * (pruned.grad + decay * ~mask * weight)

    make_trainable_(layer, ["weight"], CONFIG)
    training = SparseTraining(CONFIG, method="sr_ste", decay=decay)
    training.attach(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    layer(x).square().sum().backward()
    training.before_step()
    optimizer.step()
    training.step()
    parameter = masked_parameters(layer)[0]
    torch.testing.assert_close(parameter.master.detach(), expected)
    assert torch.equal(parameter.mask, best_mask(parameter.master.detach().abs(), CONFIG))
    assert not torch.equal(parameter.mask, mask)


def test_fixed_masks_the_gradient():
    layer = make_trainable_(nn.Linear(32, 8), ["weight"], CONFIG)
    training = SparseTraining(CONFIG)
    training.attach(layer)
    parameter = masked_parameters(layer)[0]
    (layer(torch.randn(3, 32)).square().sum() + parameter.master.square().sum()).backward()
    assert parameter.master.grad[~parameter.mask].abs().min() > 0  # the penalty on the dense master
    training.before_step()
    assert parameter.master.grad[~parameter.mask].abs().max() == 0
    assert parameter.master.grad[parameter.mask].abs().min() > 0


def test_masks_are_refreshed_when_due():
    run = Run(prepared(), SparseTraining(CONFIG, method="sr_ste", decay=1e-2, refresh_every=2, stop_refresh_at=5))
    changed = []
    for step in range(8):
        before = [p.mask.clone() for p in masked_parameters(run.model)]
        run.step(step)
        changed.append(
            any(not torch.equal(a, p.mask) for a, p in zip(before, masked_parameters(run.model), strict=True))
        )
    assert changed == [False, True, False, True, False, False, False, False]


@pytest.mark.parametrize("method", METHODS)
def test_resume_equals_a_run_without_a_break(method):
    settings = dict(method=method, decay=1e-2) | (dict(refresh_every=3) if method == "sr_ste" else {})
    whole = Run(prepared(), SparseTraining(CONFIG, **settings))
    for step in range(4):
        whole.step(step)
    stream = io.BytesIO()
    torch.save(whole.states(), stream)
    for step in range(4, 8):
        whole.step(step)
    resumed = Run(prepared(seed=7), SparseTraining(CONFIG, **settings))
    stream.seek(0)
    resumed.load(torch.load(stream, weights_only=True))
    for step in range(4, 8):
        resumed.step(step)
    expected, state = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == state.keys() and sum(name.endswith("_mask") for name in state) == 4
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("method", METHODS)
def test_copies(method):
    """Deep copies, pickles and other dtypes compute the same and train on their own."""
    model = prepared()
    SparseTraining(CONFIG, method=method).attach(model)
    ids = batch(0)
    expected = model(**ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = other(**ids)
        assert torch.equal(output.logits, expected)
        output.loss.backward()
        copied = masked_parameters(other)[0]
        assert copied.master.grad[~copied.mask].any() == (method == "sr_ste")
        other.zero_grad()
        Run(other, SparseTraining(CONFIG, method=method)).step(0)
        assert not torch.equal(other(**ids).logits, expected)
        assert_pattern(other)
    assert torch.equal(model(**ids).logits, expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.mask.dtype for p in masked_parameters(half)} == {torch.bool}
    assert {p.pruned().dtype for p in masked_parameters(half)} == {torch.bfloat16}
    half(**ids).loss.backward()
    assert_pattern(half)
    torch.testing.assert_close(half(**ids).logits.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["aot_eager", "samoyeds"])
def test_compiled_training_equals_eager(method, backend):
    """One graph, new masks without another compilation, and the experts are still rewritten."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    options = {"base": "aot_eager", "report": (report := Report())}
    eager = Run(prepared(), SparseTraining(CONFIG, method=method, decay=1e-2))
    run = Run(prepared(), SparseTraining(CONFIG, method=method, decay=1e-2))
    if backend == "samoyeds":
        compiled = torch.compile(run.model, backend=backend, fullgraph=True, options=options)
    else:
        compiled = torch.compile(run.model, backend=counter, fullgraph=True)
    for step in range(5):
        loss = run.step(step, compiled)
        torch.testing.assert_close(loss, eager.step(step), rtol=1e-4, atol=1e-4)
        assert_pattern(run.model)
    if backend == "samoyeds":
        assert len(report.graphs) == 1 and len(report.blocks) == 2 and all(b.rewritten for b in report.blocks)
    else:
        assert counter.frame_count == 1
    run.training.finish(), eager.training.finish()
    run.model.eval(), eager.model.eval()
    torch.testing.assert_close(compiled(**batch(9)).logits, eager.model(**batch(9)).logits, rtol=1e-3, atol=1e-3)


def test_an_adapter_is_merged_into_the_master():
    model = prepared()
    training = SparseTraining(CONFIG)
    training.attach(model)
    parameter = masked_parameters(model)[0]
    before, delta = parameter.master.detach().clone(), torch.randn_like(parameter.master)
    with dense_masters(model), torch.no_grad():
        getattr(parameter.module, parameter.leaf).data += delta  # as adapters merge themselves
    assert torch.equal(parameter.master, before + delta)
    assert_pattern(model)
    mask = parameter.mask.clone()
    training.finish()
    validate(parameter.master, CONFIG)
    assert torch.equal(parameter.master, torch.where(mask, before + delta, 0))


@pytest.mark.parametrize("flat", [0, 3])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts(transposed, interleaved, flat):
    """The pattern is of gate rows, then up rows, whichever way they are stored."""
    torch.manual_seed(0)
    gate, up = torch.randn(3, 7, 32), torch.randn(3, 7, 32)
    rows = torch.stack([gate, up], 2).flatten(1, 2) if interleaved else torch.cat([gate, up], 1)
    stored = (rows.mT if transposed else rows).contiguous()
    module = nn.ParameterDict({"w": nn.Parameter(stored.flatten(0, 1) if flat else stored)})
    layout = StorageLayout(transposed, interleaved, flat)
    make_trainable_(module, ["w"], CONFIG, layouts={"w": layout})
    expected = torch.cat([gate, up], 1)
    expected = expected * best_mask(expected.abs(), CONFIG)
    parameter = masked_parameters(module)[0]
    assert torch.equal(layout.to_rows(parameter.pruned()), expected)
    assert torch.equal(layout.to_stored(expected), parameter.pruned())
    SparseTraining(CONFIG).attach(module)
    parameter.validate()


def test_saved_in_training_is_a_checkpoint_of_the_plain_model(tmp_path):
    """transformers reads the dense masters of a checkpoint under their usual names."""
    model = prepared()
    model.save_pretrained(tmp_path)
    plain = MixtralForCausalLM.from_pretrained(tmp_path)
    masters = {p.name: p.master for p in masked_parameters(model)}
    assert all(torch.equal(plain.get_parameter(name), masters[name]) for name in names_of(plain))


def test_distillation_loss():
    student, teacher = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7, requires_grad=True)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    each = 9 * (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0), each.mean())
    counted = torch.tensor([[True, False, True], [False, False, True]])
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0, counted), each[counted].mean())
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0, counted, 10), each[counted].sum() / 10)
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().max() > 0
    assert distillation_loss(student, student).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(SparsityError, match="same vocabulary"):
        distillation_loss(student, teacher[..., :5])


class Teacher(nn.Module):
    """Takes no argument beside ``ids``."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


@pytest.mark.parametrize("shift", [False, True])
def test_positions_that_count(shift):
    student, logits, ids = torch.randn(2, 4, 7), torch.randn(2, 4, 7), torch.zeros(2, 4, dtype=torch.long)
    labels = torch.tensor([[-100, 2, 3, -100], [1, -100, -100, 4]])
    counted = [(0, 0), (0, 1), (1, 2)] if shift else [(0, 1), (0, 2), (1, 0), (1, 3)]
    each = torch.stack([distillation_loss(student[at], logits[at], 2.0) for at in counted])
    distill = Distillation(Teacher(logits), shift=shift)
    torch.testing.assert_close(distill.term((ids,), {"labels": labels}, student), each.mean())
    divided = distill.term((), {"ids": ids, "labels": labels, "num_items_in_batch": 8}, student)
    torch.testing.assert_close(divided, each.sum() / 8)
    torch.testing.assert_close(distill.term((ids,), {}, student), distillation_loss(student, logits, 2.0))


@pytest.mark.parametrize("compiled", [False, True])
def test_distillation_in_a_loop(compiled):
    """The term is in the loss while training, is learned from, and is gone at the end."""
    torch._dynamo.reset()
    teacher = mixtral(seed=3)
    model = prepared()
    plain = model(**batch(0)).loss.item()
    run = Run(model, SparseTraining(CONFIG, distill=Distillation(teacher, temperature=2.0, weight=0.5)))
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    output = forward(**batch(0))
    term = distillation_loss(output.logits[:, :-1], teacher(**batch(0)).logits[:, :-1], 2.0)
    torch.testing.assert_close(output.loss.item(), plain + 0.5 * term.item())
    losses = [run.step(step, forward) for step in range(6)]
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in teacher.parameters())
    output = model.eval()(**batch(0))
    own = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch(0)["labels"][:, 1:].flatten())
    assert output.loss.item() == pytest.approx(own.item())  # no term outside of training
    run.training.finish()
    trained = model.train()(**batch(0))
    assert trained.loss.item() == pytest.approx(model.eval()(**batch(0)).loss.item())


def gpt_oss() -> GptOssForCausalLM:
    """Experts stored input features first, gate and up in turn; saved as they are, so that a Trainer can resume."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SIZES)).train()
    names = names_of(model)
    return make_trainable_(model, names, CONFIG, layouts={n: TRANSPOSED[n.rpartition(".")[2]] for n in names})


def trainer(path, training: SparseTraining, finish: bool = True, **settings) -> Trainer:
    model = gpt_oss()
    data = [{k: v[0] for k, v in batch(i, rows=1).items()} for i in range(32)]
    arguments = TrainingArguments(
        output_dir=str(path), report_to=[], use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_steps=6, save_steps=3, learning_rate=5e-3, weight_decay=0.1, disable_tqdm=True, logging_steps=1, **settings,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, callbacks=[SparseTrainingCallback(training, finish=finish)])


@pytest.mark.parametrize("method", METHODS)
def test_trainer_and_its_resume(method, tmp_path):
    settings = dict(method=method, decay=1e-2) | (dict(refresh_every=2) if method == "sr_ste" else {})
    training = SparseTraining(CONFIG, **settings)
    whole = trainer(tmp_path, training)
    whole.train()
    assert training.steps == 6 and training.model is None and not masked_parameters(whole.model)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name in names_of(whole.model):
        weight = TRANSPOSED[name.rpartition(".")[2]].to_rows(whole.model.get_parameter(name))
        validate(weight, CONFIG, name)
    resumed = trainer(tmp_path / "other", SparseTraining(CONFIG, **settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_trainer_with_a_teacher(tmp_path):
    """The teacher's term arrives in the loss that the Trainer logs, at its size with accumulated gradients too."""
    teacher = GptOssForCausalLM(GptOssConfig(**SIZES))
    logged = []
    for distill in (None, Distillation(teacher, weight=1.0)):
        run = trainer(tmp_path, SparseTraining(CONFIG, distill=distill), save_strategy="no")
        run.train()
        logged.append(run.state.log_history[0]["loss"])
    ids = torch.cat([batch(i, rows=1)["input_ids"] for i in range(32)])
    student = gpt_oss()
    with torch.no_grad():
        term = distillation_loss(student(input_ids=ids).logits[:, :-1], teacher(input_ids=ids).logits[:, :-1])
    assert logged[1] - logged[0] == pytest.approx(term.item(), rel=0.3)


def test_trainer_can_leave_the_end_to_the_caller(tmp_path):
    run = trainer(tmp_path, training := SparseTraining(CONFIG), finish=False, save_strategy="no")
    run.train()
    run.train()
    assert training.model is run.model and len(masked_parameters(run.model)) == 4 and training.steps == 6
    assert not masked_parameters(training.finish())


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        (dict(method="sr_ste"), dict(fp16=True, max_grad_norm=0.0), "set max_grad_norm"),
        (dict(distill=Distillation(nn.Linear(2, 2))), dict(label_smoothing_factor=0.1), "label_smoothing_factor"),
    ],
)  # fmt: skip
def test_trainer_arguments_that_are_refused(settings, arguments, message):
    arguments = SimpleNamespace(**(dict(fp16=False, max_grad_norm=1.0, label_smoothing_factor=0.0) | arguments))
    callback = SparseTrainingCallback(SparseTraining(CONFIG, **settings))
    with pytest.raises(SparsityError, match=message):
        callback.on_train_begin(arguments, SimpleNamespace(global_step=0), None, model=prepared())


def test_a_class_changed_by_others_is_refused_at_the_end():
    layer = make_trainable_(nn.Linear(32, 8), ["weight"], CONFIG)
    parametrize.register_parametrization(layer, "bias", nn.ReLU())
    with pytest.raises(SparsityError, match="class of its module was changed"):
        bake_(layer)
    parametrize.remove_parametrizations(layer, "bias")
    assert type(bake_(layer)) is nn.Linear
    validate(layer.weight, CONFIG)


class Odd(nn.Module):
    """Parameters that cannot be masked."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.other = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(4, 16))
        self.bias, self.tied = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 16))
        self.also_tied, self.nan = self.tied, nn.Parameter(torch.full((4, 16), torch.nan))
        self.odd, self.taken = nn.Parameter(torch.randn(3, 16)), nn.Parameter(torch.randn(4, 16))
        self.taken_mask = None


@pytest.mark.parametrize(
    ("parameters", "layouts", "message"),
    [
        (["good", "absent"], None, "absent: is no parameter of Odd"),
        (["good", "a.b"], None, "no module 'a'"),
        (["good", "bias"], None, "bias: is torch.float32"),
        (["good", "tied"], None, "tied: is tied"),
        (["good", "nan"], None, "nan: holds NaN"),
        (["good", "taken"], None, "taken_mask of its own"),
        (["good", "odd"], {"odd": StorageLayout(interleaved=True)}, "3 rows"),
        (["good", "odd"], {"odd": StorageLayout(flat=2)}, r"odd: \[3, 16\] is not 2 matrices"),
        (["good"], {"other": StorageLayout()}, "other is not among"),
        ({"good": None, "other": torch.ones(4, 16)}, None, "its mask is torch.float32"),
        ({"good": None, "other": torch.ones(4, 8).bool()}, None, r"shaped as the parameter, \(4, 16\)"),
        ({"good": None, "other": torch.ones(4, 16).bool()}, None, "the mask of other: the value at"),
    ],
)  # fmt: skip
def test_refused_parameters_leave_the_model_alone(parameters, layouts, message):
    model = Odd()
    state = set(model.state_dict())
    with pytest.raises(SparsityError, match=message):
        make_trainable_(model, parameters, CONFIG, layouts=layouts)
    assert type(model) is Odd and set(model.state_dict()) == state and not masked_parameters(model)


def test_given_masks_are_used():
    model = Odd()
    mask = best_mask(torch.rand(4, 16), CONFIG)
    make_trainable_(model, {"good": mask}, CONFIG)
    make_trainable_(model, ["other"], CONFIG)
    assert torch.equal(model.good, torch.where(mask, model._parameters["good"], 0))
    assert [p.leaf for p in masked_parameters(model)] == ["good", "other"]
    mask.zero_()
    assert model.good.any()
    with pytest.raises(SparsityError, match="has a mask already"):
        make_trainable_(model, ["good"], CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(method="magic"), "'fixed' or 'sr_ste'"),
        (dict(refresh_every=3), "not refreshed"),
        (dict(method="sr_ste", refresh_every=0), "1 or more"),
        (dict(decay=-1.0), "0 or more"),
    ],
)  # fmt: skip
def test_refused_settings(settings, message):
    with pytest.raises(SparsityError, match=message):
        SparseTraining(CONFIG, **settings)


def test_refused_calls():
    training = SparseTraining(CONFIG, method="sr_ste")
    layer = nn.Linear(32, 8)
    for call in (training.before_step, training.step, training.finish):
        with pytest.raises(SparsityError, match="attach"):
            call()
    with pytest.raises(SparsityError, match="call make_trainable_"):
        training.attach(layer)
    make_trainable_(layer, ["weight"], CONFIG)
    with pytest.raises(SparsityError, match="this training is for 1:1:16"):
        SparseTraining(SparsityConfig(1, 1, 16)).attach(layer)
    training.attach(layer)
    with pytest.raises(SparsityError, match="has a model already"):
        training.attach(layer)
    with pytest.raises(SparsityError, match="before_step"):
        training.step()
    with pytest.raises(SparsityError, match="the saved method is 'fixed'"):
        training.load_state_dict(SparseTraining(CONFIG).state_dict())
    with pytest.raises(SparsityError, match="share parameters"):
        Distillation(layer).attach(layer)
    with torch.no_grad():
        layer._parameters["weight"][0, 0] = torch.inf
    training.before_step()
    with pytest.raises(SparsityError, match="weight: holds NaN or infinite"):
        training.step()
    layer.weight_mask.fill_(True)
    with pytest.raises(SparsityError, match="weight: the value at"):
        training.finish()
    assert masked_parameters(layer)

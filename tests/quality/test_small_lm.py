"""The small trained model: what ships is what its text says, and it learned something."""

import json

import pytest
import torch

from examples.small_lm import corpus, demo
from examples.small_lm import model as small
from examples.small_lm.recover import CONFIG
from samoyeds_compile import load_sparse_
from samoyeds_compile.sparsity import PackedTensor, validate


@pytest.fixture(scope="module")
def unseen():
    return corpus.windows(corpus.tokens(corpus.held_out(), small.tokenizer()), small.CONTEXT, 16)


def test_no_document_is_in_both_parts(monkeypatch) -> None:
    roots = corpus._roots()
    monkeypatch.setattr(corpus, "_roots", lambda: {"networkx": roots["networkx"]})
    held_out, training = corpus.held_out(), corpus.training()
    assert 0 < len(held_out) < len(training)
    parts = [{doc for text in texts for doc in text.split("\n\n# ")} for texts in (held_out, training)]
    assert not {doc for doc in parts[0] & parts[1] if len(doc) > corpus.LEAST}


def test_ships_at_most_eight_megabytes() -> None:
    assert sum(path.stat().st_size for path in small.FOLDER.glob("*.safetensors")) <= 8_000_000


def test_perplexity_is_that_of_the_training_run(unseen) -> None:
    """Other versions of the packages have a bit of other text; an untrained model is at the size of the vocabulary."""
    facts = json.loads((small.FOLDER / "training.json").read_text())
    assert small.perplexity(small.load(), unseen) == pytest.approx(facts["perplexity"][-1][1], rel=0.25)
    torch.manual_seed(0)
    assert small.perplexity(small.build().eval(), unseen) > small.VOCABULARY / 2


def test_sparse_checkpoint_has_the_pattern_and_most_of_the_quality(unseen) -> None:
    model = small.load()
    dense = small.perplexity(model, unseen)
    load_sparse_(model, small.SPARSE)
    packed = [p for p in model.parameters() if isinstance(p, PackedTensor)]
    assert len(packed) == 2 * model.config.num_hidden_layers
    for parameter in packed:
        validate(parameter.to_dense(), CONFIG)
    assert small.perplexity(model.float(), unseen) < 1.25 * dense


def test_demo(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["demo", "--windows", "8"])
    assert demo.main() == 0
    shown = capsys.readouterr().out
    for title in ("dense", "2:4, one-shot", "75 %, trained"):
        assert title in shown

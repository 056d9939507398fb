"""Make the experts of the small model 75 % sparse and train on, with the dense model as the teacher.

    python -m examples.small_lm.recover [--steps 600] [--rate 2e-3]

Eight minutes on one core. Writes sparse75.safetensors, a packed checkpoint.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from samoyeds_compile import SparsityConfig, save_sparse, sparsify_
from samoyeds_compile.sparsity.training import Distillation, SparseTraining

from . import corpus
from . import model as small
from .train import batches, groups, rate

CONFIG = SparsityConfig(1, 2, 32)
RATE = 1e-3
WARMUP = 20
CALIBRATION = 64
"""Windows of training text that say which weights matter."""
SEED = 1000


def recovered(
    model: nn.Module,
    config: SparsityConfig,
    method: str,
    calibration: list[Tensor],
    inputs: list[Tensor],
    *,
    permute: bool = False,
    training: str = "fixed",
    distill: bool = False,
    highest: float = RATE,
) -> nn.Module:
    """A copy of a model after ``sparsify_(trainable=True)`` and a step of `SparseTraining` for each batch of inputs.

    Its weights have the pattern; they are dense tensors still.
    """
    found = copy.deepcopy(model)
    given = None if method == "magnitude" else calibration
    sparsify_(found, config, method=method, calibration=given, permute=permute, trainable=True, progress=False)
    refresh = {"refresh_every": 5, "stop_refresh_at": len(inputs) // 2} if training == "sr_ste" else {}
    teacher = Distillation(copy.deepcopy(model), temperature=1.0) if distill else None
    sparse = SparseTraining(config, method=training, distill=teacher, **refresh)
    sparse.attach(found)
    train_on(found, inputs, sparse.before_step, sparse.step, highest)
    return sparse.finish().eval()


def train_on(
    model: nn.Module,
    inputs: list[Tensor],
    before_step: Callable[[], None] = lambda: None,
    after_step: Callable[[], None] = lambda: None,
    highest: float = RATE,
) -> None:
    """A step of AdamW for each batch, the rate going up to ``highest`` and down once more."""
    model.train()
    optimizer = torch.optim.AdamW(groups(model), lr=highest, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, len(inputs), WARMUP))
    for ids in inputs:
        model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before_step()
        optimizer.step()
        after_step()
        optimizer.zero_grad()
        schedule.step()


def calibration(stream_N: Tensor) -> list[Tensor]:
    """Windows of training text, in batches [16, S]."""
    return list(corpus.windows(stream_N, small.CONTEXT, CALIBRATION).split(16))


def main() -> None:
    """Prune, train, pack, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    model, tokenizer = small.load(), small.tokenizer()
    stream = corpus.tokens(corpus.training(), tokenizer)
    unseen = corpus.windows(corpus.tokens(corpus.held_out(), tokenizer), small.CONTEXT, 64)
    inputs = batches(stream, options.steps, SEED)
    torch.manual_seed(SEED)
    found = recovered(
        model, CONFIG, "second_order", calibration(stream), inputs, permute=True, distill=True, highest=options.rate
    )
    print(f"perplexity: dense {small.perplexity(model, unseen):.2f}, 75 % {small.perplexity(found, unseen):.2f}")
    found.to(torch.bfloat16)
    sparsify_(found, CONFIG, method="magnitude", progress=False)  # packs; nothing is left to prune
    save_sparse(found, small.SPARSE)


if __name__ == "__main__":
    main()

"""Replace the routers in front of rewritten blocks; each one that stays gets its reason."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.region import Decline, MoERegion, require
from samoyeds_compile.ops.router import runs_as_one_op
from samoyeds_compile.report.model import BlockReport
from samoyeds_compile.routers.parts import SCORES, Choice, read_choice
from samoyeds_compile.routers.region import RouterRegion
from samoyeds_compile.routers.rewrite import rewrite_router
from samoyeds_compile.routers.sigmoid_group import match_sigmoid_group
from samoyeds_compile.routers.softmax_topk import match_softmax_topk
from samoyeds_compile.routers.topk_softmax import match_topk_softmax
from samoyeds_compile.routers.validate import RouterValidator

logger = logging.getLogger(__name__)


def fuse_routers(matches: Sequence[tuple[MoERegion, BlockReport]], validate: bool, everywhere: bool = True) -> None:
    """Fuse the router of each block, and note in the block's report that it is done, or why not.

    Runs after the blocks are rewritten. The view of the graph is from before, which is as good: rewriting a block
    touches no node of a router.

    Args:
        matches: the rewritten blocks.
        validate: check each distinct router against the original first.
        everywhere: also where the op is no more than a name for ops of ATen.
    """
    validator = RouterValidator() if validate else None
    regions = [region for region, _ in matches]
    fused: set[Value] = set()  # two blocks may share a router
    for region, block in matches:
        try:
            ids = region.expert_ids
            require(isinstance(ids, Value), "the block makes its own ids from what the router gives")
            assert isinstance(ids, Value)
            choice = read_choice(ids)
            router = None if choice.ids in fused else _sound_router(choice, regions, validator, everywhere)
        except Decline as decline:
            block.router_reason = decline.reason
            continue
        except Exception as error:  # a defect of the rule must not cost the blocks that are rewritten already
            logger.warning("the router of %s could not be matched", block.module or block.source, exc_info=True)
            block.router_reason = f"internal error of the rule: {type(error).__name__}: {error}"
            continue
        if router is not None:
            rewrite_router(router)
            fused.add(router.ids)
        block.router_fused = True


def match_router(choice: Choice) -> RouterRegion:
    """The router around a top-k.

    Raises:
        Decline: it is none of the known families.
    """
    source, gathered_from = choice.source, choice.gathered_from
    if source.op in SCORES:
        return match_softmax_topk(choice)
    if source.op == "masked_fill" or (gathered_from is not None and gathered_from.op in SCORES):
        return match_sigmoid_group(choice)
    return match_topk_softmax(choice)


def _sound_router(
    choice: Choice, regions: list[MoERegion], validator: RouterValidator | None, everywhere: bool
) -> RouterRegion:
    router = match_router(choice)
    require(everywhere or _runs_as_one_op(router), "one op would not be faster here; fuse_routers=True has it anyway")
    for region in regions:
        require(region.output not in router.inputs, "the router reads the output of a block directly", router.logits)
        require(set(router.members).isdisjoint(region.members), "a part of the router belongs to a block", router.ids)
    problem = validator.check(router) if validator is not None else None
    require(problem is None, f"validation refused the fused router: {problem}", router.ids)
    return router


def _runs_as_one_op(router: RouterRegion) -> bool:
    bias = None if router.bias is None else router.bias.example
    return runs_as_one_op(router.logits.example, bias, router.spec.score_dtype, router.spec.out_dtype)

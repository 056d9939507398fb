"""Let Dynamo trace MoE loops whose sizes depend on the routing, in frames of this backend, and only where that helps.

By default Dynamo ends a graph at ``nonzero``, ``where(mask)``, ``x[mask]`` and ``tolist()``, and inside a loop it gives
up the whole function, so that a loop over experts reaches no backend. Two settings let it go on, with sizes that are
symbols; but code that then branches on such a size fails instead of breaking the graph, and a base compiler may fail
on the symbols. So the settings are tried for one frame at a time:

1. `compile_frame`, by which Dynamo traces one frame, is wrapped. A frame of ours is traced with both settings on; they
   are the caller's again as soon as the backend is called, and hold in this thread only (since torch 2.12).
2. If after the rewrite the graph still holds a value of unknown size (`unaccounted`), the backend raises `Retrace`.
3. If the attempt fails, for that reason or any other, the frame is traced again as if we had never touched it.

Frames of other backends, and of ``fullgraph=True`` (where Dynamo captures such ops anyway), pass through.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx
from torch._dynamo import config, convert_frame
from torch._dynamo.exc import BackendCompilerFailed, SkipFrame
from torch._dynamo.utils import counters
from torch.utils._sympy.symbol import SymT, symbol_is_type

from samoyeds_compile.errors import OptionError
from samoyeds_compile.graph.edit import unbacked_symbols
from samoyeds_compile.graph.values import graph_modules
from samoyeds_compile.options import Options

logger = logging.getLogger(__name__)

SETTINGS = ("capture_dynamic_output_shape_ops", "capture_scalar_outputs")

# The caller's values of the settings that the attempt under way has switched on.
_changed: ContextVar[Mapping[str, bool] | None] = ContextVar("samoyeds_capture", default=None)


class Retrace(SkipFrame):
    """The backend asks for the frame to be traced again with the caller's settings.

    A `SkipFrame`, since Dynamo lets this one pass from a backend; were it not caught, the frame would run in Python.
    """


def install(backend: Callable[..., Any]) -> None:
    """Wrap Dynamo's `compile_frame`, once, for the frames that ``backend`` compiles."""
    current = convert_frame.compile_frame
    original = getattr(current, "_samoyeds_original", current)
    if not {"compiler_fn", "one_graph"} <= inspect.signature(original).parameters.keys():
        logger.warning("this version of Dynamo has another compile_frame: loops over experts are not captured")
        return
    convert_frame.compile_frame = _wrapped(original, backend)


def _wrapped(original: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def compile_frame(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        missing = _missing(call["compiler_fn"], call["one_graph"], backend)
        if not missing:
            with callers_settings():
                return original(*args, **kwargs)
        breaks = Counter(counters["graph_break"])
        try:
            with _attempt(missing):
                return original(*args, **kwargs)
        except Exception as error:
            if not _may_differ(error):
                raise
            logger.info("traced again without capture: %s: %s", type(error).__name__, error)
        counters["graph_break"] = breaks
        return original(*args, **kwargs)

    compile_frame._samoyeds_original = original  # type: ignore[attr-defined]
    return compile_frame


def _missing(compiler_fn: Any, one_graph: bool, backend: Callable[..., Any]) -> dict[str, bool]:
    """The settings to switch on for a frame, with the caller's values; none if it is not ours or wants no capture."""
    found = None if one_graph else _call_of(compiler_fn, backend)
    if found is None:
        return {}
    try:
        options = Options.from_call(found.get("mode"), found.get("options"))
    except OptionError:  # the backend will raise it, where Dynamo can say which backend it was
        return {}
    return {name: False for name in SETTINGS if options.capture and not getattr(config, name)}


def _call_of(compiler_fn: Any, backend: Callable[..., Any]) -> Mapping[str, Any] | None:
    """The keyword arguments with which Dynamo will call our backend; None if it will call another one."""
    keywords: dict[str, Any] = {}
    while compiler_fn is not backend:
        if isinstance(compiler_fn, torch._TorchCompileWrapper):
            keywords, compiler_fn = {**compiler_fn.kwargs, **keywords}, compiler_fn.compiler_fn
        elif isinstance(compiler_fn, functools.partial):
            keywords, compiler_fn = {**compiler_fn.keywords, **keywords}, compiler_fn.func
        elif hasattr(compiler_fn, "_torchdynamo_orig_backend"):
            compiler_fn = compiler_fn._torchdynamo_orig_backend
        else:
            return None
    return keywords


@contextlib.contextmanager
def _attempt(missing: Mapping[str, bool]) -> Iterator[None]:
    token = _changed.set(missing)
    try:
        with config.patch({name: True for name in missing}):
            yield
    finally:
        _changed.reset(token)


@contextlib.contextmanager
def callers_settings() -> Iterator[bool]:
    """The caller's settings, inside an attempt; yields whether there is one, so that `Retrace` will be caught."""
    changed = _changed.get()
    if changed is None:
        yield False
        return
    token = _changed.set(None)
    try:
        with config.patch(dict(changed)):
            yield True
    finally:
        _changed.reset(token)


def _may_differ(error: Exception) -> bool:
    """Whether a failed attempt may end otherwise under the caller's settings.

    What skips the frame or fails in the backend does so again if the trace met no size or number that only the settings
    made known; if that cannot be told, it may differ.
    """
    if isinstance(error, Retrace) or not isinstance(error, (SkipFrame, BackendCompilerFailed)):
        return True
    tracer = getattr(error, "_torch_dynamo_tracer_output", None)
    env = getattr(getattr(tracer, "output_graph_for_cleanup", None), "shape_env", None)
    symbols = getattr(env, "var_to_range", None)
    return symbols is None or any(symbol_is_type(s, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)) for s in symbols)


def unaccounted(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes with a size or number that is known only when the graph runs, unless the inputs bring it along.

    A rewritten block has none: its op takes tensors of known sizes, and the asserts on unknown ones go with the block.
    """
    given = {s for node in gm.graph.nodes if node.op == "placeholder" for s in unbacked_symbols(node)}
    nodes = (n for module in graph_modules(gm) for n in module.graph.nodes if n.op not in ("placeholder", "output"))
    return [node for node in nodes if unbacked_symbols(node) - given]

"""Options of the backend: one frozen dataclass, filled from the call, then the environment, then defaults."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samoyeds_compile.errors import OptionError

if TYPE_CHECKING:
    from samoyeds_compile.report.model import GraphReport

BASES = ("inductor", "aot_eager", "eager")
LAYOUTS = ("cheapest", "token_major", "dearest")
ENVIRONMENT_PREFIX = "SAMOYEDS_"


@dataclass(frozen=True)
class Options:
    """What the user can choose.

    Each field is reachable as ``torch.compile(..., options={name: value})`` and, where a text says it all, as the
    environment variable ``SAMOYEDS_<NAME>``; the call wins over the environment.

    Attributes:
        base: what compiles the rewritten graph: ``inductor``, ``aot_eager`` or ``eager`` (the last two for debugging).
        mode: an Inductor mode (``default``, ``reduce-overhead``, ``max-autotune``, ...), as ``mode=`` passes it.
        rewrite: False hands the graph to the base as it came; blocks are still found and reported.
        validate: check each rewrite of a new structure against the original on small random inputs.
        fuse_routers: replace the routers in front of rewritten blocks by one op each, where they are recognised; None:
            in inference on a CPU, where that op is C++.
        triton: compute experts on CUDA devices by generated Triton kernels in inference; None: with packed weights,
            which would be unpacked in every call otherwise. Dense kernels were not timed yet.
        layouts: how rows lie inside kernels: ``cheapest`` (see docs/layouts.md), or, to measure that against,
            ``token_major`` (one order everywhere) or ``dearest``.
        disable: names of families that must not match, comma separated in the environment.
        capture: let Dynamo trace ``nonzero``, ``x[mask]`` and ``tolist()`` where that makes a block rewritable (see
            `samoyeds_compile.capture`); other code is traced as it is without us. False: Dynamo's own settings decide.
        dump: folder that receives every graph before and after as runnable Python, and ``report.json``.
        profile_ranges: surround each rewritten block by a range of the profiler with its module and kernel.
        record_routing: count how many slots each expert of a rewritten block gets (``routing`` in the block's report).
        report: called with the `GraphReport` of every graph compiled; a `samoyeds_compile.Report` collects them.
        grouped_mm: grouped matrix products of other libraries, by operator name, and the role of each of their
            parameters, in order: ``{"mylib::gmm": "input weight sizes transposed"}``. Roles are ``input`` [S, in],
            ``weight`` [E, in, out] or ``weight_t`` [E, out, in], ``offsets`` (where each expert's rows end) or
            ``sizes`` (how many there are), ``transposed`` (a flag that says which of the two the weight is), and ``_``
            for a parameter that is left out or None. In the environment: ``name=roles``, separated by commas.
        inductor: Inductor's own options, by its configuration names.
    """

    base: str = "inductor"
    mode: str = "default"
    rewrite: bool = True
    validate: bool = True
    fuse_routers: bool | None = None
    triton: bool | None = None
    layouts: str = "cheapest"
    disable: tuple[str, ...] = ()
    capture: bool = True
    dump: Path | None = None
    profile_ranges: bool = False
    record_routing: bool = False
    report: Callable[[GraphReport], None] | None = None
    grouped_mm: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_call(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Options:
        """Options of one ``torch.compile`` call.

        Args:
            mode: the ``mode=`` argument.
            options: the ``options=`` argument: our keys and Inductor's, mixed.

        Raises:
            OptionError: an unknown key or mode, or a value of the wrong kind; the message lists what is valid.
        """
        given = _with_text_names(options or {})
        ours = {k: given.pop(k) for k in list(given) if k in _FIELDS and k != "inductor"}
        inductor = _parse_mapping("inductor", given.pop("inductor", {})) | given
        if mode is not None:
            ours["mode"] = mode
        parsed = _from_environment(besides=ours) | {k: _PARSERS[k](f"option {k!r}", v) for k, v in ours.items()}
        return cls(**parsed, inductor=_check_inductor(inductor))

    def inductor_patches(self) -> dict[str, Any]:
        """Inductor configuration that mode and options stand for."""
        import torch._inductor

        mode = {} if self.mode == "default" else torch._inductor.list_mode_options(self.mode)
        return {**mode, **self.inductor}


def _with_text_names(options: Mapping[Any, Any]) -> dict[str, Any]:
    for name in options:
        if not isinstance(name, str):
            raise OptionError(f"option {name!r} is no text; options of samoyeds are {', '.join(_FIELDS)}")
    return {name.replace("-", "_"): value for name, value in options.items()}


def _from_environment(besides: Container[str]) -> dict[str, Any]:
    """What the environment sets and the call does not."""
    found = {}
    for name in _PARSERS:
        variable = ENVIRONMENT_PREFIX + name.upper()
        text = os.environ.get(variable)
        if text and name not in besides and name != "report":
            found[name] = _PARSERS[name](f"environment variable {variable}", text)
    return found


def _bad(what: str, value: Any, expected: str) -> OptionError:
    return OptionError(f"{what} is {value!r}; it must be {expected}")


def _parse_mapping(what: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return _with_text_names(value)
    raise _bad(f"option {what!r}", value, "a mapping of Inductor's options")


def _parse_bool(what: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise _bad(what, value, "True or False")


def _parse_base(what: str, value: Any) -> str:
    if value not in BASES:
        raise _bad(what, value, f"one of {', '.join(BASES)}")
    return str(value)


def _parse_layouts(what: str, value: Any) -> str:
    if value not in LAYOUTS:
        raise _bad(what, value, f"one of {', '.join(LAYOUTS)}")
    return str(value)


def _parse_mode(what: str, value: Any) -> str:
    import torch._inductor

    modes = list(torch._inductor.list_mode_options())
    if value not in modes:
        raise OptionError(f"{what} is {value!r}, and mode {value!r} does not exist; valid modes are {', '.join(modes)}")
    return str(value)


def _parse_names(what: str, value: Any) -> tuple[str, ...]:
    from samoyeds_compile.match.driver import FAMILIES

    names = tuple(value.split(",")) if isinstance(value, str) else value
    if not isinstance(names, (tuple, list, set, frozenset)) or not all(isinstance(n, str) for n in names):
        raise _bad(what, value, "a list of family names")
    known = [f.name for f in FAMILIES]
    unknown = [n for n in names if n not in known]
    if unknown:
        raise OptionError(f"{what} names the family {unknown[0]!r}; families are {', '.join(known)}")
    return tuple(names)


def _parse_path(what: str, value: Any) -> Path | None:
    if value is None or isinstance(value, Path):
        return value
    if isinstance(value, str) and value:
        return Path(value)
    raise _bad(what, value, "a folder")


def _parse_callable(what: str, value: Any) -> Any:
    if value is None or callable(value):
        return value
    raise _bad(what, value, "a samoyeds_compile.Report or another callable")


_ROLES = ("input", "weight", "weight_t", "offsets", "sizes", "transposed", "_")


def _parse_grouped(what: str, value: Any) -> dict[str, tuple[str, ...]]:
    if isinstance(value, str):
        value = dict(part.partition("=")[::2] for part in value.split(","))
    if not isinstance(value, Mapping):
        raise _bad(what, value, 'a mapping such as {"mylib::gmm": "input weight sizes"}')
    return {str(name): _parse_roles(f"{what}[{name!r}]", roles) for name, roles in value.items()}


def _parse_roles(what: str, value: Any) -> tuple[str, ...]:
    roles = tuple(value.split()) if isinstance(value, str) else value
    if not isinstance(roles, (tuple, list)) or not set(roles) <= set(_ROLES):
        raise _bad(what, value, f"the roles of the operator's parameters in order, out of {', '.join(_ROLES)}")
    counts = [sum(roles.count(r) for r in names) for names in (("input",), _ROLES[1:3], _ROLES[3:5])]
    if counts != [1, 1, 1]:
        raise _bad(what, value, "roles with one 'input', one 'weight' or 'weight_t', and one 'offsets' or 'sizes'")
    return tuple(roles)


_PARSERS: Mapping[str, Callable[[str, Any], Any]] = {
    "base": _parse_base,
    "mode": _parse_mode,
    "rewrite": _parse_bool,
    "validate": _parse_bool,
    "fuse_routers": _parse_bool,
    "triton": _parse_bool,
    "layouts": _parse_layouts,
    "disable": _parse_names,
    "capture": _parse_bool,
    "dump": _parse_path,
    "profile_ranges": _parse_bool,
    "record_routing": _parse_bool,
    "report": _parse_callable,
    "grouped_mm": _parse_grouped,
}
_FIELDS = tuple(f.name for f in dataclasses.fields(Options))


def _check_inductor(options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's own options, each known to its configuration."""
    if not options:
        return {}
    import torch._inductor.config as config

    known = config.get_config_copy()
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, [*_FIELDS, *known], n=3)
            hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise OptionError(
                f"option {name!r} does not exist.{hint} Options of samoyeds are {', '.join(_FIELDS)}; beside them "
                "every option of Inductor is valid (torch._inductor.list_options() lists them)"
            )
    return dict(options)

"""The JSON schema of reports, made of the dataclasses that they are made of."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from samoyeds_compile.report.layouts import EdgeReport, LayoutReport, RegimeReport
from samoyeds_compile.report.model import SCHEMA_VERSION, BlockReport, GraphReport, Report, StepReport
from samoyeds_compile.report.routing import RoutingReport

_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
}


def report_schema() -> dict[str, Any]:
    """The schema, draft 2020-12.

    A report of a whole model has ``uncaptured``, ``breaks`` and ``notes`` beside its graphs, ``report.json`` in a dump
    folder only the graphs.
    """
    report = _object(Report)
    kinds = (GraphReport, BlockReport, RoutingReport, StepReport, LayoutReport, RegimeReport, EdgeReport)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Samoyeds report",
        **report,
        "properties": {"version": {"const": SCHEMA_VERSION}, **report["properties"]},
        "required": ["version", "graphs"],
        "$defs": {kind.__name__: _object(kind) for kind in kinds},
    }


def _object(kind: type) -> dict[str, Any]:
    hints, texts = typing.get_type_hints(kind), _texts(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    properties = {name: {**_of(hints[name]), **texts.get(name, {})} for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _of(hint: Any) -> dict[str, Any]:
    """The schema of one type."""
    if hint in _PLAIN:
        return dict(_PLAIN[hint])
    if dataclasses.is_dataclass(hint):
        return {"$ref": f"#/$defs/{hint.__name__}"}  # type: ignore[union-attr]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return {"anyOf": [_of(argument) for argument in arguments]}
    if typing.get_origin(hint) is tuple and arguments[-1] is not Ellipsis:
        return {"type": "array", "prefixItems": [_of(argument) for argument in arguments], "items": False}
    return {"type": "array", "items": _of(arguments[0])}


def _texts(kind: type) -> dict[str, dict[str, str]]:
    """What the docstring says of each attribute, of which several may share a text."""
    attributes = (inspect.getdoc(kind) or "").partition("Attributes:")[2]
    entries = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    return {
        name: {"description": re.sub(r"\s+", " ", text).strip()}
        for names, text in entries
        for name in names.split(", ")
    }

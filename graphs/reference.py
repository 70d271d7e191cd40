# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Writes the pages that are made from the code: ``make reference``.

    python -m graphs.reference [DIRECTORY]

``events.md`` and ``events.schema.json`` from the types of the events,
``configuration.md`` from the arguments of the programs, and ``metrics.md`` from what
they register. Nothing in them is from this
machine or its environment; a test compares them with what is committed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from typer.models import ArgumentInfo, OptionInfo

from dynamo.refit import args as coordinator
from dynamo.refit.cli import app
from dynamo.refit.events import MAX_EVENT_BYTES, SCHEMA, AnyEvent, Event
from dynamo.refit.metrics import CoordinatorMetrics, WorkerMetrics
from dynamo.refit.worker import args as worker

DOCS = Path(__file__).resolve().parent.parent / "components" / "docs"

MADE = "<!-- Made by `make reference` from {sources}: change it there. -->"

#: Fields that are explained once: of every event, and the tag, which is its name.
COMMON = {*Event.__struct_fields__, "event"}

#: Of an argument's help, as both parsers write it.
HELP = re.compile(r"(.*) \[env: (\w+); default: (.*)\]", re.S)

EVENTS_INTRODUCTION = f"""\
Schema {SCHEMA}: msgpack maps of at most {MAX_EVENT_BYTES // 1024} KiB on the event plane, lines of JSON in
`dynamo-refit watch --json` ([JSON Schema](events.schema.json)). `WeightVersionReady` travels on
`<namespace>.refit.weight_versions`, all others on `<namespace>.refit.refit_events`;
`dynamo.refit.bus.EventSubscriber` hears them. Each event is safe to lose, to repeat and to reorder: the
state behind it is what `dynamo-refit status` shows. Fields are only ever added, and a receiver ignores
those that it does not know."""  # noqa: E501

#: Variables of others that decide whether the parts find each other.
SHARED_VARIABLES = {
    "DYN_NAMESPACE": "the graph's namespace; the same for all of its parts",
    "DYN_DISCOVERY_BACKEND": "`kubernetes`, `etcd` or `file`; Dynamo's default is etcd",
    "DYN_FILE_KV": "the directory of `file` discovery; on one machine's disk",
    "ETCD_ENDPOINTS": "of `etcd` discovery",
    "DYN_REQUEST_PLANE": "`tcp` or `nats`: how endpoints are called",
    "DYN_EVENT_PLANE": "`zmq` or `nats`: how events travel",
    "NATS_SERVER": "of `nats`",
    "DYN_SYSTEM_PORT": "where a process serves `/health`, `/live` and `/metrics`",
    "DYN_LOG": "level of Dynamo's runtime: `error`, `warn`, `info`, `debug`",
    "UCX_TLS": "which transports UCX may use for NIXL; unset: all there are",
    "DYN_REFIT_CPU_LAYOUT": "of a worker on a CPU: `plain` runs on the weights as "
    "loaded, `packed` keeps vLLM's packed kernels",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m graphs.reference")
    parser.add_argument("directory", type=Path, nargs="?", default=DOCS)
    directory = parser.parse_args().directory
    for name, text in pages().items():
        (directory / name).write_text(text)
        print(directory / name)
    return 0


def pages() -> dict[str, str]:
    """The generated pages by file name."""
    return {
        "events.md": events_page(),
        "events.schema.json": json.dumps(events_schema(), indent=2) + "\n",
        "configuration.md": configuration_page(),
        "metrics.md": metrics_page(),
    }


# --- events -------------------------------------------------------------------


def events_schema() -> dict[str, Any]:
    """JSON Schema of a line of ``dynamo-refit watch --json``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"dynamo-refit events, schema {SCHEMA}",
        **_without_docstrings(msgspec.json.schema(AnyEvent)),
    }


def events_page() -> str:
    events = [kind.__name__ for kind in get_args(AnyEvent)]
    _, components = msgspec.json.schema_components([AnyEvent])
    others = [name for name in components if name not in events]
    parts = [
        "# Events",
        MADE.format(sources="`events.py` and `protocol.py`"),
        EVENTS_INTRODUCTION,
        "## Every event",
        _prose(inspect.getdoc(Event)),
        _fields(components[events[-1]], Event.__struct_fields__),
        *(_struct("##", name, components[name]) for name in events),
        "# What events are made of",
        *(_struct("###", name, components[name]) for name in sorted(others)),
    ]
    return "\n\n".join(parts) + "\n"


def _struct(level: str, name: str, schema: Mapping[str, Any]) -> str:
    own = [field for field in schema["properties"] if field not in COMMON]
    about = inspect.cleandoc(schema.get("description", ""))
    return "\n\n".join([f"{level} {name}", _prose(about), _fields(schema, own)])


def _fields(schema: Mapping[str, Any], names: Iterable[str]) -> str:
    required = schema.get("required", ())
    rows = []
    for name in names:
        of = schema["properties"][name]
        default = "" if name in required else _code(json.dumps(of["default"]))
        rows.append((f"`{name}`", _type(of), default))
    return _table(("field", "type", "default"), rows)


def _type(schema: Mapping[str, Any]) -> str:
    """What a field holds, in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type(of) for of in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            inner = ", ".join(_type(of) for of in schema["prefixItems"])
            return f"({inner})"
        return f"list of {_type(schema['items'])}"
    return schema.get("type", "anything")


def _without_docstrings(schema: Any) -> Any:
    """Names and types only: docstrings are on the page, in readable lines."""
    match schema:
        case dict():
            return {
                key: _without_docstrings(value)
                for key, value in schema.items()
                if not (key == "description" and isinstance(value, str))
            }
        case list():
            return [_without_docstrings(value) for value in schema]
    return schema


# --- metrics ------------------------------------------------------------------

METRICS_INTRODUCTION = """\
On `/metrics` of a process's system server (`DYN_SYSTEM_PORT`), with the labels of Dynamo's own metrics: `dynamo_namespace`,
`dynamo_component`, `dynamo_endpoint` and `worker_id`. No version is ever a label. The times are histograms in
seconds. [`deploy/prometheus.yml`](../../deploy/prometheus.yml) scrapes them, and
[`deploy/grafana/dynamo-refit.json`](../../deploy/grafana/dynamo-refit.json) is a dashboard over them."""  # noqa: E501


def metrics_page() -> str:
    parts = [
        "# Metrics",
        MADE.format(sources="`metrics.py`"),
        METRICS_INTRODUCTION,
        "## Worker",
        _families(WorkerMetrics()),
        "## Coordinator",
        _families(CoordinatorMetrics()),
    ]
    return "\n\n".join(parts) + "\n"


def _families(metrics: WorkerMetrics | CoordinatorMetrics) -> str:
    rows = []
    for family in metrics.families():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = sorted({key for s in family.samples for key in s.labels} - {"le"})
        rows.append((f"`{name}`", family.type, ", ".join(labels), family.documentation))
    return _table(("metric", "type", "labels", "meaning"), rows)


# --- configuration ------------------------------------------------------------


def configuration_page() -> str:
    parts = [
        "# Configuration",
        MADE.format(sources="the programs' arguments"),
        "An argument wins over its environment variable, and that over the default.",
        "## Coordinator: `python -m dynamo.refit`",
        _flags(coordinator.build_parser()),
        "## Worker: `python -m dynamo.refit.worker`",
        "Every argument of `python -m dynamo.vllm` and these:",
        _flags(worker.build_parser()),
        "## `dynamo-refit`",
        *_commands(),
        "## Variables that the parts share",
        _table(
            ("variable", "meaning"),
            [(f"`{name}`", text) for name, text in SHARED_VARIABLES.items()],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _flags(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if action.dest == "help":
            continue
        text, variable, default = HELP.fullmatch(action.help).groups()
        rows.append(
            (
                f"`{action.option_strings[0]}`",
                f"`{variable}`",
                "" if default == "None" else f"`{default}`",
                _meaning(text, action.choices),
            )
        )
    return _table(("flag", "environment", "default", "meaning"), rows)


def _commands() -> Iterator[str]:
    """Each command of ``dynamo-refit``, by the signature of its function."""
    functions = {
        c.name or c.callback.__name__: c.callback for c in app.registered_commands
    }
    for name, function in sorted(functions.items()):
        types = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
        yield f"### `dynamo-refit {name}`"
        yield _prose(inspect.getdoc(function))
        yield _table(
            ("argument", "environment", "default", "meaning"),
            # What is not annotated is no option: typer's own context.
            [
                _parameter(p, *annotated)
                for p in parameters
                if (annotated := get_args(types[p.name]))
            ],
        )


def _parameter(
    parameter: inspect.Parameter, kind: Any, info: ArgumentInfo | OptionInfo
) -> tuple[str, ...]:
    if isinstance(info, ArgumentInfo):
        name = info.metavar or parameter.name.upper()
    else:
        # In an annotation, typer takes the first flag for the default.
        first = () if info.default is ... else (info.default,)
        flag = f"--{parameter.name.replace('_', '-')}"
        name = ", ".join((*first, *info.param_decls) or (flag,))
    needed = parameter.default is inspect.Parameter.empty
    default = "" if needed or not parameter.default else _code(parameter.default)
    choices = [
        choice
        for of in (kind, *get_args(kind))
        if get_origin(of) is Literal
        for choice in get_args(of)
    ]
    return (
        f"`{name}`",
        f"`{info.envvar}`" if info.envvar else "",
        "required" if needed else default,
        _meaning(info.help or "", choices),
    )


def _code(value: object) -> str:
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _meaning(text: str, choices: Iterable[str] | None) -> str:
    listed = ", ".join(f"`{choice}`" for choice in choices or ())
    return f"{text}; one of {listed}" if listed else text


# --- Markdown -----------------------------------------------------------------


def _prose(docstring: str) -> str:
    """A docstring as Markdown: its double backquotes and roles are Sphinx's."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", docstring)
    return text.replace("``", "`")


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    cells = [[_cell(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())

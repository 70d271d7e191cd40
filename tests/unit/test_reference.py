# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The generated pages are those of this code."""

from __future__ import annotations

import json
from typing import get_args

import jsonschema
import msgspec
import pytest

from dynamo.refit.errors import Failure
from dynamo.refit.events import AnyEvent, RefitCompleted, RefitFailed, WorkerFenced
from graphs.reference import DOCS, events_page, pages

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

FAILURE = Failure(kind="SourceLost", message="gone", stage="stage", worker=7, version=3)


@pytest.mark.parametrize("name", ["events.md", "events.schema.json"])
def test_the_committed_events_are_the_types(name: str) -> None:
    assert (DOCS / name).read_text() == pages()[name], "run: make reference"


def test_the_committed_configuration_is_the_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the environment of whoever makes it says."""
    monkeypatch.setenv("DYN_NAMESPACE", "mine")
    monkeypatch.setenv("DYN_REFIT_STAGING", "host")
    monkeypatch.setenv("DYN_REFIT_STAGE_SECONDS", "1")
    made = pages()["configuration.md"]
    assert (DOCS / "configuration.md").read_text() == made, "run: make reference"
    assert "| `--stage-seconds` | `DYN_REFIT_STAGE_SECONDS` | `300` |" in made
    assert "| `--refit-staging` | `DYN_REFIT_STAGING` | `auto` |" in made
    assert "| `--json` |" in made


def test_every_event_and_all_of_its_fields_are_on_the_page() -> None:
    page = events_page()
    for kind in get_args(AnyEvent):
        _, _, section = page.partition(f"\n## {kind.__name__}\n")
        section = section.partition("\n## ")[0]
        own = set(kind.__struct_fields__) - {
            "schema",
            "model",
            "sender",
            "sequence",
            "epoch",
            "at",
            "mac",
        }
        assert all(f"| `{field}` |" in section for field in own), kind


@pytest.mark.parametrize(
    "event",
    [
        RefitCompleted(
            model="m",
            version=3,
            announcement_id="a",
            fingerprint="w",
            workers=(7, 8),
            seconds=None,
            excluded=(FAILURE,),
        ),
        RefitFailed(version=3, failure=FAILURE, serving=((7, 2), (8, None))),
        WorkerFenced(worker=7, version=3, failure=FAILURE),
    ],
    ids=lambda event: type(event).__name__,
)
def test_lines_of_watch_follow_the_schema(event: AnyEvent) -> None:
    schema = json.loads((DOCS / "events.schema.json").read_text())
    line = json.loads(msgspec.json.encode(event))
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(line)
    for broken in (
        {**line, "version": "three"},
        {k: v for k, v in line.items() if k != "event"},
        {**line, "event": "Unheard"},
    ):
        assert not validator.is_valid(broken)

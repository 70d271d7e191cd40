# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A rank whose reads come at the speed of a socket says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dynamo.refit.rank import stager
from dynamo.refit.rank.slices import IntakeLayout
from tests.support.layouts import decoder_layer

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


@pytest.mark.parametrize(
    ("nbytes", "seconds", "said"),
    [
        (8_000_000_000, 16.1, "0.50 GB/s"),
        (8_000_000_000, 0.8, None),
        # Too little to tell.
        (1_000_000, 1.0, None),
    ],
)
def test_slow_reads_are_named_with_their_sources(
    nbytes: int, seconds: float, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        stager.logger, "warning", lambda text, *values: told.append(text % values)
    )
    layout = decoder_layer(0)
    plan = replace(layout.plan(rank=0), wire_nbytes=nbytes)
    stager._warn_if_slow(3, plan, layout.manifest, seconds)
    # Reads that wait for conversions, which wait for the model's steps, are as slow.
    waits = replace(plan, intake=IntakeLayout([layout.parameters[:1]], 0))
    stager._warn_if_slow(3, waits, layout.manifest, seconds)
    if said is None:
        assert told == []
    else:
        (line,) = told
        assert f"rank 3 read from trainer-0, trainer-1 at {said}" in line

# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Lives of a fleet in virtual time; ``make faults`` runs many more. The simulation has
to find what is wrong, too."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest

from dynamo.refit.coordinator.commit import CommitRound
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.worker.switch import Switch
from tests.faults import simulation
from tests.faults.simulation import simulate
from tests.faults.world import Violated

pytestmark = [
    pytest.mark.unit,
    pytest.mark.faults,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.core,
    pytest.mark.timeout(120),
]

SEEDS = range(25)


@pytest.mark.parametrize("seed", range(6))
def test_without_faults_every_version_arrives(seed: int) -> None:
    result = simulate(seed, faults=False)
    assert (result.published, result.failed, result.fenced) == (8, 0, 0)
    # A newer one may have come before an older one was there.
    assert result.completed >= 6
    assert result.tokens > 1000


def test_whatever_goes_wrong_the_fleet_comes_to_the_newest_version() -> None:
    results = [simulate(seed) for seed in SEEDS]
    assert min(result.faults for result in results) > 10
    for outcome in ("completed", "failed", "fenced"):
        assert sum(getattr(result, outcome) for result in results) > len(SEEDS) // 2


@pytest.mark.parametrize(
    ("target", "name", "faults", "kind"),
    [
        # Admitted whatever the fleet serves: where everyone who serves it is silent.
        (
            Reconciler,
            "_may_be_served",
            ("publish", "kill worker", "stall worker", "kill coordinator"),
            "wrong_version",
        ),
        # Says that it serves what it has only staged.
        (Switch, "_serve", simulation.FAULTS, "wrong_version"),
        # Takes a worker that died of its install for one that only left.
        (
            CommitRound,
            "left",
            ("publish", "install and undo fail", "kill worker"),
            "wrong_end",
        ),
    ],
)
def test_it_finds_what_is_broken(
    target: type, name: str, faults: tuple[str, ...], kind: str
) -> None:
    """Of all that may go wrong, what it takes comes together too seldom."""
    with (
        mock.patch.object(target, name, broken(name)),
        mock.patch.object(simulation, "FAULTS", faults),
        pytest.raises(Violated, match=kind),
    ):
        for seed in range(200):
            simulate(seed)


def broken(name: str) -> Callable:
    left = CommitRound.left

    def only_left(self: CommitRound, worker: int) -> None:
        self._done(worker)
        left(self, worker)

    return {
        "left": only_left,
        "_may_be_served": lambda self: False,
        "_serve": lambda self, staged: self._engine.begin_epoch(staged.version),
    }[name]

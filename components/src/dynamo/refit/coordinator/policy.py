# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What an operator decides: deadlines, the order of commits, how many may fail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dynamo.refit.protocol import InFlightPolicy

#: Seconds on top of a worker's own deadline before its silence is a failure.
GRACE_SECONDS = 15.0

CommitPolicy = Literal["barrier", "rolling", "canary"]
"""In which order the workers change, once all of them hold a version.

``barrier``: all pause, all install, all resume; if one cannot install, all go back
before a token was made. ``rolling``: at most ``max_unavailable`` at a time.
``canary``: one, and when its live weights are proved, the others as in ``rolling``.
"""


@dataclass(frozen=True)
class Policy:
    """Times in seconds.

    Args:
        stage_seconds: bound on the staging of one version.
        commit_seconds: bound on one worker's commit.
        in_flight: for announcements that do not say.
        commit: see :data:`CommitPolicy`.
        max_unavailable: workers that change at a time; 0: all of them.
        hold_seconds: how long a worker waits at a barrier before it goes on alone.
        drain_seconds: how long ``drain`` waits for running requests.
        quorum: the share of each component's workers that must stage a version; those
            that cannot are fenced when it is committed. 1: all, or none commits.
        direct_readers: how many workers read from the trainer at a time; the others
            read from those that hold the version already. 0: all.
        peer_readers: how many read from one worker at a time. 0: all.
        settle_seconds: after its start, the coordinator lets nobody serve start-up
            weights for so long: workers that know a version may not be seen yet.
    """

    stage_seconds: float = 300.0
    commit_seconds: float = 30.0
    in_flight: InFlightPolicy = "continue"
    commit: CommitPolicy = "barrier"
    max_unavailable: int = 1
    hold_seconds: float = 10.0
    drain_seconds: float = 30.0
    quorum: float = 1.0
    direct_readers: int = 0
    peer_readers: int = 2
    settle_seconds: float = 2.0

    def lease_seconds(self, workers: int) -> float:
        """Until every worker has committed or given up: then the trainer hears how it
        ended."""
        return self.stage_seconds + self.keep_seconds(workers) + 3 * GRACE_SECONDS

    def needed(self, workers: int) -> int:
        """How many of ``workers`` must stage a version."""
        # 0.55 * 100 is a little more than 55.
        return max(1, math.ceil(self.quorum * workers - 1e-9))

    def keep_seconds(self, workers: int) -> float:
        """How long a worker may have to wait for its turn to commit."""
        if self.commit == "barrier":
            # The second for the last of those that cannot take part in a barrier.
            rounds = 2
        else:
            rounds = math.ceil(workers / (self.max_unavailable or workers or 1)) + 1
        return rounds * (self.commit_seconds + self.drain_seconds + GRACE_SECONDS)

    def at_a_time(self, workers: int, changed: int) -> int:
        """How many of ``workers`` may change together when ``changed`` have."""
        if self.commit == "canary" and not changed:
            return 1
        if self.commit == "barrier" or self.max_unavailable == 0:
            return workers
        return self.max_unavailable

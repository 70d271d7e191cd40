# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a worker's last refit was like, for its status. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from dynamo.refit.protocol import (
    CacheCounters,
    CacheUse,
    RankVote,
    SessionUse,
    StagingMode,
)


@dataclass
class LastRefit:
    """``since`` (Unix seconds) the worker serves what it serves, which stalled it for
    ``stall_ms``; where its ranks stage, and what the last stage found in the cache."""

    since: float | None = None
    stall_ms: float | None = None
    staging: StagingMode | None = None
    cache: CacheUse | None = None

    def staged(self, votes: tuple[RankVote, ...]) -> None:
        counters = [vote.counters for vote in votes]
        total = {
            name: sum(getattr(of_rank, name) for of_rank in counters)
            for name in CacheCounters.__struct_fields__
        }
        # From the one that builds most to the one that builds nothing.
        order = get_args(SessionUse).index
        self.staging = votes[0].memory.mode
        self.cache = CacheUse(
            session=min((vote.session for vote in votes), key=order),
            counters=CacheCounters(**total),
        )

# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The KV epoch in a request's ``cache_salt``, which is in the keys of vLLM's prefix
cache and in its KV events.

Dynamo's router hashes a request's tokens with the salt that the client gave, and a
block's with the salt of the block's event. So the epoch has to be in the first and
must not be in the second.
"""

from __future__ import annotations

import functools
import re
import uuid
from collections.abc import Callable

from vllm.distributed.kv_events import BlockStored, EventBatch

#: The end of a salt that was given an epoch of :func:`new_epoch`, and no more.
EPOCH = re.compile(r"(?:^|\|)refit:\d+-[0-9a-f]{8}$")


def new_epoch(version: int) -> str:
    """An epoch that no request has had before."""
    return f"{version}-{uuid.uuid4().hex[:8]}"


def with_epoch(salt: str | None, epoch: str) -> str | None:
    """The ``cache_salt`` of a request, with ``epoch`` in it.

    A salt of the user's own stays in front of it. Without an epoch (before the
    first refit) the salt is left as it is.
    """
    if not epoch:
        return salt
    return f"{salt}|refit:{epoch}" if salt else f"refit:{epoch}"


def without_epoch(salt: str) -> str:
    """The salt that the request came with; empty for none.

    A salt that is one request's own stays as it is: no other can hit its blocks.
    """
    return EPOCH.sub("", salt)


def hiding_epochs(publish: Callable[[EventBatch], None]) -> Callable[..., None]:
    """``publish`` of an engine's KV events, without the epochs in them."""

    @functools.wraps(publish)
    def publish_without_epochs(events: EventBatch) -> None:
        for event in events.events:
            if isinstance(event, BlockStored) and event.extra_keys:
                event.extra_keys = [_keys_without_epoch(k) for k in event.extra_keys]
        publish(events)

    return publish_without_epochs


def _keys_without_epoch(keys: tuple | None) -> tuple | None:
    """What one block is hashed with beside its tokens: texts are salts, and names of
    LoRA adapters."""
    hidden = (without_epoch(k) if isinstance(k, str) else k for k in keys or ())
    return tuple(key for key in hidden if key != "") or None

# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The epoch goes into a salt, and out of the KV events that tell of it."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.distributed.kv_events import AllBlocksCleared, BlockStored, KVEventBatch
from vllm.v1.core.kv_cache_utils import to_event_extra_keys
from vllm.v1.engine.core import EngineCoreProc

from dynamo.refit.worker.engine_process import MarkingEngineCore
from dynamo.refit.worker.kv_epoch import (
    hiding_epochs,
    new_epoch,
    with_epoch,
    without_epoch,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

EPOCH = "5-0123abcd"


def stored(*extra_keys: tuple | None) -> BlockStored:
    return BlockStored(
        block_hashes=[b"a", b"b"][: len(extra_keys)],
        parent_block_hash=None,
        token_ids=[1, 2, 3, 4],
        block_size=2,
        lora_id=None,
        medium="GPU",
        lora_name=None,
        extra_keys=to_event_extra_keys(extra_keys),
    )


def published(*events: Any) -> list[Any]:
    batches: list[KVEventBatch] = []
    hiding_epochs(batches.append)(KVEventBatch(ts=1.0, events=list(events)))
    return batches[0].events


@given(
    salt=st.none() | st.text(max_size=40), version=st.integers(min_value=0, max_value=9)
)
def test_a_salt_is_found_again(salt: str | None, version: int) -> None:
    assert without_epoch(with_epoch(salt, new_epoch(version))) == (salt or "")


@pytest.mark.parametrize(
    "salt", ["tenant", "dynamo-cache-salt:alice|refit:b", "refit:"]
)
def test_a_salt_without_an_epoch_stays(salt: str) -> None:
    assert without_epoch(salt) == salt


@pytest.mark.parametrize("salt", [None, "tenant"])
def test_a_salt_of_one_request_alone_stays(salt: str | None) -> None:
    own = with_epoch(salt, f"{EPOCH}|{uuid.uuid4().hex}")
    assert without_epoch(own) == own


def test_an_event_has_the_salt_that_the_request_came_with() -> None:
    salt = with_epoch("dynamo-cache-salt:alice", EPOCH)
    with_media = (("lora", "adapter"), ("mm", "image", 0), ("cache_salt", salt))
    first, second = published(
        stored(with_media, None),
        stored((("cache_salt", with_epoch(None, EPOCH)),), (("mm", "image", -2),)),
    )
    assert first.extra_keys == [
        ("adapter", ("image", 0), "dynamo-cache-salt:alice"),
        None,
    ]
    assert second.extra_keys == [None, (("image", -2),)]


def test_events_of_another_kind_pass() -> None:
    events = [AllBlocksCleared(), stored(None, None)]
    assert published(*events) == events


def test_an_engine_s_process_hides_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[KVEventBatch] = []

    def start(core: EngineCoreProc) -> None:
        core.scheduler = SimpleNamespace(
            kv_event_publisher=SimpleNamespace(publish=batches.append)
        )

    monkeypatch.setattr(EngineCoreProc, "__init__", start)
    engine = MarkingEngineCore()
    event = stored((("cache_salt", with_epoch("alice", EPOCH)),))
    batch = KVEventBatch(ts=1.0, events=[event])
    engine.scheduler.kv_event_publisher.publish(batch)
    assert batches[0].events[0].extra_keys == [("alice",)]

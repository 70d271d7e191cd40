# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""How often a rank decodes and validates a manifest, and on which thread."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from dynamo.refit import manifest as manifests
from dynamo.refit.errors import RefitError
from dynamo.refit.manifest import CheckedManifest, Manifest, encode_manifest
from dynamo.refit.protocol import Done, Poll, Refused, Running, Stage
from dynamo.refit.rank.cycle import Limit
from dynamo.refit.rank.extension import RefitRank
from tests.support.layouts import one_slice, whole

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


def _manifest(size: int) -> Manifest:
    return one_slice((size,), whole((size,))).manifest


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was done with manifests in this process, and on which thread."""
    done: list[tuple[str, str]] = []
    decode, validate = manifests.decode_manifest, Manifest.validate

    def noted(what: str) -> None:
        done.append((what, threading.current_thread().name))

    def decoding(payload: bytes) -> Manifest:
        noted("decode")
        return decode(payload)

    def validating(manifest: Manifest) -> None:
        noted("validate")
        validate(manifest)

    monkeypatch.setattr(manifests, "decode_manifest", decoding)
    monkeypatch.setattr(Manifest, "validate", validating)
    return done


class _Rank:
    """A rank whose stager only says what it was given."""

    def __init__(self) -> None:
        self.staged: list[CheckedManifest] = []
        self._rank = object.__new__(RefitRank)
        self._rank.rank, self._rank._job, self._rank._manifest = 0, None, None
        self._rank._stager = SimpleNamespace(stage=self._stage, handover=None)

    def stage(self, version: int, digest: str, payload: bytes | None) -> object:
        request = Stage(
            version=version,
            manifest=digest,
            slot=0,
            staging="auto",
            seconds=60,
            payload=payload,
            want_reads=False,
        )
        reply = self._rank.answer(request)
        while isinstance(reply, Running):
            time.sleep(0.001)
            reply = self._rank.answer(Poll(version=version))
        return reply

    def _stage(self, request: Stage, checked: CheckedManifest, limit: Limit) -> Done:
        self.staged.append(checked)
        return Done()


def test_a_manifest_is_decoded_and_validated_once_off_the_model_s_thread(
    done: list[tuple[str, str]],
) -> None:
    one, other = _manifest(4), _manifest(8)
    digest, payload = one.fingerprint(), encode_manifest(one)
    rank = _Rank()
    done.clear()
    # It is sent again where another rank has refused a stage.
    for version, sent in enumerate((payload, None, payload, None)):
        assert rank.stage(version, digest, sent) == Done()
    assert done == [("decode", "refit-stage-0"), ("validate", "refit-stage-0")]
    expected = CheckedManifest(digest, one.layout_fingerprint(), one)
    assert rank.staged == [expected] * 4

    done.clear()
    assert rank.stage(5, other.fingerprint(), encode_manifest(other)) == Done()
    assert done == [("decode", "refit-stage-5"), ("validate", "refit-stage-5")]
    # One at a time is kept.
    with pytest.raises(RefitError, match=f"no manifest {digest[:12]}"):
        rank.stage(6, digest, None)


def test_a_manifest_that_is_another_one_is_refused_and_not_kept() -> None:
    one, other = _manifest(4), _manifest(8)
    rank = _Rank()
    reply = rank.stage(1, one.fingerprint(), encode_manifest(other))
    assert isinstance(reply, Refused)
    assert reply.failure.kind == "ManifestInvalid"
    assert reply.failure.version == 1
    with pytest.raises(RefitError, match="no manifest"):
        rank.stage(2, one.fingerprint(), None)
    assert rank.staged == []

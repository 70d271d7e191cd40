# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which version a rank says is staged and live, and with which functions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dynamo.refit.errors import NothingStaged
from dynamo.refit.rank.processing import Function
from dynamo.refit.rank.versions import Version, Versions

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


def _version(number: int, layer: SimpleNamespace) -> Version:
    packed = Function(layer, "packed", number)
    return Version(number, None, np.zeros(0, np.uint64), (packed,))


def test_installs_and_undoes_follow_each_other() -> None:
    layer, versions = SimpleNamespace(packed=0), Versions()
    with pytest.raises(NothingStaged, match=r"version 1 is not staged.*None"):
        versions.require_staged(1)
    with pytest.raises(NothingStaged, match=r"version 1 is not what was.*nothing"):
        versions.require_live(1)

    versions.staged = _version(1, layer)
    assert versions.require_staged(1) is versions.staged
    assert (versions.live, layer.packed) == (None, 0)
    # An undo of what was not installed changes nothing.
    versions.restored()
    assert (versions.live, layer.packed) == (None, 0)
    # An install, and an undo, may be repeated.
    for _ in range(2):
        versions.installed()
        assert (versions.require_live(1), layer.packed) == (versions.staged, 1)
    for _ in range(2):
        versions.restored()
        assert (versions.live, layer.packed) == (None, 0)

    versions.installed()
    one, versions.staged = versions.live, _version(2, layer)
    with pytest.raises(NothingStaged, match=r"version 1 is not staged.*2"):
        versions.require_staged(1)
    versions.restored()
    assert (versions.require_live(1), layer.packed) == (one, 1)
    versions.installed()
    assert (versions.require_live(2), layer.packed) == (versions.staged, 2)
    versions.restored()
    assert (versions.require_live(1), layer.packed) == (one, 1)
    versions.staged = None
    assert versions.require_live(1) is one

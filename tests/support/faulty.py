# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The real worker extension, with faults that a test orders through a file.

Passed to a real worker as ``--worker-extension-cls``. The file named by
``REFIT_TEST_FAULTS`` holds JSON, ``{"stage": ORDER, "install": ORDER}``; an order is
``{"rank": 1, "error": "text", "times": 1, "seconds": 2.0}``: the rank waits
``seconds``, then raises ``error`` (if there is one) for the first ``times`` calls.
Without the file this is the product. While it waits there is a file that says so; see
:mod:`tests.support.orders`.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

from dynamo.refit.manifest import CheckedManifest
from dynamo.refit.protocol import Stage, Staged
from dynamo.refit.rank.cycle import Limit
from dynamo.refit.rank.extension import RefitRank, RefitWorkerExtension
from dynamo.refit.rank.stager import RankStager
from tests.support.orders import waiting_file


class FaultyStager(RankStager):
    """Carries out orders, then does what it is asked for."""

    _obeyed: Counter[str]

    def stage(self, request: Stage, checked: CheckedManifest, limit: Limit) -> Staged:
        self._obey("stage")
        return super().stage(request, checked, limit)

    def install(self, version: int) -> None:
        self._obey("install")
        super().install(version)
        self._obey("after_install")

    def restore(self, version: int) -> None:
        self._obey("restore")
        super().restore(version)

    def _obey(self, step: str) -> None:
        path = Path(os.environ["REFIT_TEST_FAULTS"])
        if not path.exists():
            return
        orders = json.loads(path.read_text())
        order = orders.get(step)
        if order is None or self._rank != order["rank"]:
            return
        if not hasattr(self, "_obeyed"):
            self._obeyed = Counter()
        # A new file is a new order.
        key = f"{step} {path.stat().st_mtime_ns}"
        self._obeyed[key] += 1
        if seconds := order.get("seconds"):
            waiting = waiting_file(path, step)
            waiting.touch()
            time.sleep(seconds)
            waiting.unlink(missing_ok=True)
        if "error" in order and self._obeyed[key] <= order.get("times", 1000):
            raise RuntimeError(order["error"])


class FaultyRank(RefitRank):
    stager_class = FaultyStager


class FaultyExtension(RefitWorkerExtension):
    refit_rank_class = FaultyRank

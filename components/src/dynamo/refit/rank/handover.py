# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""From the threads of a pull to the one that runs the model.

Conversions run vLLM's own methods, which look at process-wide state and may talk to the
other ranks. So they run on the model's thread, a few between two steps, and on all
ranks in one order: whoever polls the ranks says how many.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from dynamo.refit.rank.cycle import Limit

#: Between two looks at the limit of who waits.
LOOK_SECONDS = 0.05


class Handover:
    """The conversions of one pull.

    Args:
        total: how many there are.
        convert: carries out number ``n``, on the thread that calls :meth:`run`.
    """

    def __init__(self, total: int, convert: Callable[[int], None]) -> None:
        self.total = total
        #: Those that have all that they take in.
        self.ready = 0
        #: Those that were carried out.
        self.done = 0
        #: Milliseconds that the last :meth:`run` kept the model's thread.
        self.ms = 0.0
        self._convert = convert
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        self._queued: torch.cuda.Event | None = None

    def offer(self, ready: int) -> None:
        """The first ``ready`` conversions can be carried out."""
        with self._changed:
            self.ready = max(self.ready, ready)

    def run(self, before: int) -> None:
        """Carry out all that come before number ``before``; on the model's thread.

        Whatever fails is raised where :meth:`wait` waits.
        """
        began = time.perf_counter()
        try:
            while self._failure is None and self.done < min(before, self.ready):
                self._convert(self.done)
                self._advance()
        except Exception as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        self.ms = (time.perf_counter() - began) * 1e3

    def wait(self, done: int, limit: Limit) -> None:
        """Block until the first ``done`` were carried out, and what they wrote is
        there; on another thread.

        Raises:
            StagingCancelled: see ``limit``. And whatever a conversion raised.
        """
        with self._changed:
            while self.done < done and self._failure is None:
                limit.check("waiting for the model's thread to convert weights")
                self._changed.wait(LOOK_SECONDS)
            if self._failure is not None:
                raise self._failure
            queued = self._queued
        if queued is not None:
            queued.synchronize()

    def _advance(self) -> None:
        queued = None
        if torch.cuda.is_available():
            # On the model's stream, like a step.
            queued = torch.cuda.Event()
            queued.record()
        with self._changed:
            self.done += 1
            self._queued = queued
            self._changed.notify_all()

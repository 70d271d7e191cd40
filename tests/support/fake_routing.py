# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a worker's place in routing; the real one is
:class:`dynamo.refit.worker.routing.WorkerRouting`."""

from __future__ import annotations


class FakeRouting:
    """What routers would see of the worker: whether at all, and under which label."""

    def __init__(self, *, admitted: bool = True) -> None:
        self.admitted = admitted
        self.withdrawn = False
        self.labelled: list[int] = []
        self.withdrawals = 0

    @property
    def seen(self) -> bool:
        return self.admitted and not self.withdrawn

    def admit(self) -> None:
        self.admitted = True

    async def label(self, version: int) -> None:
        self.labelled.append(version)

    async def withdraw(self) -> None:
        self.withdrawn = True
        self.withdrawals += 1

    async def restore(self) -> None:
        self.withdrawn = False

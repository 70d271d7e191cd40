# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Typed errors, and the one form in which they cross a process boundary.

Inside a process a part raises a :class:`RefitError`; at a process boundary it is
turned into a :class:`Failure`, which names the stage, tensor, rank and version
and says what to do. Nothing here knows Dynamo, vLLM or NIXL.
"""

from __future__ import annotations

import msgspec

#: Characters of an error's message that travel; loaders quote whole tensors.
MAX_MESSAGE = 2000


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An error as it travels in replies and events.

    ``kind`` is the class name of the error, ``stage`` the step it happened in
    (``announce``, ``prepare``, ``stage``, ``vote``, ``install``, ...).
    """

    kind: str
    message: str
    stage: str
    tensor: str | None = None
    rank: int | None = None
    worker: int | None = None
    version: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}: {self.kind}: {self.message}{self._place()}"

    def line(self) -> str:
        """One line, for a log or a terminal."""
        return " ".join(f"{self.kind}: {self.message}{self._place()}".split())

    def _place(self) -> str:
        where = [
            f"{name} {value}"
            for name, value in (
                ("version", self.version),
                ("worker", self.worker),
                ("rank", self.rank),
                ("tensor", self.tensor),
            )
            if value is not None
        ]
        return f" ({', '.join(where)})" if where else ""


class RefitError(Exception):
    """Base of all errors of this package."""

    def __init__(
        self, message: str, *, tensor: str | None = None, rank: int | None = None
    ) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.rank = rank


class EventRefused(RefitError):
    """An event that is malformed, oversized or of an unknown schema."""


class ManifestInvalid(RefitError):
    """A manifest that does not describe every tensor exactly once."""


class LayoutRefused(RefitError):
    """The published tensors cannot be mapped onto this model's parameters."""


class PackedWeights(RefitError):
    """The engine keeps a parameter in a layout that cannot be written in place."""


class UnsupportedConfiguration(RefitError):
    """The worker uses a feature that this release does not refit."""


class SourceLost(RefitError):
    """The trainer that holds the version is gone or does not answer."""


class TransferFailed(RefitError):
    """NIXL refused or broke off a transfer, or its source is gone."""


class FingerprintMismatch(RefitError):
    """The bytes are not those of the announced version."""


class MemoryShort(RefitError):
    """The staging buffers do not fit; the message has the numbers."""


class StagingCancelled(RefitError):
    """The stage was given up: superseded, aborted or past its deadline."""


class PointerMoved(RefitError):
    """A live parameter is no longer at the address the session was built for."""


class PeerUnsuitable(RefitError):
    """A replica cannot serve its copy of a version to others."""


class NothingStaged(RefitError):
    """An install was asked for a version that is not staged on this rank."""


class InstallUndone(RefitError):
    """Another rank could not install, so this one has put its old weights back."""


class NoWayBack(RefitError):
    """What was live before an install is not kept anywhere."""


class StaleEpoch(RefitError):
    """A command of a coordinator that a newer one has replaced."""


class OtherModel(RefitError):
    """A command for the workers of another model."""


class OutOfStep(RefitError):
    """A rank answered another request than the one asked: fence the replica."""


class Fenced(RefitError):
    """The worker has taken itself out: it serves nobody, and its process ends."""


class LeaseHeld(RefitError):
    """The buffers of a version are still being read."""


class StoreMissing(RefitError):
    """Several trainer ranks need a ``torch.distributed`` store to meet over."""


def error_from(failure: Failure) -> RefitError:
    """The error that ``failure`` carried across a process boundary.

    One of a kind that is not defined here becomes a plain RefitError.
    """
    kind = globals().get(failure.kind)
    if not (isinstance(kind, type) and issubclass(kind, RefitError)):
        return RefitError(str(failure), tensor=failure.tensor, rank=failure.rank)
    return kind(failure.message, tensor=failure.tensor, rank=failure.rank)


def failure_from(
    error: BaseException,
    *,
    stage: str,
    rank: int | None = None,
    worker: int | None = None,
    version: int | None = None,
) -> Failure:
    """The :class:`Failure` that carries ``error`` across a process boundary."""
    tensor = getattr(error, "tensor", None)
    return Failure(
        kind=type(error).__name__,
        message=(str(error) or repr(error))[:MAX_MESSAGE],
        stage=stage,
        tensor=tensor[:MAX_MESSAGE] if tensor is not None else None,
        rank=rank if rank is not None else getattr(error, "rank", None),
        worker=worker,
        version=version,
    )

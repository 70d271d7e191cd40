# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A thin adapter over a NIXL agent: the only file that imports nixl.

It owns the agent and turns NIXL's exceptions into this package's. It keeps no
cache and no policy, and it is not thread-safe: one thread at a time calls it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

import numpy as np
import torch

from dynamo.refit.errors import TransferFailed
from dynamo.refit.transport.ucx import allow_reads_on_one_gpu


def _import_nixl() -> tuple[Any, Any]:
    """NIXL's bindings and API, under the name of whichever wheel is installed."""
    for package in ("nixl", "nixl_cu13", "nixl_cu12"):
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(package)
            return (
                importlib.import_module(f"{package}._bindings"),
                importlib.import_module(f"{package}._api"),
            )
    raise ModuleNotFoundError("NIXL is not installed: pip install nixl")


bindings, api = _import_nixl()

Memory = Literal["DRAM", "VRAM"]

_NIXL_ERRORS = tuple(
    getattr(bindings, name) for name in dir(bindings) if name.endswith("Error")
)


@dataclass(frozen=True)
class Registration:
    """A registered set of regions; give it back with ``deregister``."""

    descriptors: Any
    regions: int


def memory_of(device: torch.device) -> tuple[Memory, int]:
    """NIXL's memory type and device number of a torch device."""
    if device.type == "cuda":
        return "VRAM", device.index or 0
    return "DRAM", 0


class NixlAgent:
    """One NIXL agent over UCX, without NIXL's own progress and listener threads.

    Either thread keeps a core busy even when idle. Without them a target makes
    progress when it calls :meth:`progress` (every 2 ms is enough for wire-up;
    the bytes themselves do not need it), an initiator when it polls a transfer.
    UCX reads its environment when the agent is made.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        allow_reads_on_one_gpu()
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent = api.nixl_agent(name, config)
        if "UCX" not in self._agent.backends:
            raise TransferFailed("NIXL has no UCX backend here: reinstall nixl")
        self._users: Counter[str] = Counter()
        #: What was loaded last of each peer that is known.
        self._peers: dict[str, bytes] = {}
        self._reads: WeakSet[Read] = WeakSet()

    def register(
        self, regions: list[tuple[int, int]], memory: Memory, device: int
    ) -> Registration:
        """Register ``(address, nbytes)`` regions of one device with UCX."""
        rows = [(address, nbytes, device, "") for address, nbytes in regions]
        with _NixlErrors(f"cannot register {len(rows)} regions of {memory}"):
            return Registration(self._agent.register_memory(rows, memory), len(rows))

    def deregister(self, registration: Registration) -> None:
        with _NixlErrors("cannot deregister memory"):
            self._agent.deregister_memory(registration.descriptors)

    def metadata(self) -> bytes:
        """What a peer needs in order to read from the registered regions."""
        return self._agent.get_agent_metadata()

    def connect(self, metadata: bytes) -> str:
        """Make a peer known by its metadata; returns the peer's agent name.

        Every call is undone by one :meth:`disconnect`; the last one drops the peer.
        Other metadata of a peer that is known already takes the place of what is known,
        and the reads that were prepared on that are :attr:`Read.stale`. NIXL could add
        the one to the other, but a region that the peer registered anew, with another
        remote key, it refuses, and from then on all metadata of that peer's name.

        Raises:
            TransferFailed: the metadata are refused, or a read from the peer is active.
        """
        known = self._known_peer(metadata)
        if known is not None and self._peers[known] != metadata:
            if any(read.active and read.peer == known for read in self._reads):
                raise TransferFailed(
                    f"{known!r} has registered its memory anew, and a read of what it "
                    "had before has not ended: stage the version again"
                )
            self._forget(known)
        with _NixlErrors("cannot load a peer's NIXL metadata"):
            name = self._agent.add_remote_agent(metadata)
        peer = name.decode() if isinstance(name, bytes) else name
        self._users[peer] += 1
        self._peers[peer] = metadata
        return peer

    def disconnect(self, peer: str) -> None:
        self._users[peer] -= 1
        if self._users[peer] > 0:
            return
        del self._users[peer]
        self._forget(peer)

    def _known_peer(self, metadata: bytes) -> str | None:
        """Whose ``metadata`` these are: they have the name after its length."""
        for peer in self._peers:
            name = peer.encode()
            if len(name).to_bytes(8, "little") + name in metadata:
                return peer
        return None

    def _forget(self, peer: str) -> None:
        with _NixlErrors(f"cannot forget peer {peer!r}"):
            self._agent.remove_remote_agent(peer)
        self._peers.pop(peer, None)
        for read in self._reads:
            if read.peer == peer:
                read.stale = True

    def prepare_read(
        self,
        peer: str,
        local: tuple[np.ndarray, Memory, int],
        remote: tuple[np.ndarray, Memory, int],
    ) -> Read:
        """A prepared READ of equally many remote and local descriptors.

        Each side is ``(rows, memory, device)``; ``rows`` is a uint64 array of
        shape ``[n, 2]`` of addresses and byte counts. The request can be posted
        again and again, and sees the bytes that are there when it is posted.
        """
        with _NixlErrors(f"cannot prepare a read from {peer!r}"):
            mine = self._agent.prep_xfer_dlist(
                "NIXL_INIT_AGENT", _rows(local[0], local[2]), local[1]
            )
            theirs = self._agent.prep_xfer_dlist(
                peer, _rows(remote[0], remote[2]), remote[1]
            )
            every = np.arange(len(local[0]), dtype=np.int32)
            handle = self._agent.make_prepped_xfer("READ", mine, every, theirs, every)
        read = Read(self._agent, peer, handle, [mine, theirs])
        self._reads.add(read)
        return read

    def progress(self) -> None:
        """Let UCX answer peers that are connecting to this agent."""
        with _NixlErrors("cannot make progress"):
            self._agent.get_new_notifs()


class Read:
    """A prepared READ from one peer; ``stale`` once the peer was forgotten, or loaded
    anew: NIXL does not post it any more."""

    def __init__(self, agent: Any, peer: str, handle: Any, lists: list[Any]) -> None:
        self._agent = agent
        self._handle = handle
        self._lists = lists
        self.peer = peer
        self.active = False
        self.stale = False

    def post(self) -> bool:
        """Start the read; True if it is done already.

        Where UCX copies with the CPU (shared memory) the call does the whole
        copy; the GIL is released meanwhile.
        """
        with _NixlErrors(f"cannot read from {self.peer!r}"):
            return self._settle(self._agent.transfer(self._handle))

    def done(self) -> bool:
        """Poll a posted read, which also drives its progress.

        Raises:
            TransferFailed: the read ended in an error; it is not active any more.
        """
        if not self.active:
            return True
        try:
            with _NixlErrors(f"the read from {self.peer!r} broke off"):
                return self._settle(self._agent.check_xfer_state(self._handle))
        except TransferFailed:
            self.active = False
            raise

    def release(self) -> None:
        """Free the request. Only for one that is not active.

        NIXL accepts the release of an active read, forgets it, and the bytes
        still land later (seen with nixl 1.4.1 over UCX): so a read that is
        still active keeps its buffers until it has ended.
        """
        if self.active:
            raise TransferFailed(f"a read from {self.peer!r} is still active")
        with _NixlErrors(f"cannot release a read from {self.peer!r}"):
            self._handle.release()
            for descriptors in self._lists:
                descriptors.release()

    def _settle(self, state: str) -> bool:
        self.active = state == "PROC"
        if state == "ERR":
            raise TransferFailed(f"the read from {self.peer!r} ended in an error")
        return state == "DONE"


class _NixlErrors:
    """Turn NIXL's exceptions into TransferFailed, with what was being done."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, _NIXL_ERRORS):
            raise TransferFailed(f"{self._doing}: {error}") from error


def _rows(addresses: np.ndarray, device: int) -> np.ndarray:
    """``[n, 2]`` addresses and sizes to NIXL's ``[n, 3]`` with the device."""
    rows = np.empty((len(addresses), 3), dtype=np.uint64)
    rows[:, :2] = addresses
    rows[:, 2] = device
    return rows

# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The live model: copied into, copied from, and guarded.

CUDA graphs and compiled code hold the addresses of the tensors they were captured
with, so an install writes in place and no address may change. The only code that
writes live weights; it is called between steps, on the thread that runs the model.

On a GPU an install is queued on the model's stream, like a step, and not waited for:
the step before it ends with the old weights, whatever is queued after it runs on the
new ones, and the engine gets the next step ready meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import nn

from dynamo.refit.errors import PointerMoved
from dynamo.refit.rank import host_copy
from dynamo.refit.rank.twin import held_tensors

#: From this size on a tensor is copied by a call of its own. One H100 reads and writes
#: 2.8 TB/s so for a model of 8 GB, and 2.3 with all tensors in one ``_foreach_copy_``.
LARGE = 8 << 20


class LiveModel:
    """Every tensor of the running model, and the ones of them that a version fills.

    Args:
        model: the engine's model. Its tensors must stay where they are from now on.
        filled: the tensors that a version fills, by name.
    """

    def __init__(self, model: nn.Module, filled: Mapping[str, torch.Tensor]) -> None:
        # A look at each place is 100 times quicker than a walk over the modules, and
        # it happens twice in every pause.
        self._places = [
            (name, table, key) for name, table, key, _ in held_tensors(model)
        ]
        self._addresses = [table[key].data_ptr() for _, table, key in self._places]
        self._clock = _clock(next(model.parameters()).device)
        self.filled = dict(filled)

    def check_addresses(self) -> None:
        """
        Raises:
            PointerMoved: a parameter, a buffer or another tensor that a module holds
                has moved; names it.
        """
        places = zip(self._places, self._addresses, strict=True)
        for (name, table, key), address in places:
            tensor = table.get(key)
            if not isinstance(tensor, torch.Tensor) or tensor.data_ptr() != address:
                raise PointerMoved(
                    "its storage moved since the session was built, so captured CUDA "
                    "graphs read the old one: restart this worker",
                    tensor=name,
                )

    def copy_from(self, staged: Mapping[str, torch.Tensor]) -> None:
        """Overwrite the live tensors with ``staged``, on the current stream.

        ``staged`` is only read; on a GPU it has to stay as it is until :meth:`wait`
        has returned. The call may be repeated, also after a failure. What a device
        refuses later ends its process, as in any step.

        Raises:
            PointerMoved: see :meth:`check_addresses`.
        """
        self.check_addresses()
        self._clock.start()
        try:
            with torch.inference_mode():
                _copy(
                    list(self.filled.values()), [staged[name] for name in self.filled]
                )
        finally:
            # What was queued before a failure reads ``staged``, too.
            self._clock.stop()
        self.check_addresses()

    def wait(self) -> float:
        """Block until what :meth:`copy_from` queued last is there, on any thread.

        Returns the milliseconds that it took; 0 if there was nothing.
        """
        return self._clock.wait()

    @torch.inference_mode()
    def copy_to(self, backup: Mapping[str, torch.Tensor]) -> None:
        """Copy the live tensors out, while they serve; blocks this thread."""
        copy_out(list(self.filled.values()), [backup[name] for name in self.filled])


def copy_out(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """Copy tensors to host memory while the model serves; blocks."""
    pairs = list(zip(sources, targets, strict=True))
    for source, target in pairs:
        # Few and small: vLLM holds nearly everything without gaps.
        if not source.is_contiguous():
            target.copy_(source)
    whole = [pair for pair in pairs if pair[0].is_contiguous()]
    if whole and whole[0][0].device.type == "cuda":
        host_copy.copy_out(*map(list, zip(*whole, strict=True)))
    elif whole:
        torch._foreach_copy_([target for _, target in whole], [s for s, _ in whole])


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each, on the current stream, in as few calls as are quick."""
    small: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for target, source in zip(targets, sources, strict=True):
        if target.nbytes < LARGE:
            small[0].append(target)
            small[1].append(source)
        else:
            target.copy_(source, non_blocking=True)
    if small[0]:
        torch._foreach_copy_(*small, non_blocking=True)


class _HostClock:
    """Times work that is done when its call returns."""

    def __init__(self) -> None:
        self._began = 0.0
        self._ms = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._ms = (time.perf_counter() - self._began) * 1e3

    def wait(self) -> float:
        return self._ms


class _StreamClock:
    """Times work that is queued on the current stream."""

    def __init__(self) -> None:
        self._began = torch.cuda.Event(enable_timing=True)
        self._ended: torch.cuda.Event | None = None

    def start(self) -> None:
        self._ended = None
        self._began.record()

    def stop(self) -> None:
        self._ended = torch.cuda.Event(enable_timing=True)
        self._ended.record()

    def wait(self) -> float:
        if self._ended is None:
            return 0.0
        self._ended.synchronize()
        return self._began.elapsed_time(self._ended)


def _clock(device: torch.device) -> _HostClock | _StreamClock:
    return _StreamClock() if device.type == "cuda" else _HostClock()


def synchronize(device: torch.device) -> None:
    """Wait until the calling thread's stream of ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()

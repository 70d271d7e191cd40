# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The live parameters: copied into, copied from, and guarded.

CUDA graphs and compiled code hold the addresses of the tensors they were captured
with, so an install writes in place and no address may change. The only code that
writes live weights, itself or through :mod:`layerwise`; it is called between steps,
on the thread that runs the model.

On a GPU an install is queued on the model's stream, like a step, and not waited for:
the step before it ends with the old weights, whatever is queued after it runs on the
new ones, and the engine gets the next step ready meanwhile.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from dynamo.refit.errors import PackedWeights, PointerMoved
from dynamo.refit.rank import host_copy
from dynamo.refit.rank.layerwise import ProcessedLayers
from dynamo.refit.rank.slices import ArenaLayout, Parameter
from dynamo.refit.rank.twin import held_tensors

#: From this size on a tensor is copied by a call of its own. One H100 reads and writes
#: 2.8 TB/s so for a model of 8 GB, and 2.3 with all tensors in one ``_foreach_copy_``.
LARGE = 8 << 20


class LiveParameters:
    """The parameters of the running model that a version fills, and every address.

    Parameters that the engine holds as they are loaded are copied, all at once. The
    others go through their layer's processing, layer by layer.

    Args:
        model: the engine's model. Its tensors must stay where they are from now on.
        layout: names the parameters, in the order of the arena.
        layers: the layers of ``model`` that are not laid out as loaded. Only a model
            that vLLM did not build (a test's) can do without.

    Raises:
        PackedWeights: without ``layers``, a parameter is not laid out as loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ArenaLayout,
        layers: ProcessedLayers | None = None,
    ) -> None:
        # A look at each place is 100 times quicker than a walk over the modules, and
        # it happens twice in every pause.
        self._places = [
            (name, table, key) for name, table, key, _ in held_tensors(model)
        ]
        self._addresses = [table[key].data_ptr() for _, table, key in self._places]
        self._device = next(model.parameters()).device
        self._names = [parameter.name for parameter in layout.parameters]
        self._layers = layers
        #: The parameters that :meth:`copy_to` cannot copy out.
        self.processed = frozenset() if layers is None else layers.names
        plain = _all_as_loaded(model, layout) if layers is None else layers.plain
        self._plain = [n for n, name in enumerate(self._names) if name in plain]
        self._tensors = [plain[self._names[n]].detach() for n in self._plain]
        self._clock = _clock(self._device)

    @property
    def can_copy_out(self) -> bool:
        """Whether :meth:`copy_to` makes a backup that :meth:`copy_from` can restore.

        Where it does not, the engine no longer has the bytes that were loaded: the way
        back to a version are the staged tensors it was installed from, kept by the
        caller, and from the first version that is installed there is no way back.
        """
        return not self.processed

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

    def copy_from(self, staged: list[torch.Tensor]) -> None:
        """Overwrite the live parameters with ``staged``, on the current stream.

        ``staged`` is in the layout's order, and only read; on a GPU it has to stay as
        it is until :meth:`wait` has returned. The call may be repeated, also after a
        failure. What a device refuses later ends its process, as in any step.

        Raises:
            PointerMoved: see :meth:`check_addresses`.
            LayerFailed: the layers before this one are new, all others are old: call
                again, or with the version before, or stop serving.
        """
        self.check_addresses()
        self._clock.start()
        try:
            if self._layers is not None:
                # They may fail, so they come before anything else has changed.
                self._layers.install(dict(zip(self._names, staged, strict=True)))
            with torch.inference_mode():
                _copy(self._tensors, [staged[n] for n in self._plain])
            if self._layers is not None:
                self._layers.refresh_attention()
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
    def copy_to(self, backup: list[torch.Tensor]) -> None:
        """Copy the live parameters out, while they serve; blocks this thread.

        Leaves ``backup`` alone where a parameter is :attr:`processed`.
        """
        copy_out(self._tensors, [backup[n] for n in self._plain])


def copy_out(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """Copy contiguous tensors to host memory while the model serves; blocks."""
    if sources and sources[0].device.type == "cuda":
        host_copy.copy_out(sources, targets)
    elif sources:
        torch._foreach_copy_(targets, sources)


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


def _all_as_loaded(model: nn.Module, layout: ArenaLayout) -> dict[str, nn.Parameter]:
    current = dict(model.named_parameters())
    for parameter in layout.parameters:
        found = current.get(parameter.name)
        if found is None or not _as_loaded(found, parameter):
            raise PackedWeights(
                f"loaded as {parameter.shape} {parameter.dtype}, which is not how the "
                "model holds it",
                tensor=parameter.name,
            )
    return current


def _as_loaded(found: torch.Tensor, parameter: Parameter) -> bool:
    return (
        tuple(found.shape) == parameter.shape
        and found.dtype == getattr(torch, parameter.dtype)
        and found.is_contiguous()
    )


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

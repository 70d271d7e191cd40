# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A rank's shadow as the same rank of another replica reads it: byte for byte, in the
form that the engine computes with.

What was converted for one replica is not converted again, and nothing of the engine's
loader is needed. That is sound only where both hold the same things in the same form,
which :func:`runtime_layout` sums up.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Mapping

import msgspec
import torch
import vllm
from vllm.platforms import current_platform

from dynamo.refit.errors import PeerUnsuitable
from dynamo.refit.manifest import Manifest, TensorEntry, image_prefix
from dynamo.refit.protocol import HeldTensor
from dynamo.refit.rank.conversion import RuntimeForm
from dynamo.refit.rank.runtime_layout import quantization_method
from dynamo.refit.rank.slices import ArenaLayout, Parameter, ReadSlice, read_whole


def runtime_layout(form: RuntimeForm, rank: int, ranks: int) -> str:
    """SHA-256 over all that says what a rank's tensors mean to its engine: names,
    dtypes, shapes and strides, the methods that made them and what these have chosen,
    the device, and the releases of vLLM and torch."""
    tensors = [
        (name, str(tensor.dtype), tensor.shape, tensor.stride())
        for name, tensor in sorted(form.held.items())
        if name in form.plain or name in form.made
    ]
    methods = [
        (layer.name, type(method).__qualname__, _choices(method))
        for layer in form.layers
        if (method := quantization_method(layer.live)) is not None
    ]
    device = current_platform.get_device_name(), _capability()
    releases = vllm.__version__, str(torch.__version__)
    layout = rank, ranks, tensors, methods, device, releases
    return hashlib.sha256(msgspec.msgpack.encode(layout)).hexdigest()


def _choices(method: object) -> list[tuple[str, str]]:
    """The settings of a quantization method, and the classes of what it uses."""
    return [
        (name, repr(value))
        if isinstance(value, (str, int, float, enum.Enum, type(None)))
        else (name, type(value).__qualname__)
        for name, value in sorted(vars(method).items())
    ]


def _capability() -> str:
    if current_platform.is_cuda():
        return str(current_platform.get_device_capability())
    return torch.backends.cpu.get_cpu_capability()


def held_tensors(layout: ArenaLayout) -> tuple[HeldTensor, ...]:
    """What lies in a shadow of ``layout``, in the order of memory."""
    parameters = sorted(layout.parameters, key=lambda p: layout.offsets[p.name])
    return tuple(
        HeldTensor(p.name, p.dtype, p.shape, layout.offsets[p.name]) for p in parameters
    )


def tensors_of_image(
    manifest: Manifest, rank: int, ranks: int, layout: str
) -> dict[str, TensorEntry]:
    """By the model's names, what ``rank`` reads of a ``manifest`` of images.

    Raises:
        PeerUnsuitable: the replica has another ``layout`` than this one.
    """
    if len(manifest.layouts) != ranks or manifest.layouts[rank] != layout:
        raise PeerUnsuitable(
            f"the replica that is to be read has {len(manifest.layouts)} ranks, or "
            "keeps its weights in another form than this one: read from the trainer, "
            "or from a replica with the same settings, hardware and releases",
            rank=rank,
        )
    prefix = image_prefix(rank)
    return {
        tensor.name.removeprefix(prefix): tensor
        for tensor in manifest.tensors
        if tensor.name.startswith(prefix)
    }


def check_image(
    tensors: Mapping[str, TensorEntry], live: Mapping[str, torch.Tensor]
) -> None:
    """An image of ``tensors`` is one of ``live``.

    Raises:
        PeerUnsuitable: names the first tensor that is not there, or is another one.
    """
    mine = {name: Parameter.of(name, tensor) for name, tensor in live.items()}
    for name in sorted(tensors.keys() | mine.keys()):
        theirs = tensors.get(name)
        if theirs is None or mine.get(name) != Parameter(
            name, theirs.shape, theirs.dtype
        ):
            raise PeerUnsuitable(
                "a version does not fill it here as it does in the replica that is to "
                "be read: read from the trainer",
                tensor=name,
            )


def read_image(
    tensors: Mapping[str, TensorEntry],
) -> tuple[list[Parameter], list[ReadSlice]]:
    """What is filled with ``tensors``, by the model's names, and how: one by one, and
    whole, with what pads a vocabulary."""
    parameters = [Parameter(name, t.shape, t.dtype) for name, t in tensors.items()]
    slices = [
        dataclasses.replace(read_whole(tensor), parameter=name)
        for name, tensor in tensors.items()
    ]
    return parameters, slices

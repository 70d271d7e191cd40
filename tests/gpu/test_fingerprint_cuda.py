# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel against the reference, on a real device."""

from __future__ import annotations

import pytest
import torch

from dynamo.refit.fingerprint import Batch, CudaFold, Part
from dynamo.refit.manifest import Box

pytestmark = [
    pytest.mark.unit,
    pytest.mark.nightly,
    pytest.mark.gpu_1,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SHAPES = [
    (),
    (1,),
    (7,),
    (513,),
    (3, 5),
    (129, 33),
    (64, 4096),
    (9, 99_999),
    (9, 100_000),
    (4, 6, 8),
]
DTYPES = [torch.bfloat16, torch.float32, torch.uint8, torch.float64]


def whole(tensor: torch.Tensor) -> Box:
    return tuple((0, size) for size in tensor.shape)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    size = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel() * size
    flat = torch.randint(0, 256, (count,), dtype=torch.uint8)
    return flat.view(dtype).view(shape)


def test_the_kernel_is_there() -> None:
    assert CudaFold is not None


def test_a_batch_of_every_shape_and_dtype_equals_the_cpu() -> None:
    tensors = [random_tensor(s, d) for s in SHAPES for d in DTYPES]
    expected = [Part(t, whole(t), t.shape).fold() for t in tensors]
    parts = [Part(t, whole(t), t.shape) for t in (t.cuda() for t in tensors)]
    batch = Batch(parts)
    for _ in range(2):
        assert batch.fold().tolist() == expected


def test_column_blocks_add_up_and_are_copied() -> None:
    tensor = random_tensor((300, 5120), torch.bfloat16).cuda()
    full = Part(tensor, whole(tensor), tensor.shape).fold()
    targets = [tensor.new_zeros(300, 2560) for _ in range(2)]
    halves = []
    for lo, target in zip((0, 2560), targets, strict=True):
        box = ((0, 300), (lo, lo + 2560))
        halves.append(Part(tensor[:, lo : lo + 2560], box, (300, 5120), target))
    values = Batch(halves, [True, True]).fold(copy=True)
    assert sum(values.tolist()) % 2**64 == full
    copied = torch.cat(targets, dim=1)
    # As integers: some of the random bytes are NaNs.
    assert torch.equal(copied.view(torch.int16), tensor.view(torch.int16))


def test_a_flipped_bit_is_seen() -> None:
    tensor = random_tensor((1000, 2048), torch.bfloat16).cuda()
    batch = Batch([Part(tensor, whole(tensor), tensor.shape)])
    before = batch.fold()[0]
    tensor.view(torch.int16)[999, 2047] ^= 1
    assert batch.fold()[0] != before

# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Threads whose copies do not hold up the model: each has a CUDA stream of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """To be made once and kept: torch has 32 streams and gives them out in turn, the
    model's among them. ``None``: ``device`` has no streams."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def use_stream(stream: torch.cuda.Stream | None) -> None:
    """On the calling thread: copies on the model's stream would hold it up."""
    if stream is not None:
        torch.cuda.set_device(stream.device)
        torch.cuda.set_stream(stream)


def one_thread(name: str, device: torch.device) -> ThreadPoolExecutor:
    """A thread that works in turn, on a new stream of ``device``."""
    return ThreadPoolExecutor(
        1, name, initializer=use_stream, initargs=(new_stream(device),)
    )

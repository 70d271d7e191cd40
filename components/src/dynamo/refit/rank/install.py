# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The live parameters: copied into, copied from, and guarded.

CUDA graphs and compiled code hold the addresses of the parameters they were
captured with, so an install writes in place and no address may change. The only
code that writes live weights; it is called between steps, on the thread that
runs the model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dynamo.refit.errors import PointerMoved
from dynamo.refit.rank.plan import Plan


class LiveParameters:
    """The parameters of the running model that a plan fills, and every address.

    Args:
        model: the engine's model. Its parameters and buffers must stay where they
            are from now on.
        plan: names the parameters, in the order of the arena.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        # A look at each place is 100 times quicker than a walk over the modules, and
        # it happens twice in every pause.
        self._places = list(_places(model))
        self._addresses = [held[key].data_ptr() for _, held, key in self._places]
        current = dict(model.named_parameters())
        self._tensors = [current[p.name].detach() for p in plan.parameters]

    def check_addresses(self) -> None:
        """
        Raises:
            PointerMoved: a parameter or buffer has moved; names it.
        """
        places = zip(self._places, self._addresses, strict=True)
        for (name, held, key), address in places:
            tensor = held.get(key)
            if tensor is None or tensor.data_ptr() != address:
                raise PointerMoved(
                    "its storage moved since the session was built, so captured CUDA "
                    "graphs read the old one: restart this worker",
                    tensor=name,
                )

    @torch.inference_mode()
    def copy_from(self, staged: list[torch.Tensor]) -> None:
        """Overwrite the live parameters with ``staged``; returns when it is done."""
        self.check_addresses()
        torch._foreach_copy_(self._tensors, staged)
        synchronize(self._tensors[0].device)
        self.check_addresses()

    @torch.inference_mode()
    def copy_to(self, backup: list[torch.Tensor]) -> None:
        """Copy the live parameters out, while they serve; blocks this thread."""
        torch._foreach_copy_(backup, self._tensors)
        synchronize(self._tensors[0].device)


def parameter_views(buffer: torch.Tensor, plan: Plan) -> list[torch.Tensor]:
    """The parameters of ``plan`` as views of a byte buffer of ``arena_nbytes``."""
    views = []
    for parameter in plan.parameters:
        start = plan.offsets[parameter.name]
        flat = buffer[start : start + parameter.nbytes]
        views.append(flat.view(getattr(torch, parameter.dtype)).view(parameter.shape))
    return views


def _places(
    model: nn.Module,
) -> Iterator[tuple[str, dict[str, torch.Tensor | None], str]]:
    """Where each parameter and buffer hangs: its name, the module's table, its key.

    Under every name: a tied tensor that is no longer tied has moved, too.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None:
                    yield f"{prefix}.{key}".lstrip("."), held, key


def synchronize(device: torch.device) -> None:
    """Wait until the calling thread's stream of ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()

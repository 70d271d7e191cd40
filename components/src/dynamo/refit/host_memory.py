# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Host memory that NIXL reads from and writes into."""

from __future__ import annotations

import numpy as np
import torch


def host_zeros(nbytes: int) -> torch.Tensor:
    """``nbytes`` zeros, uint8, with a page behind each of them.

    UCX reads another process's memory page by page, so huge pages make it about twice
    as fast. NumPy asks the kernel for them where it gives them on request only (the
    default of most distributions), and torch does not.
    """
    return torch.from_numpy(np.empty(nbytes, dtype=np.uint8)).zero_()

# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The worker extension, which can be told to forget what it has cached."""

from __future__ import annotations

import torch

from dynamo.refit.rank.extension import RefitWorkerExtension


class Extension(RefitWorkerExtension):
    """For cycles as they are without a cache."""

    def refit_forget(self) -> None:
        """Drop the session, its requests, its buffers and their registrations."""
        stager = self._refit_rank()._stager
        for session in (stager._session, stager._spare):
            if session is not None:
                session.close()
        if stager._arena is not None:
            stager._arena.close()
        stager._session = stager._spare = stager._proven = stager._arena = None
        stager._staged = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

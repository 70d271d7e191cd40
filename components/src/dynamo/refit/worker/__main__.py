# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo.refit.worker``: all the arguments of ``python -m dynamo.vllm``."""

import os

# As dynamo.vllm does: block hashes must agree between processes.
os.environ.setdefault("PYTHONHASHSEED", "0")

# vLLM's child processes import this module again, and must not import all of it.
if __name__ == "__main__":
    from dynamo.common.snapshot.restore_context import maybe_run_restore_standby_mode

    from dynamo.refit.worker.torchvision_stub import stand_in_if_missing

    maybe_run_restore_standby_mode()
    stand_in_if_missing()

    from dynamo.refit.worker.main import main

    main()

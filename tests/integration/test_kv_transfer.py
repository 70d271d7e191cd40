# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The KV connector of local graphs leaves the cores to the engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from graphs.local import CPU_ENVIRONMENT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(120),
]

PROGRAM = """
import json, time
import graphs.kv_transfer
from nixl._api import nixl_agent, nixl_agent_config
agent = nixl_agent("idle", nixl_agent_config(num_threads=4))
time.sleep(0.5)
before = time.process_time(), time.monotonic()
time.sleep(2)
busy, seconds = time.process_time() - before[0], time.monotonic() - before[1]
print(json.dumps({"seconds": seconds, "busy": busy}))
"""


def test_an_idle_agent_takes_hardly_any_of_a_core() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**CPU_ENVIRONMENT, **os.environ},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    # As NIXL starts it, the thread is busy all the time.
    assert measured["busy"] < 0.2 * measured["seconds"]

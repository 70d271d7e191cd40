# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H through a graph: what its loader computes is no slice of what is
published, so its worker ends at the start, and ``graphs.agg`` says why in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from graphs.tiny_model import VOCABULARY_SIZE
from tests.support.architectures import checkpoint
from tests.support.child import ROOT

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.timeout(300),
]

#: ``conv_weights``: what kernels read of a packed convolution; where nothing is packed,
#: the decay ``A`` is the first to be named.
REFUSAL = re.compile(
    r"worker0 ended:\n"
    r"dynamo-refit: UnsupportedConfiguration: NemotronHForCausalLM cannot be refitted "
    r"by this release: not just copies of slices "
    r".*model\.layers\.0\.mixer\.(conv_weights|A)\b.*; "
    r"serve it with python -m dynamo\.vllm \(rank 0, "
    r"tensor model\.layers\.0\.mixer\.\w+\)\n"
)


def test_nemotron_h_is_refused_in_one_line(tmp_path: Path) -> None:
    model = checkpoint(
        "nemotronh", 1, max_position_embeddings=4096, vocab_size=VOCABULARY_SIZE
    )
    ended = subprocess.run(
        [sys.executable, "-m", "graphs.agg", "--model", model, "--logs", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 1
    assert REFUSAL.fullmatch(ended.stderr), ended.stderr
    log = (tmp_path / "worker0.log").read_text()
    assert ended.stderr.splitlines()[-1] in log.splitlines()[-1]

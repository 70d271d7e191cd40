# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One fresh engine, started from a checkpoint, that answers some prompts and ends.

    python -m graphs.fresh_engine JOB.json ANSWERS.json

See :mod:`graphs.references`, which runs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, EngineArgs, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

EXTENSION = "dynamo.refit.rank.extension.RefitWorkerExtension"


def run_engine(job: dict) -> list[dict]:
    """Answer the job's prompts with an engine that is started here and now."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    options = parser.parse_args(
        [
            "--model",
            job["checkpoint"],
            "--tensor-parallel-size",
            str(job["tensor_parallel"]),
            "--worker-extension-cls",
            EXTENSION,
            *job["args"],
        ]
    )
    arguments = EngineArgs.from_cli_args(options)
    engine = LLM(**{k: v for k, v in vars(arguments).items() if k in vars(options)})
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], logprobs=1),
    )
    answers = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        steps = zip(tokens, output.outputs[0].logprobs, strict=True)
        answers.append(
            {"tokens": tokens, "logprobs": [step[t].logprob for t, step in steps]}
        )
    return answers


if __name__ == "__main__":
    request, stored = map(Path, sys.argv[1:])
    found = run_engine(json.loads(request.read_text()))
    temporary = stored.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    temporary.rename(stored)

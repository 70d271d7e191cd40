# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether the versions that an answer names are those that made its tokens, as far as
fresh engines can tell."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from graphs.client import Completion
from graphs.references import Answer


def mislabelled(
    completion: Completion, answer_of: Callable[[int | None], Answer]
) -> str:
    """Why its labels are wrong, or nothing.

    Args:
        answer_of: what a fresh engine of a version answers. Tokens after a change are
            made with KV of other weights, so it tells of the first of them only that
            it is not of the version before.
    """
    answer, labels = completion.answer, completion.versions
    if len(labels) != len(answer.tokens):
        return f"{len(labels)} of {len(answer.tokens)} tokens have a version"
    made = [(version, len(list(group))) for version, group in groupby(labels)]
    if not made:
        return ""
    version, tokens = made[0]
    alone = answer_of(version)
    if not begins_as(answer, alone, tokens):
        return f"its first {tokens} tokens are not of version {version}, as they say"
    differs = len(made) > 1 and answer_of(made[1][0]) != alone
    if differs and begins_as(answer, alone, tokens + 1):
        return f"token {tokens} is of version {version}, not {made[1][0]}"
    return ""


def begins_as(answer: Answer, other: Answer, tokens: int) -> bool:
    """Whether so many tokens and their log probabilities are the same."""
    mine, theirs = (
        (one.tokens[:tokens], one.logprobs[:tokens]) for one in (answer, other)
    )
    return mine == theirs

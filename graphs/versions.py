# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which version made which token, as a client of the frontend reads it.

Ask for it with :data:`ASK`; every answer, and every chunk of a stream, then has spans
in ``nvext.engine_data.weight_versions``.
"""

from __future__ import annotations

#: The ``nvext`` of a request.
ASK = {"extra_fields": ["engine_data"]}


class TokenVersions:
    """What the spans of one answer, or of all chunks of one stream, come to.

    The spans of a chunk are of all tokens so far. A stream that Dynamo migrated goes
    on at another worker, which knows of its own tokens only: spans of another worker
    follow those that came before.
    """

    def __init__(self) -> None:
        #: The workers that made it, in turn.
        self.workers: list[int] = []
        #: Of each of them, by choice.
        self._spans: list[dict[int, list[dict]]] = []

    def add(self, chunk: dict) -> None:
        """Take in an answer, or the next chunk of a stream."""
        data = (chunk.get("nvext") or {}).get("engine_data") or {}
        choices: dict[int, list[dict]] = {}
        for span in data.get("weight_versions") or ():
            choices.setdefault(span["index"], []).append(span)
            if self.workers[-1:] != [span["worker"]]:
                self.workers.append(span["worker"])
                self._spans.append({})
        if choices:
            self._spans[-1].update(choices)

    def of(self, index: int = 0) -> list[int | None]:
        """The version of each token of a choice; ``None``: made before any version."""
        return [
            span["version"]
            for choices in self._spans
            for span in choices.get(index, ())
            for _ in range(span["start"], span["end"])
        ]

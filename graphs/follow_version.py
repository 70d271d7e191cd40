# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A client that only wants answers of the newest version.

    python -m graphs.follow_version --url http://127.0.0.1:8000 --model tiny

It asks who serves what, follows the events, and sends every request to workers of the
newest version that the whole fleet serves (KV router only). A version may change while
an answer is made: each answer says which version made which of its tokens, which is
what off-policy training corrects by. One line of JSON per answer, until interrupted or
``--count`` are there.
"""

from __future__ import annotations

import argparse
import asyncio
import json

import aiohttp

from dynamo.refit.bus import EventSubscriber
from dynamo.refit.cli.fleet import fetch_status
from dynamo.refit.events import REFIT_EVENTS, RefitCompleted
from dynamo.refit.rpc import Caller, runtime_from_environment
from graphs.versions import ASK, TokenVersions


class NewestVersion:
    """What the fleet serves: its status first, then its events."""

    def __init__(self) -> None:
        self.version: int | None = None

    def heard(self, version: int | None) -> None:
        if version is not None:
            self.version = max(version, self.version or 0)

    async def follow(self, events: EventSubscriber) -> None:
        async for event in events:
            if isinstance(event, RefitCompleted):
                self.heard(event.version)


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, prompt: str, newest: int
) -> dict:
    """One completion by a worker of version ``newest``.

    Raises:
        aiohttp.ClientResponseError: no worker has it any more: a newer one came.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 16,
        "nvext": {
            **ASK,
            "routing_constraints": {"required_taints": [f"weights={newest}"]},
        },
    }
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        return await response.json()


async def main(options: argparse.Namespace) -> None:
    runtime = runtime_from_environment()
    newest = NewestVersion()
    topic = runtime.endpoint(f"{options.namespace}.refit.{REFIT_EVENTS}")
    async with EventSubscriber(topic) as events, aiohttp.ClientSession() as session:
        following = asyncio.create_task(newest.follow(events))
        # After the subscription, so that nothing falls between the two.
        status = await fetch_status(Caller(runtime), options.namespace)
        newest.heard(status.completed)
        answered = 0
        while options.count is None or answered < options.count:
            if following.done():
                # It has ended with an error: no newer version would be heard of.
                await following
            version = newest.version
            if version is None:
                await asyncio.sleep(0.1)
                continue
            try:
                answer = await ask(
                    session, options.url, options.model, options.prompt, version
                )
            except aiohttp.ClientResponseError:
                if newest.version == version:
                    # The last worker has just left it; the event is on its way.
                    await asyncio.sleep(0.1)
                continue
            answered += 1
            made = TokenVersions()
            made.add(answer)
            line = {
                "version": version,
                "token_versions": made.of(),
                "text": answer["choices"][0]["text"],
            }
            print(json.dumps(line), flush=True)
        following.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m graphs.follow_version", description=__doc__
    )
    parser.add_argument("--url", required=True, help="of the frontend")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--namespace", default="dynamo")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--count", type=int)
    asyncio.run(main(parser.parse_args()))

# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Is NIXL there, does it move bytes, and by which of UCX's transports?

What UCX uses it says itself, in its log. Pure, but for :func:`ask`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import msgspec

from dynamo.refit.cli.doctor.finding import Finding, failure, ok, warning
from dynamo.refit.cli.doctor.trial import Trial, run_probe

NIXL = "NIXL"
TRANSPORTS = "UCX transports"

#: What the loopback reads.
NBYTES = 64 << 20

#: The child imports torch and NIXL.
PROBE_SECONDS = 90.0

#: UCX's transports by what they are good for, best first.
MEANINGS = {
    "RDMA between hosts": ("rc", "dc", "ud", "rc_verbs", "rc_mlx5", "dc_mlx5"),
    "GPU to GPU of one host": ("cuda_ipc",),
    "GPU to host": ("cuda_copy", "gdr_copy"),
    "one copy between processes of a host": ("cma", "xpmem", "knem"),
    "shared memory": ("posix", "sysv", "mm"),
    "sockets": ("tcp",),
}

#: In a line of UCX's log that tells a connection's configuration.
LANES = re.compile(r"cfg#\d+(?P<lanes>.*)")
LANE = re.compile(r"\b([a-z][a-z0-9_]*)/[\w.:-]+")


class _Loopback(msgspec.Struct, frozen=True):
    """As :class:`loopback.LoopbackReport`, which cannot be loaded without NIXL."""

    nbytes: int
    equal: bool
    seconds: float
    error: str = ""


def ask() -> Trial:
    """Read once through NIXL, as this environment says."""
    return run_probe("nixl", [str(NBYTES)], {"UCX_LOG_LEVEL": "info"}, PROBE_SECONDS)


def judge(trial: Trial, environment: Mapping[str, str]) -> list[Finding]:
    """What the read shows."""
    if not trial.answers:
        return [_no_answer(trial)]
    report = msgspec.json.decode(trial.answers[-1], type=_Loopback)
    used = transports(trial.log)
    if report.error or not report.equal:
        why = report.error or "other bytes arrived than were sent"
        return [
            failure(
                NIXL,
                f"a read between two agents fails: {why}",
                _forced(environment)
                or "see UCX's own log with UCX_LOG_LEVEL=info; reinstall nixl",
            ),
            *judge_transports(used, environment),
        ]
    rate = report.nbytes / report.seconds / 1e9
    told = f"{report.nbytes >> 20} MiB read and compared, at {rate:.1f} GB/s"
    return [ok(NIXL, told), *judge_transports(used, environment)]


def _no_answer(trial: Trial) -> Finding:
    error = "ModuleNotFoundError: "
    missing = next((line for line in trial.log if line.startswith(error)), None)
    if missing is not None:
        return failure(
            NIXL,
            f"it cannot be loaded: {missing.removeprefix(error)}",
            "install what weights are moved with: pip install 'dynamo-refit[trainer]' "
            "or, for a worker, 'dynamo-refit[vllm]'",
        )
    return failure(
        NIXL,
        f"it does not run: {trial.why}",
        "see UCX's own log with UCX_LOG_LEVEL=info; reinstall nixl",
    )


def transports(log: Iterable[str]) -> frozenset[str]:
    """The transports that UCX has put into a connection, from its log."""
    found = (match for line in log if (match := LANES.search(line)))
    return frozenset(name for match in found for name in LANE.findall(match["lanes"]))


def judge_transports(
    used: frozenset[str], environment: Mapping[str, str]
) -> list[Finding]:
    """What the transports in ``used`` mean for a refit."""
    if not used:
        summary = "UCX did not say which it uses"
        return [warning(TRANSPORTS, summary, "look for cfg# with UCX_LOG_LEVEL=info")]
    known = {
        meaning: sorted(used.intersection(names)) for meaning, names in MEANINGS.items()
    }
    told = "; ".join(
        f"{', '.join(names)}: {meaning}" for meaning, names in known.items() if names
    )
    if used - {"tcp", "self"}:
        if not known["RDMA between hosts"]:
            told += "; no RDMA, so between hosts it is sockets"
        return [ok(TRANSPORTS, told)]
    remedy = _forced(environment) or (
        "on one host UCX lacks cma: give the containers SYS_PTRACE and one PID "
        "namespace; between hosts it lacks RDMA: give them /dev/infiniband; with GPUs "
        "cuda_ipc: give all processes of a host all its GPUs"
    )
    summary = "TCP only, at the speed of a socket: every byte is copied several times"
    return [failure(TRANSPORTS, summary, remedy)]


def _forced(environment: Mapping[str, str]) -> str:
    """The way out where somebody has chosen UCX's transports."""
    chosen = [
        f"{name}={environment[name]}"
        for name in ("UCX_TLS", "UCX_NET_DEVICES")
        if environment.get(name, "all") != "all"
    ]
    if not chosen:
        return ""
    return f"{' and '.join(chosen)} in the environment forces it: unset it"

# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A Prometheus server of the test's own, configured as in ``deploy/``, and what a
dashboard asks it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from graphs.local import fetch, free_port

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "dynamo-refit.json"
CONFIG = ROOT / "deploy" / "prometheus.yml"

#: Grafana takes four times the scrape interval, or more.
RATE_INTERVAL = "120s"

START_SECONDS = 30.0


def prometheus_program() -> str | None:
    """``make prometheus`` puts it in place; another one may be on the path."""
    own = ROOT / ".cache" / "prometheus" / "usr" / "bin" / "prometheus"
    return str(own) if own.exists() else shutil.which("prometheus")


def scrape(url: str) -> dict[tuple[str, frozenset], float]:
    """What a process shows on ``/metrics``: values by name and own labels."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Prometheus:
    """Scrapes ``targets`` (``host:port``) every second."""

    def __init__(self, directory: Path, targets: list[str]) -> None:
        self._targets = targets
        self._url = f"http://127.0.0.1:{free_port()}"
        config = directory / "prometheus.yml"
        text = CONFIG.read_text()
        assert "scrape_interval: 5s" in text
        config.write_text(text.replace("scrape_interval: 5s", "scrape_interval: 1s"))
        found = directory / "dynamo-targets.json"
        found.write_text(json.dumps([{"targets": targets}]))
        self._child = subprocess.Popen(
            [
                prometheus_program(),
                f"--config.file={config}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={self._url.removeprefix('http://')}",
                "--log.level=warn",
            ]
        )

    def wait_until_scraped(self, since: float = 0.0) -> None:
        """Until all targets have answered twice, and after ``since`` (Unix)."""
        deadline = time.monotonic() + START_SECONDS
        twice, late = "count_over_time(up[1h]) > 1", f"timestamp(up) > {since}"
        expression = f"count(up == 1 and {twice} and {late})"
        while True:
            scraped = [float(v["value"][1]) for v in self.query(expression)]
            if scraped == [len(self._targets)]:
                return
            assert time.monotonic() < deadline, self.query("up")
            assert self._child.poll() is None
            time.sleep(0.2)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query, each with ``metric`` and ``value``."""
        answer = fetch(f"{self._url}/api/v1/query?{_encoded(query=expression)}")
        if answer is None:
            return []
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def values_of(self, label: str, series: str) -> list[str]:
        """As Grafana's ``label_values(series, label)``."""
        match = urllib.parse.urlencode({"match[]": series})
        return fetch(f"{self._url}/api/v1/label/{label}/values?{match}")["data"]

    def close(self) -> None:
        self._child.terminate()
        self._child.wait(20)

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def expressions() -> Iterator[tuple[str, str, str]]:
    """The dashboard's queries: title of the panel, legend, expression."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["legendFormat"], target["expr"]


def filled_in(expression: str, namespace: str) -> str:
    """With the values of Grafana's variables."""
    return expression.replace("$namespace", namespace).replace(
        "$__rate_interval", RATE_INTERVAL
    )


def numbers(series: list[dict[str, Any]]) -> list[float]:
    """The finite values of an answer."""
    values = [float(entry["value"][1]) for entry in series]
    return [value for value in values if math.isfinite(value)]


def _encoded(**parameters: str) -> str:
    return urllib.parse.urlencode(parameters)

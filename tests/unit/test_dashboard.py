# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The dashboard is one that Grafana's own model reads without a loss, and asks only for
what is exported. Its answers are tested in ``tests/e2e/test_refit_dashboard.py``."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from dynamo.refit.metrics import PREFIX, CoordinatorMetrics, WorkerMetrics
from tests.support.prometheus import CONFIG, DASHBOARD, expressions

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

SUFFIXES = re.compile("_(total|bucket|sum|count)$")


def exported() -> set[str]:
    """Every metric of ours, whether or not it has a value yet."""
    names = set()
    for metrics in (WorkerMetrics(), CoordinatorMetrics()):
        names |= {family.name for family in metrics.registry.collect()}
        late = (v for v in vars(metrics).values() if type(v).__name__ == "_LateGauge")
        names |= {gauge.name for gauge in late}
    return names


def asked() -> set[str]:
    text = " ".join(expression for _, _, expression in expressions())
    found = re.findall(rf"{PREFIX}_\w+", text)
    return {SUFFIXES.sub("", name) for name in found}


def test_grafanas_model_reads_it_without_a_loss() -> None:
    plugins.register_default_plugins()
    dashboard = json.loads(DASHBOARD.read_text())
    model = Dashboard.from_json(copy.deepcopy(dashboard))
    assert json.loads(JSONEncoder().encode(model)) == dashboard


def test_it_asks_for_what_is_exported() -> None:
    assert asked() - exported() == set()
    # What it leaves out can be had from what it shows, or is in the events.
    assert exported() - asked() == {
        f"{PREFIX}_{name}"
        for name in ("carried_over_requests", "commits", "request_hits")
    }


def test_every_panel_of_ours_is_of_the_namespace_that_is_chosen() -> None:
    for title, _, expression in expressions():
        ours = expression.count(f"{PREFIX}_")
        chosen = expression.count('{dynamo_namespace=~"$namespace"')
        assert ours == chosen, (title, expression)


def test_panels_do_not_overlap_and_have_ids_and_titles_of_their_own() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = Counter(
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    )
    assert set(cells.values()) == {1}
    assert max(x for x, _ in cells) < 24
    for key in ("id", "title"):
        assert max(Counter(panel[key] for panel in panels).values()) == 1


def test_the_scrape_configuration_reads_its_targets_from_a_file() -> None:
    [job] = yaml.safe_load(CONFIG.read_text())["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["dynamo-targets.json"]

# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark's table."""

from __future__ import annotations

COLUMNS = "pause install copy verify wire fingerprint backup allocate".split()


def print_table(results: dict) -> None:
    """Medians in milliseconds, but for the stall; see the module's ``measure``."""
    print(
        f"\n{results['gpus']} x {results['device']}, {results['model']}, TP "
        f"{results['tensor_parallel']}, {results['nbytes'] / 1e9:.2f} GB per version"
    )
    for name, value in results.get("figures", {}).items():
        print(f"  {name}: {value if isinstance(value, list) else round(value)}")
    for name, about in results["trainers"].items():
        tokens = {k: v for k, v in about["tokens_after"].items() if k != "answers"}
        cold = {step: round(ms, 1) for step, ms in about["cold"].items()}
        print(f"  {name}: cold {cold}, {about['cold_built']}; {tokens}")
        for compared in about.get("golden", []):
            print(f"    golden: {compared}")
        print(
            f"    memory {about['memory_before']} -> {about['memory_after']}; "
            f"collections of each rank, and the longest: {about['gc_pauses']}"
        )
    print(
        f"{'trainer':16} {'streams':>7} {'cycle':20} {'m':>5} {'quiet p95/max':>13} "
        f"{'stall p50/p95/max':>22} {'stall - m':>22} "
        + " ".join(f"{name[:7]:>7}" for name in COLUMNS)
        + "  GB/s  skew tok/s staging built"
    )
    for run in results["runs"]:
        stall, over = run["stall_ms"], run["stall_over_median_ms"]
        print(
            f"{run['trainer']:16} {run['streams']:7} {run['cycle']:20} "
            f"{run['median_gap_ms']:5.1f} "
            f"{run['quiet_ms']['p95']:6.1f}{run['quiet_ms']['max']:7.1f} "
            f"{stall['p50']:7.1f}{stall['p95']:7.1f}{stall['max']:8.1f} "
            f"{over['p50']:7.1f}{over['p95']:7.1f}{over['max']:8.1f} "
            + " ".join(f"{run[f'{name}_ms']['p50']:7.1f}" for name in COLUMNS)
            + f" {run['wire_gb_per_s']:5.0f} {run['skew_ms']['p50']:5.1f} "
            f"{run['staging_share']:13.0%} {run['built']}"
        )

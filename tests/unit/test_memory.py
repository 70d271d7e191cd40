# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which staging mode fits into which memory, with the numbers of the refusal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo.refit.errors import MemoryShort
from dynamo.refit.protocol import MemoryUse, StagingMode
from dynamo.refit.rank import memory
from dynamo.refit.rank.buffers import Arena
from dynamo.refit.rank.cycle import Cycle
from dynamo.refit.rank.memory import HEADROOM, FreeMemory, choose, free_memory
from dynamo.refit.rank.slices import ArenaLayout, Parameter

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

GIB = 1 << 30

#: A rank's parameters and its scratch, in bytes.
ARENA = 8 * GIB
SCRATCH = GIB // 4

#: What each mode takes, ``(device, host)``, of a GPU's rank and of a CPU's.
ON_GPU = {
    "device": (ARENA + SCRATCH, ARENA),
    "host": (0, 2 * ARENA + SCRATCH),
    "host-no-undo": (0, ARENA + SCRATCH),
}
ON_CPU = {
    "device": (0, 2 * ARENA + SCRATCH),
    "host": (0, 2 * ARENA + SCRATCH),
    "host-no-undo": (0, ARENA + SCRATCH),
}
MODES = list(ON_GPU)


def chosen(
    wanted: str, device: int | None, host: int, held: MemoryUse | None = None
) -> MemoryUse:
    free = FreeMemory(device, host)
    return choose(wanted, arena=ARENA, scratch=SCRATCH, free=free, held=held)


def use(mode: StagingMode, sizes: dict[str, tuple[int, int]] = ON_GPU) -> MemoryUse:
    device, host = sizes[mode]
    return MemoryUse(mode=mode, device_nbytes=device, host_nbytes=host)


# --- a mode that is asked for -------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_fits_to_the_byte_on_a_gpu(mode: StagingMode) -> None:
    device, host = ON_GPU[mode]
    assert chosen(mode, device, host) == use(mode)
    for less in [(device - 1, host), (device, host - 1)]:
        if min(less) >= 0:
            with pytest.raises(MemoryShort):
                chosen(mode, *less)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_fits_to_the_byte_on_a_cpu(mode: StagingMode) -> None:
    """Shadow, copy and scratch are all host memory there."""
    _, host = ON_CPU[mode]
    assert chosen(mode, None, host) == use(mode, ON_CPU)
    with pytest.raises(MemoryShort):
        chosen(mode, None, host - 1)


def test_a_mode_that_is_asked_for_is_not_replaced() -> None:
    with pytest.raises(MemoryShort) as caught:
        chosen("device", 0, 1000 * GIB)
    assert str(caught.value) == (
        "device takes 8.25 GiB of device and 8.00 GiB of host memory; 0.00 GiB of "
        "device and 1000.00 GiB of host memory are free: give vLLM less KV cache or "
        "the host more memory"
    )


# --- auto ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "host", "mode"),
    [
        (ARENA + SCRATCH, ARENA, "device"),
        (1000 * GIB, 1000 * GIB, "device"),
        # No room for the shadow on the device, or for the copy beside it.
        (ARENA + SCRATCH - 1, 2 * ARENA + SCRATCH, "host"),
        (0, 2 * ARENA + SCRATCH, "host"),
        (ARENA, 2 * ARENA + SCRATCH - 1, "host-no-undo"),
        (0, ARENA + SCRATCH, "host-no-undo"),
    ],
)
def test_auto_takes_the_first_that_fits_on_a_gpu(
    device: int, host: int, mode: StagingMode
) -> None:
    assert chosen("auto", device, host) == use(mode)


@pytest.mark.parametrize(
    ("host", "mode"),
    [
        (2 * ARENA + SCRATCH, "device"),
        (2 * ARENA + SCRATCH - 1, "host-no-undo"),
        (ARENA + SCRATCH, "host-no-undo"),
    ],
)
def test_auto_takes_the_first_that_fits_on_a_cpu(host: int, mode: StagingMode) -> None:
    assert chosen("auto", None, host) == use(mode, ON_CPU)


def test_where_nothing_fits_every_mode_is_told_with_its_numbers() -> None:
    with pytest.raises(MemoryShort) as caught:
        chosen("auto", SCRATCH - 1, 2 * GIB)
    assert str(caught.value) == (
        "device takes 8.25 GiB of device and 8.00 GiB of host memory; "
        "host takes 0.00 GiB of device and 16.25 GiB of host memory; "
        "host-no-undo takes 0.00 GiB of device and 8.25 GiB of host memory; "
        "0.25 GiB of device and 2.00 GiB of host memory are free: give vLLM less KV "
        "cache or the host more memory"
    )


def test_on_a_cpu_nothing_is_said_of_a_device_s_free_memory() -> None:
    with pytest.raises(MemoryShort) as caught:
        chosen("auto", None, 0)
    assert str(caught.value) == (
        "device takes 0.00 GiB of device and 16.25 GiB of host memory; "
        "host takes 0.00 GiB of device and 16.25 GiB of host memory; "
        "host-no-undo takes 0.00 GiB of device and 8.25 GiB of host memory; "
        "0.00 GiB of host memory are free: give vLLM less KV cache or the host more "
        "memory"
    )


# --- nothing is rounded -------------------------------------------------------


def taken(mode: str, arena: int, scratch: int, *, on_gpu: bool) -> tuple[int, int]:
    free = FreeMemory(1000 * GIB if on_gpu else None, 1000 * GIB)
    use = choose(mode, arena=arena, scratch=scratch, free=free)
    return use.device_nbytes, use.host_nbytes


@pytest.mark.parametrize("arena", [0, 1, 3, 8 * GIB - 1, 8 * GIB + 1, 9 * GIB])
def test_pinned_memory_is_as_large_as_what_is_in_it(arena: int) -> None:
    scratch = 3 * GIB // 8
    assert taken("device", arena, scratch, on_gpu=True) == (arena + scratch, arena)
    assert taken("host", arena, scratch, on_gpu=True) == (0, 2 * arena + scratch)
    assert taken("host-no-undo", arena, scratch, on_gpu=True) == (0, arena + scratch)


@pytest.mark.parametrize("mode", ["device", "host"])
def test_on_a_cpu_it_is_all_host_memory(mode: StagingMode) -> None:
    arena, scratch = 9 * GIB, 3 * GIB // 8
    assert taken(mode, arena, scratch, on_gpu=False) == (0, 2 * arena + scratch)
    assert taken("host-no-undo", arena, scratch, on_gpu=False) == (0, arena + scratch)


def test_a_backup_that_does_not_fit_is_refused_with_what_it_takes() -> None:
    with pytest.raises(MemoryShort, match=r"9\.00 GiB of host memory; .* 8\.50 GiB"):
        choose(
            "device",
            arena=9 * GIB,
            scratch=SCRATCH,
            free=FreeMemory(1000 * GIB, 17 * GIB // 2),
        )


# --- what is held already -----------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_an_arena_that_is_held_needs_no_room_again(mode: StagingMode) -> None:
    """Scratch does: the session before keeps its own for now."""
    on_host = mode != "device"
    device, host = (0, SCRATCH) if on_host else (SCRATCH, 0)
    assert chosen(mode, device, host, held=use(mode)) == use(mode)
    with pytest.raises(MemoryShort):
        chosen(mode, max(0, device - 1), max(0, host - 1), held=use(mode))
    held = use(mode, ON_CPU)
    assert chosen(mode, None, SCRATCH, held) == held
    with pytest.raises(MemoryShort):
        chosen(mode, None, SCRATCH - 1, held)


@pytest.mark.parametrize("missing", [1, SCRATCH, ARENA])
def test_an_arena_that_is_held_counts_as_far_as_it_goes(missing: int) -> None:
    """The use is the whole of it; only the rest must be free."""
    held = MemoryUse(
        mode="device",
        device_nbytes=ARENA + SCRATCH - missing,
        host_nbytes=ARENA - missing,
    )
    room = SCRATCH + missing
    assert chosen("device", room, missing, held) == use("device")
    for device, host in [(room - 1, missing), (room, missing - 1)]:
        with pytest.raises(MemoryShort, match=r"device takes 8\.25 GiB"):
            chosen("device", device, host, held)


def test_memory_of_one_side_does_not_make_up_for_the_other() -> None:
    held = use("device")
    with pytest.raises(MemoryShort):
        chosen("host", 1000 * GIB, ARENA + SCRATCH - 1, held)
    assert chosen("host", 0, ARENA + SCRATCH, held) == use("host")


SIZES = st.integers(0, 64 * GIB)


@given(
    arena=SIZES, scratch=SIZES, device=st.none() | SIZES, host=SIZES, wanted=st.data()
)
def test_what_is_chosen_fits_and_is_the_first_that_does(
    arena: int, scratch: int, device: int | None, host: int, wanted: st.DataObject
) -> None:
    mode = wanted.draw(st.sampled_from(["auto", *MODES]))
    candidates = MODES if mode == "auto" else [mode]
    free = FreeMemory(device, host)

    def fits(candidate: str) -> bool:
        try:
            choose(candidate, arena=arena, scratch=scratch, free=free)
        except MemoryShort:
            return False
        return True

    able = [candidate for candidate in candidates if fits(candidate)]
    if not able:
        with pytest.raises(MemoryShort):
            choose(mode, arena=arena, scratch=scratch, free=free)
        return
    taken = choose(mode, arena=arena, scratch=scratch, free=free)
    assert taken.mode == able[0]
    assert taken.host_nbytes <= host
    assert taken.device_nbytes <= (device or 0)
    total = taken.device_nbytes + taken.host_nbytes
    needed = scratch + (1 if taken.mode == "host-no-undo" else 2) * arena
    assert total == needed if device is None else needed <= total <= 2 * needed


# --- what is free -------------------------------------------------------------


def cgroup(
    root: Path, limit: str, current: int, stat: str = "anon 5\ninactive_file 0\n"
) -> Path:
    (root / "memory.max").write_text(f"{limit}\n")
    (root / "memory.current").write_text(f"{current}\n")
    (root / "memory.stat").write_text(stat)
    return root


def test_room_in_a_container_is_its_limit_less_its_use(tmp_path: Path) -> None:
    assert memory._cgroup_room(cgroup(tmp_path, str(4 * GIB), GIB)) == 3 * GIB


def test_a_container_s_cached_files_are_room(tmp_path: Path) -> None:
    stat = f"anon 7\nfile 9\ninactive_anon 3\ninactive_file {GIB}\nactive_file 4\n"
    root = cgroup(tmp_path, str(4 * GIB), 3 * GIB, stat)
    assert memory._cgroup_room(root) == 2 * GIB


def test_a_container_without_a_limit_has_no_room_of_its_own(tmp_path: Path) -> None:
    assert memory._cgroup_room(cgroup(tmp_path, "max", GIB)) is None


def test_a_stat_without_cached_files_is_read(tmp_path: Path) -> None:
    assert memory._cgroup_room(cgroup(tmp_path, "100", 40, "anon 5\n")) == 60
    assert memory._cgroup_room(cgroup(tmp_path, "100", 40, "")) == 60


def test_a_container_above_its_limit_has_less_than_nothing(tmp_path: Path) -> None:
    assert memory._cgroup_room(cgroup(tmp_path, "100", 140)) == -40


@pytest.mark.parametrize("gone", ["memory.max", "memory.current", "memory.stat"])
def test_without_its_files_there_is_no_limit(tmp_path: Path, gone: str) -> None:
    """At the root of the hierarchy, or with version 1."""
    (cgroup(tmp_path, "100", 40) / gone).unlink()
    assert memory._cgroup_room(tmp_path) is None
    assert memory._cgroup_room(tmp_path / "not there") is None


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with 10 GiB available; its container's files go into the result."""
    available = SimpleNamespace(available=10 * GIB)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: available)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_the_host_s_memory_but_for_some_headroom(
    host: Path, ranks: int
) -> None:
    room = (10 * GIB - HEADROOM) // ranks
    assert free_memory(CPU, ranks) == FreeMemory(None, room)


def test_the_smaller_of_machine_and_container_counts(host: Path) -> None:
    cgroup(host, str(4 * GIB), GIB)
    assert free_memory(CPU, 1) == FreeMemory(None, 3 * GIB - HEADROOM)
    cgroup(host, str(40 * GIB), GIB)
    assert free_memory(CPU, 1) == FreeMemory(None, 10 * GIB - HEADROOM)


def test_less_than_the_headroom_is_nothing(host: Path) -> None:
    cgroup(host, str(GIB), GIB - HEADROOM + 1)
    assert free_memory(CPU, 2) == FreeMemory(None, 0)
    cgroup(host, "100", 140)
    assert free_memory(CPU, 2) == FreeMemory(None, 0)


def test_a_gpu_s_free_memory_is_not_shared(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda", 1)
    asked = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 6 * GIB, 80 * GIB

    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", mem_get_info)
    room = (10 * GIB - HEADROOM) // 4
    assert free_memory(gpu, 4) == FreeMemory(6 * GIB - HEADROOM, room)
    assert asked == [gpu]
    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lambda _: (1, 80 * GIB))
    assert free_memory(gpu, 4) == FreeMemory(0, room)


# --- shadows ------------------------------------------------------------------


class FakeRegistrar:
    """A NIXL agent that registers anything."""

    def register(self, *_: object) -> None:
        return None


class FakeLive:
    """One live parameter that can be copied out."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self.parameter = parameter

    def copy_to(self, backup: dict[str, torch.Tensor]) -> None:
        backup["embed"].copy_(self.parameter)


def test_vocabulary_padding_is_zero_in_every_version() -> None:
    """Nobody publishes it, and an engine that loads a version fills it with zeros."""
    layout = ArenaLayout([Parameter("embed", (4, 2), "float32", unloaded=4)])
    arena = Arena(FakeRegistrar(), layout, use("device", ON_CPU), CPU, Cycle())
    live = torch.full((4, 2), 1.5)
    arena.preserve(FakeLive(live))
    for version in range(4):
        arena.begin()
        arena.staged["embed"][:2] = version
        live.copy_(arena.staged["embed"])
        arena.installed()
        assert live.tolist() == [[version] * 2] * 2 + [[0.0, 0.0]] * 2


# --- the KV cache's share -----------------------------------------------------


def room(available: int, wanted: str) -> int:
    return memory.room_for_cache(available, wanted, arena=ARENA, scratch=SCRATCH)


@pytest.mark.parametrize(
    ("wanted", "staging"),
    [
        ("auto", ARENA + SCRATCH + HEADROOM),
        ("device", ARENA + SCRATCH + HEADROOM),
        ("host", 0),
        ("host-no-undo", 0),
    ],
)
def test_the_cache_gets_what_staging_leaves(wanted: str, staging: int) -> None:
    assert room(60 * GIB, wanted) == 60 * GIB - staging


def test_what_is_left_for_staging_is_what_it_takes_at_the_start() -> None:
    """vLLM allocates the cache, and the rank then finds a shadow's room."""
    free = 60 * GIB - room(60 * GIB, "device") - HEADROOM
    assert chosen("device", free, ARENA) == use("device")
    with pytest.raises(MemoryShort):
        chosen("device", free - 1, ARENA)


def test_auto_does_not_take_more_than_half_from_the_cache() -> None:
    half = ARENA + SCRATCH + HEADROOM
    assert room(2 * half, "auto") == half
    assert room(2 * half - 1, "auto") == 2 * half - 1


def test_a_mode_that_leaves_no_cache_is_refused_with_the_numbers() -> None:
    taken = ARENA + SCRATCH + HEADROOM
    assert room(taken + 1, "device") == 1
    with pytest.raises(MemoryShort, match=r"8\.50 GiB .* 8\.50 GiB are left"):
        room(taken, "device")
    with pytest.raises(MemoryShort, match=r"0\.00 GiB are left"):
        room(-GIB, "device")

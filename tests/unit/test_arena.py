# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The arena from version to version: which shadow is live, which one the next version
comes into, and whether there is a way back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo.refit.errors import LayoutRefused, TransferFailed
from dynamo.refit.protocol import CacheCounters, MemoryUse, StagingMode
from dynamo.refit.rank import buffers
from dynamo.refit.rank.buffers import Arena
from dynamo.refit.rank.cycle import Cycle
from dynamo.refit.rank.host_copy import CopyFailed
from dynamo.refit.rank.model_arena import ModelArena
from dynamo.refit.rank.slices import ArenaLayout, Parameter
from tests.support.device_arena import DISGUISED, DeviceEngine, assert_is
from tests.support.fake_nixl import FakeNixlAgent
from tests.support.layouts import one_slice, whole

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

LAYOUT = ArenaLayout(
    [Parameter("plain", (3,), "float32"), Parameter("packed", (2, 2), "bfloat16")]
)


class FakeLive:
    """A test fake of :class:`dynamo.refit.rank.install.LiveModel`, all of a version
    being one number."""

    def __init__(self) -> None:
        self.version = 0

    def copy_to(self, backup: dict[str, torch.Tensor]) -> None:
        for tensor in backup.values():
            tensor.fill_(self.version)

    def copy_from(self, staged: dict[str, torch.Tensor]) -> None:
        self.version = _version(staged)


def _version(staged: dict[str, torch.Tensor]) -> int:
    """The one that all elements of all parameters are of."""
    (version,) = {
        value for tensor in staged.values() for value in tensor.flatten().tolist()
    }
    return int(version)


class Engine:
    """What a rank's stager does with an arena, on the host, without a transfer."""

    def __init__(self, mode: StagingMode = "host") -> None:
        manifest = one_slice((4,), whole((4,))).manifest
        self.agent = FakeNixlAgent(manifest)
        self.live = FakeLive()
        self.cycle = Cycle()
        memory = MemoryUse(mode=mode, device_nbytes=0, host_nbytes=0)
        device = torch.device("cpu")
        self.arena = Arena(self.agent, LAYOUT, memory, device, self.cycle)
        self.arena.preserve(self.live)

    def stage(self, version: int) -> None:
        self.arena.begin()
        for tensor in self.arena.staged.values():
            tensor.fill_(version)

    def install(self) -> None:
        self.live.copy_from(self.arena.staged)
        self.arena.installed()

    def restore(self) -> None:
        self.live.copy_from(self.arena.old)
        self.arena.restored()


def test_two_shadows_are_all_that_is_allocated_and_both_are_registered() -> None:
    engine = Engine()

    assert engine.cycle.counters() == CacheCounters(allocations=2, registrations=2)
    registered = [region for (region,) in engine.agent.registered.values()]
    assert registered == [
        (shadow.buffer.bytes.data_ptr(), LAYOUT.nbytes)
        for shadow in engine.arena.shadows
    ]
    engine.arena.close()
    assert engine.agent.registered == {}


def test_without_a_way_back_one_shadow_is_all_there_is() -> None:
    engine = Engine(mode="host-no-undo")
    assert engine.cycle.counters() == CacheCounters(allocations=1, registrations=1)
    for version in range(1, 4):
        # Whoever reads the live version must have ended.
        assert engine.arena.expendable == {0}
        engine.stage(version)
        assert (engine.arena.old, engine.arena.live) == (None, None)
        assert _version(engine.arena.staged) == version
        engine.install()
        assert (engine.live.version, engine.arena.live) == (version, 0)
        assert engine.arena.old is None


def test_a_shadow_has_its_parameters_in_order_and_begins_with_zeros() -> None:
    (shadow, _) = Engine().arena.shadows

    assert [tuple(t.shape) for t in shadow.by_name.values()] == [(3,), (2, 2)]
    assert list(shadow.by_name) == ["plain", "packed"]
    assert shadow.by_name["packed"].dtype == torch.bfloat16
    assert not shadow.buffer.bytes.any()
    shadow.by_name["packed"].view(torch.uint8).fill_(1)
    assert shadow.buffer.bytes.nonzero().flatten().tolist() == list(range(256, 264))


def test_versions_take_turns_and_the_one_before_is_the_way_back() -> None:
    engine = Engine()
    for version in range(1, 5):
        engine.stage(version)
        assert _version(engine.arena.staged) == version
        assert _version(engine.arena.old) == version - 1
        engine.install()
        assert engine.live.version == version
        assert _version(engine.arena.old) == version - 1


def test_a_version_that_is_not_installed_does_not_touch_the_live_one() -> None:
    engine = Engine()
    engine.stage(1)
    engine.install()
    for version in (2, 3, 4):
        engine.stage(version)
        assert _version(engine.arena.old) == 1
    engine.install()
    engine.restore()

    assert engine.live.version == 1


@pytest.mark.parametrize("first", [1, 2])
def test_a_restored_version_is_the_way_back_again(first: int) -> None:
    """Also right after the start, where it is no version of a trainer."""
    engine = Engine()
    for version in range(1, first):
        engine.stage(version)
        engine.install()
    for version in (7, 8):
        engine.stage(version)
        engine.install()
        engine.restore()
        assert engine.live.version == first - 1
    engine.stage(9)
    engine.install()

    assert engine.live.version == 9
    assert _version(engine.arena.old) == first - 1


def test_an_install_is_repeated_after_a_restore() -> None:
    engine = Engine()
    engine.stage(1)
    engine.install()
    engine.restore()
    engine.install()

    assert engine.live.version == 1
    engine.stage(2)
    assert _version(engine.arena.old) == 1


def test_an_arena_that_no_version_has_come_into_can_be_laid_out_anew() -> None:
    """In the order in which a trainer publishes; what was live at the start can be put
    back all the same, and later versions find the order that there is."""
    engine, turned = Engine(), ArenaLayout(LAYOUT.parameters, ["packed"])
    assert turned.offsets != LAYOUT.offsets
    engine.arena.arrange(turned)
    engine.stage(1)
    (first, _) = engine.arena.shadows
    at = turned.offsets["plain"]
    assert first.buffer.bytes[:8].any()
    assert torch.equal(
        first.buffer.bytes[at : at + 12].view(torch.float32), torch.ones(3)
    )
    assert _version(engine.arena.old) == 0
    engine.install()
    engine.restore()
    assert engine.live.version == 0
    engine.arena.arrange(LAYOUT)
    assert engine.arena.layout is turned
    for version in (2, 3, 4):
        engine.stage(version)
        engine.install()
        assert _version(engine.arena.old) == (version - 1 if version > 2 else 0)
        assert engine.live.version == version


def test_an_arena_for_other_tensors_is_given_back_if_no_version_came() -> None:
    """A first version fills what the start checkpoint did not have; a later one is
    refused, since the copy of what is live has no room for it."""
    engine = Engine()
    more = ArenaLayout([*LAYOUT.parameters, Parameter("bias", (2,), "float32")])
    memory = object.__new__(ModelArena)
    memory.arena = None
    assert memory.arrange(more) is more
    memory.arena = engine.arena
    assert memory.arrange(LAYOUT) is engine.arena.layout
    assert memory.arrange(more) is more
    assert memory.arena is None
    assert engine.agent.registered == {}

    engine = Engine()
    engine.stage(1)
    memory.arena = engine.arena
    with pytest.raises(LayoutRefused, match="restart this worker") as refused:
        memory.arrange(more)
    assert refused.value.tensor == "bias"
    assert memory.arena is engine.arena


def test_an_arena_that_cannot_keep_what_is_live_is_given_back() -> None:
    """As when the driver refuses the copy from a device."""
    agent = FakeNixlAgent(one_slice((4,), whole((4,))).manifest)

    def fail(backup: dict[str, torch.Tensor]) -> None:
        raise CopyFailed("CUDA error 700")

    made = object.__new__(ModelArena)
    made._agent, made._device, made.arena = agent, torch.device("cpu"), None
    made._live = SimpleNamespace(copy_to=fail)
    memory = MemoryUse(mode="host", device_nbytes=0, host_nbytes=0)
    with pytest.raises(CopyFailed):
        made.make({}, LAYOUT, memory, Cycle())
    assert made.arena is None
    assert agent.registered == {}


def test_a_first_version_that_is_given_up_leaves_the_way_back_as_it_is() -> None:
    """Nor does its shadow pass for the live one."""
    engine = Engine()
    engine.stage(1)
    engine.stage(2)

    assert _version(engine.arena.old) == 0
    assert _version(engine.arena.staged) == 2


@given(steps=st.lists(st.sampled_from(["stage", "install", "restore"]), max_size=12))
def test_only_what_is_expendable_ever_changes(steps: list[str]) -> None:
    """What others may read of the live version stays as it is, whatever comes next;
    neither an install nor its undoing changes any shadow."""
    engine = Engine()
    engine.stage(1)
    held = 1
    for version, step in enumerate(steps, 2):
        before = [shadow.buffer.bytes.clone() for shadow in engine.arena.shadows]
        kept = {0, 1} - (engine.arena.expendable if step == "stage" else set())
        if step == "stage":
            engine.stage(version)
            held = version
        elif step == "install":
            engine.install()
            assert _version(engine.arena.shadows[engine.arena.live].by_name) == held
        elif engine.arena.old is not None:
            engine.restore()
        for number in kept:
            assert torch.equal(
                engine.arena.shadows[number].buffer.bytes, before[number]
            )


def test_on_a_device_there_is_one_shadow_and_it_is_always_expendable() -> None:
    """On torch's meta device, which has no bytes."""
    manifest = one_slice((4,), whole((4,))).manifest
    memory = MemoryUse(mode="device", device_nbytes=0, host_nbytes=0)
    arena = Arena(
        FakeNixlAgent(manifest), LAYOUT, memory, torch.device("meta"), Cycle()
    )
    assert (len(arena.shadows), arena.live, arena.expendable) == (1, None, {0})
    for _ in range(2):
        arena.begin()
        assert (arena.live, arena.target, arena.expendable) == (None, 0, {0})
        arena.installed()
        assert (arena.live, arena.expendable) == (0, {0})
    arena.restored()
    assert arena.live is None


# --- a construction that fails --------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "mode"), [("meta", "device"), ("cpu", "host")], ids=["backup", "shadow"]
)
@pytest.mark.parametrize("call", ["_allocate", "views_of"])
def test_an_arena_that_finds_no_memory_leaves_nothing_registered(
    monkeypatch: pytest.MonkeyPatch, device: str, mode: StagingMode, call: str
) -> None:
    """For the backup of a device's shadow, or for the second shadow of a host."""
    agent = FakeNixlAgent(one_slice((4,), whole((4,))).manifest)
    agent.register([(1, 1)], "DRAM", 0)
    before, seen = dict(agent.registered), []
    original = getattr(buffers, call)

    def fail_the_second_time(*arguments: object) -> object:
        seen.append(dict(agent.registered))
        if len(seen) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return original(*arguments)

    monkeypatch.setattr(buffers, call, fail_the_second_time)
    memory = MemoryUse(mode=mode, device_nbytes=0, host_nbytes=0)
    with pytest.raises(torch.OutOfMemoryError):
        Arena(agent, LAYOUT, memory, torch.device(device), Cycle())

    assert len(seen[1]) > len(before)
    assert agent.registered == before


def test_a_shadow_that_nixl_refuses_takes_the_one_before_it_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = FakeNixlAgent(one_slice((4,), whole((4,))).manifest)
    register = agent.register

    def refuse_the_second(*arguments: object) -> int:
        if agent.registered:
            raise TransferFailed("cannot register 1 regions of DRAM")
        return register(*arguments)

    monkeypatch.setattr(agent, "register", refuse_the_second)
    memory = MemoryUse(mode="host", device_nbytes=0, host_nbytes=0)
    with pytest.raises(TransferFailed, match="cannot register"):
        Arena(agent, LAYOUT, memory, torch.device("cpu"), Cycle())

    assert agent.registered == {}


# --- on a device --------------------------------------------------------------------


@pytest.fixture(params=["as at the start", "as published"])
def device_engine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> DeviceEngine:
    """Serves version 2, and served 1 before."""

    def allocate(nbytes: int, device: object) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(buffers, "_allocate", allocate)
    monkeypatch.setattr(buffers, "memory_of", lambda device: ("VRAM", 0))
    engine = DeviceEngine(DISGUISED)
    assert (len(engine.arena.shadows), engine.arena.live) == (1, None)
    if request.param == "as published":
        layout = engine.arena.layout
        engine.arena.arrange(ArenaLayout(layout.parameters, ["packed"]))
        assert engine.arena.layout.offsets != layout.offsets
    for seed in (1, 2):
        engine.stage(seed)
        assert_is(engine.arena.old, seed - 1)
        engine.install()
        engine.keep()
    return engine


def test_on_a_device_an_install_is_undone_from_host_memory(
    device_engine: DeviceEngine,
) -> None:
    """And what comes after it has its way back, too."""
    engine = device_engine
    engine.stage(3)
    assert_is(engine.arena.old, 2)
    engine.install()
    assert_is(engine.live, 3)
    assert engine.arena.live == 0
    engine.restore()
    assert_is(engine.live, 2)
    assert engine.arena.live is None
    engine.stage(4)
    assert_is(engine.arena.old, 2)
    engine.install()
    assert_is(engine.live, 4)
    engine.keep()
    engine.stage(5)
    assert_is(engine.arena.old, 4)


def test_a_copy_that_is_not_whole_is_no_way_back(
    device_engine: DeviceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that comes meanwhile waits for a part of it only."""
    monkeypatch.setattr(buffers, "KEPT_AT_ONCE", 4096)
    engine = device_engine
    engine.stage(3)
    engine.install()
    looks = iter([False, False, True])
    engine.keep(lambda: next(looks))
    engine.stage(4)
    assert engine.arena.old is None
    engine.install()
    engine.keep()
    engine.stage(5)
    assert_is(engine.arena.old, 4)


def test_what_was_given_up_is_never_kept_for_what_is_live(
    device_engine: DeviceEngine,
) -> None:
    """As after a check of the live weights that an operator asks for."""
    engine = device_engine
    engine.stage(3)
    engine.keep()
    assert_is(engine.arena.old, 2)


def test_what_is_kept_already_is_not_copied_again(device_engine: DeviceEngine) -> None:
    def fail() -> bool:
        raise AssertionError("copied again")

    device_engine.keep(fail)
    assert_is(device_engine.arena.old, 2)

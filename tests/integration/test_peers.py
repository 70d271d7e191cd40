# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A replica that reads from another replica instead of from the trainer: its live bytes
are those of the golden load, whatever the two are made of and whatever happens to the
one that is read. Real ranks without engines, real NIXL.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dynamo.refit.errors import Failure, PeerUnsuitable, SourceLost
from dynamo.refit.protocol import Discard, RankVote, Withdraw
from dynamo.refit.worker.ranks import RanksFailed
from graphs.tiny_model import make_checkpoint
from tests.support.agent_half import built, offer
from tests.support.architectures import checkpoint as architecture
from tests.support.child import ChildFailed
from tests.support.counted_rank import CountedRanks
from tests.support.peers import MortalRanks, PeerHalf
from tests.support.raw_sources import Held, RawSources
from tests.support.survey import SurveyedRanks
from tests.support.variants import MODELS, TELLING, checkpoint

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.timeout(240),
]

WARM = ("warm", 0, 0, 0)

#: Of which vLLM computes something else than it loads: a Mamba layer's decay, MLA's two
#: halves of a projection.
CONVERTED = ("nemotronh", "deepseekv3")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawSources]:
    with RawSources(2, tmp_path_factory.mktemp("trainer")) as sources:
        yield sources


@pytest.fixture(scope="module")
def groups(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, CountedRanks]]:
    """One replica to read from, one like it that reads, and one that cannot."""
    sizes = {"source": 2, "reader": 2, "narrow": 1}
    groups = {
        name: CountedRanks(ranks, tmp_path_factory.mktemp(name))
        for name, ranks in sizes.items()
    }
    yield groups
    for group in groups.values():
        group.close()


def begin(groups: dict[str, CountedRanks], served: str, *names: str) -> list[PeerHalf]:
    """Replicas that have just loaded checkpoint A."""
    for name in names:
        groups[name].load(checkpoint(served, "A"))
    return [PeerHalf(groups[name]) for name in names]


def assert_serves(half: PeerHalf, golden: Path) -> None:
    assert half.group.digests() == half.group.golden(golden)


@pytest.mark.parametrize("served", TELLING)
def test_what_a_replica_reads_from_another_is_the_golden_load(
    groups: dict[str, CountedRanks], trainer: RawSources, served: str
) -> None:
    """Versions in turn through both slots, from a copy that is only staged and from one
    that is live: built once, and then warm."""
    a, b = begin(groups, served, "source", "reader")
    held = trainer.hold(checkpoint(served, "A"), 2)
    slots = []
    for cycle, weights in enumerate("BCABC"):
        golden = checkpoint(served, weights)
        a.stage(offer(held.write(cycle % 2, golden)))
        if cycle % 2:
            a.install()
        offered = a.serve()
        slots.append(offered.slot)
        votes = b.refit(offered)
        assert_serves(b, golden)
        a.release()
        if cycle == 0:
            assert {vote.session for vote in votes} == {"cold"}
        else:
            assert built(votes) == [WARM] * len(votes)
        if not cycle % 2:
            a.install()
        a.verify()
        assert_serves(a, golden)
    assert set(slots) == {0, 1}
    assert b.trainer.manifests_sent == 1
    held.release()


def test_the_memory_is_there_before_the_first_version(
    groups: dict[str, CountedRanks], trainer: RawSources
) -> None:
    """Both shadows are registered, and what is live is in one of them: a first version
    takes scratch alone. Nobody waits for more than a tenth of a second longer for it
    than for the next one."""
    slower = []
    for weights in ("B", "C", "B"):
        (half,) = begin(groups, "qwen3", "reader")
        assert [use.registrations for use in half.group.nixl()] == [2, 2]
        golden = checkpoint("qwen3", weights)
        held = trainer.hold(golden, 1)
        stages = []
        for slot, expected in enumerate(("cold", "warm")):
            votes = half.refit(offer(held.write(slot, golden)))
            assert {vote.session for vote in votes} == {expected}
            assert {vote.counters.allocations for vote in votes} == {1 - slot}
            times = [vote.timings for vote in votes]
            assert max(each.allocate_ms for each in times) < 20.0
            stages.append(max(t.finished_at - t.started_at for t in times))
        assert_serves(half, golden)
        slower.append(stages[0] - stages[1])
        held.release()
    print("a first version took longer by", slower)
    # The machine may be busy.
    assert min(slower) < 0.1


def test_versions_go_on_from_reader_to_reader_when_the_trainer_is_gone(
    groups: dict[str, CountedRanks], trainer: RawSources
) -> None:
    """What came from a peer is a source like any other: trainer, replica, replica,
    and the first one again, which has been restarted."""
    served = "qwen3"
    a, b = begin(groups, served, "source", "reader")
    golden = checkpoint(served, "B")
    held = trainer.hold(golden, 2)
    a.refit(offer(held.write(0, golden)))
    held.release()
    b.refit(a.serve())
    a.release()

    (c,) = begin(groups, served, "source")
    offered = b.serve()
    c.refit(offered)
    b.release()
    assert_serves(c, golden)
    # The trainer's name for the version, and the same bytes, as the first one had.
    again = c.serve()
    c.release()
    assert again.fingerprint == offered.fingerprint
    assert again.fingerprints == offered.fingerprints


def test_a_trainer_that_is_cut_otherwise_leaves_readers_warm(
    groups: dict[str, CountedRanks], trainer: RawSources
) -> None:
    """What a replica holds does not depend on how it came."""
    served = "qwen3moe"
    a, b = begin(groups, served, "source", "reader")
    for shards, weights, expected in ((2, "B", "cold"), (1, "C", "warm")):
        golden = checkpoint(served, weights)
        held = trainer.hold(golden, shards)
        a.refit(offer(held.write(0, golden)))
        votes = b.refit(a.serve())
        assert [vote.session for vote in votes] == [expected] * 2
        assert_serves(b, golden)
        a.release()
        held.release()


def test_two_versions_are_read_at_a_time(
    groups: dict[str, CountedRanks], trainer: RawSources
) -> None:
    """The live one by a joiner, the staged one by a replica that is to follow: each
    from its own shadow, and an install in between changes neither."""
    served = "qwen3"
    a, b = begin(groups, served, "source", "reader")
    held = trainer.hold(checkpoint(served, "A"), 2)
    old, new = checkpoint(served, "B"), checkpoint(served, "C")
    a.refit(offer(held.write(0, old)))
    live = a.serve()
    a.stage(offer(held.write(1, new)))
    staged = a.serve()
    assert (live.announced, {live.slot, staged.slot}) == (staged.announced, {0, 1})

    for turn in range(2):
        for offered, golden in ((live, old), (staged, new)):
            b.refit(offered)
            assert_serves(b, golden)
        if turn == 0:
            a.install()
            assert_serves(a, new)
    for announcement_id in list(a.announcements):
        a.release(announcement_id)
    held.release()


# --- nothing that is read changes ---------------------------------------------


def while_staging(half: PeerHalf, act: Callable[[], None], polls: int = 3) -> None:
    """Have ``act`` called once while ``half`` stages, after some polls of its ranks."""
    left = iter(range(polls))

    def look() -> None:
        if next(left, None) is None:
            half.caller.on_poll = lambda: None
            act()

    half.caller.on_poll = look


@pytest.fixture
def pair(groups: dict[str, CountedRanks]) -> tuple[PeerHalf, PeerHalf]:
    return tuple(begin(groups, "qwen3", "source", "reader"))


@pytest.fixture
def held(trainer: RawSources) -> Iterator[Held]:
    held = trainer.hold(checkpoint("qwen3", "A"), 2)
    yield held
    held.release()


OLD, NEW, NEXT = (checkpoint("qwen3", weights) for weights in "BCA")


def test_the_live_copy_stays_when_the_next_versions_come(
    pair: tuple[PeerHalf, PeerHalf], held: Held
) -> None:
    """The next version comes beside it at once. The one after that needs its memory,
    and waits until the reader is gone."""
    a, b = pair
    a.refit(offer(held.write(0, OLD)))
    offered, version = a.serve(), a.version
    a.stage(offer(held.write(1, NEW)))
    b.refit(offered)
    assert_serves(b, OLD)
    a.install()

    seen = []

    def read_and_go() -> None:
        b.refit(offered)
        seen.append(b.group.digests())
        a.group.call(Withdraw(version=version))

    while_staging(a, read_and_go)
    a.refit(offer(held.write(0, NEXT)))
    assert seen == [b.group.golden(OLD)]
    assert_serves(a, NEXT)


def test_a_staged_copy_that_is_read_is_not_overwritten(
    pair: tuple[PeerHalf, PeerHalf], held: Held
) -> None:
    """Staged, not live: another version would come where it is. It waits, in bounds."""
    a, b = pair
    a.stage(offer(held.write(0, OLD)))
    offered = a.serve()
    failure = a.refuse(offer(held.write(1, NEW)), seconds=1.0)
    assert failure.kind == "LeaseHeld"
    assert "release their leases, or prepare again in 5" in failure.message
    b.refit(offered)
    assert_serves(b, OLD)

    a.release()
    a.refit(offer(held.write(1, NEW)))
    assert_serves(a, NEW)


def test_a_lease_that_expires_holds_nobody_up(
    pair: tuple[PeerHalf, PeerHalf], held: Held
) -> None:
    a, _ = pair
    a.stage(offer(held.write(0, OLD)))
    a.serve(seconds=2.0)
    began = time.monotonic()
    a.refit(offer(held.write(1, NEW)))
    assert 1.0 < time.monotonic() - began < 20.0
    assert_serves(a, NEW)
    with pytest.raises(SourceLost, match="has ended here"):
        a.fingerprints(a.announcements[-1])


def test_a_stage_that_waits_for_readers_can_be_given_up(
    pair: tuple[PeerHalf, PeerHalf], held: Held
) -> None:
    a, _ = pair
    a.stage(offer(held.write(0, OLD)))
    a.serve()
    while_staging(a, lambda: a.group.call(Discard(version=a.version)))
    failure = a.refuse(offer(held.write(1, NEW)))
    assert (failure.kind, failure.message) == (
        "StagingCancelled",
        "cancelled while waiting for the readers of version 1",
    )


def test_a_version_that_is_given_up_is_not_read(
    pair: tuple[PeerHalf, PeerHalf], held: Held
) -> None:
    """Nobody waits for its readers, and one that is late finds out."""
    a, b = pair
    b.refit(offer(held.write(1, NEXT)))
    a.stage(offer(held.write(0, OLD)))
    offered, version = a.serve(), a.version
    a.discard()
    with pytest.raises(PeerUnsuitable, match="nothing was staged"):
        a.fingerprints(a.announcements[-1])
    assert a.unserved(version)[0] == "PeerUnsuitable"

    began = time.monotonic()
    a.stage(offer(held.write(1, NEW)))
    assert time.monotonic() - began < 10.0
    failure = b.refuse(offered)
    assert failure.kind == "FingerprintMismatch"
    assert_serves(b, NEXT)
    a.release()


def test_an_install_that_is_undone(pair: tuple[PeerHalf, PeerHalf], held: Held) -> None:
    """It only reads the shadows: both versions can be read before and after."""
    a, b = pair
    a.refit(offer(held.write(0, OLD)))
    first = a.version
    a.stage(offer(held.write(1, NEW)))
    staged = a.serve()
    a.install()
    assert a.unserved(first)[0] == "PeerUnsuitable"
    a.restore(RanksFailed(Failure(kind="-", message="-", stage="install")))
    assert_serves(a, OLD)
    for offered, golden in ((a.serve(first), OLD), (staged, NEW)):
        b.refit(offered)
        assert_serves(b, golden)
    for announcement_id in a.announcements:
        a.release(announcement_id)


def test_the_last_reader_ends_it(pair: tuple[PeerHalf, PeerHalf], held: Held) -> None:
    a, _ = pair
    a.stage(offer(held.write(0, OLD)))
    assert a.serve().announced == a.serve().announced
    one, other = a.announcements
    assert one != other
    a.release(one)
    with pytest.raises(SourceLost):
        a.fingerprints(one)
    assert a.fingerprints(other)
    assert a.refuse(offer(held.write(1, NEW)), seconds=0.5).kind == "LeaseHeld"
    a.release(other)
    a.release(other)
    a.stage(offer(held.write(1, NEW)))


# --- what cannot be served, and who is gone -----------------------------------


def test_a_replica_without_a_way_back_serves_what_is_in_its_only_shadow(
    groups: dict[str, CountedRanks], held: Held
) -> None:
    """The staged version, also when it is live, and no longer than the next one."""
    groups["source"].load(checkpoint("qwen3", "A"), "host-no-undo")
    groups["reader"].load(checkpoint("qwen3", "A"))
    a, b = PeerHalf(groups["source"], "host-no-undo"), PeerHalf(groups["reader"])
    a.stage(offer(held.write(0, OLD)))
    for _ in range(2):
        b.refit(a.serve())
        assert_serves(b, OLD)
        a.install()
    first = a.version
    for announcement in list(a.announcements):
        a.release(announcement)
    a.stage(offer(held.write(1, NEW)))
    assert a.unserved(first)[0] == "PeerUnsuitable"
    b.refit(a.serve())
    assert_serves(b, NEW)
    for announcement in a.announcements:
        a.release(announcement)


def test_a_replica_that_converts_dtypes_is_read_in_its_own(
    groups: dict[str, CountedRanks], trainer: RawSources
) -> None:
    """Published in float32, held in bfloat16: at most half of the bytes are read."""
    wide = make_checkpoint(MODELS / "peers-float32", seed=2)
    file = wide / "model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    a, b = begin(groups, "qwen3", "source", "reader")
    held = trainer.hold(wide, 1)
    voted = a.refit(offer(held.write(0, wide)))
    votes = b.refit(a.serve())
    a.release()
    for vote, before in zip(votes, voted, strict=True):
        assert vote.nbytes <= before.nbytes / 2
    assert b.group.digests() == a.group.digests() == a.group.golden(wide)
    held.release()


@pytest.mark.parametrize("served", CONVERTED)
def test_what_was_converted_is_read_and_not_converted_again(
    tmp_path: Path, trainer: RawSources, served: str
) -> None:
    """Every tensor that a module of the reader holds is a fresh load's, bit for bit."""
    start, *versions = (architecture(served, seed) for seed in (1, 2, 3))
    with SurveyedRanks(2, tmp_path) as source, SurveyedRanks(2, tmp_path) as reader:
        for group in (source, reader):
            group.load(start)
        a, b = PeerHalf(source), PeerHalf(reader)
        held = trainer.hold(start, 1)
        made = {start: converted(a.refit(offer(held.write(0, start))))}
        for slot, version in enumerate(versions):
            voted = a.refit(offer(held.write(slot, version)))
            votes = b.refit(a.serve())
            a.release()
            assert all(vote.timings.convert_ms > 1.0 for vote in voted)
            assert [vote.session for vote in votes] == [("cold", "warm")[slot]] * 2
            made[version] = converted(voted)
            assert converted(votes) == ("", "")
            assert a.group.differences(version) == []
            assert b.group.differences(version) == []
        # It takes a trainer's versions as before, and makes of them what others make:
        # something else of each.
        assert converted(b.refit(offer(held.write(0, start)))) == made[start]
        assert b.group.differences(start) == []
        assert all(made[start]) and len(set(made.values())) == 3
        held.release()


def converted(votes: Sequence[RankVote]) -> tuple[str, ...]:
    """The fingerprint of what each rank made."""
    return tuple(vote.converted for vote in votes)


def test_a_replica_of_another_layout_is_not_read(
    groups: dict[str, CountedRanks], held: Held
) -> None:
    """One rank cannot take the images of two, nor of one that computes otherwise."""
    a, b = begin(groups, "qwen3", "source", "narrow")
    b.refit(offer(held.write(1, NEXT)))
    a.refit(offer(held.write(0, OLD)))
    offered = a.serve()
    failure = b.refuse(offered)
    assert (failure.kind, failure.rank) == ("PeerUnsuitable", 0)
    assert "has 2 ranks" in failure.message
    (c,) = begin(groups, "qwen3-tied", "reader")
    failure = c.refuse(offered)
    assert failure.kind == "PeerUnsuitable"
    assert "read from the trainer" in failure.message
    a.release()
    assert_serves(b, NEXT)
    b.refit(offer(held.write(1, NEW)))
    assert_serves(b, NEW)


def test_a_shadow_that_something_else_wrote_is_not_served(
    pair: tuple[PeerHalf, PeerHalf], held: Held
) -> None:
    """It is compared with what was staged before it is offered."""
    a, _ = pair
    a.refit(offer(held.write(0, OLD)))
    a.group.spoil_shadows()
    kind, message = a.unserved()
    assert kind == "FingerprintMismatch"
    assert "1 blocks of the weights are not what was staged" in message
    assert_serves(a, OLD)


def test_a_replica_that_has_another_version_says_which(
    pair: tuple[PeerHalf, PeerHalf], held: Held
) -> None:
    a, _ = pair
    offered = offer(held.write(0, OLD))
    a.stage(offered)
    with pytest.raises(PeerUnsuitable, match="version 1 is staged"):
        a.ask(version=1, fingerprint="0" * 64)
    with pytest.raises(PeerUnsuitable, match=r"version 7 .* is not held here"):
        a.ask(version=7, fingerprint=offered.fingerprint)


@pytest.mark.faults
def test_a_peer_that_dies_while_it_is_read(
    groups: dict[str, CountedRanks], held: Held, tmp_path: Path
) -> None:
    """Stopped before the readers can connect, and killed while they try."""
    (b,) = begin(groups, "qwen3", "reader")
    b.refit(offer(held.write(0, OLD)))
    with MortalRanks(2, tmp_path) as group:
        group.load(checkpoint("qwen3", "A"))
        a = PeerHalf(group)
        a.refit(offer(held.write(1, NEW)))
        offered = a.serve()
        group.stop()
        killed = []

        def kill_when_reading() -> None:
            if not killed and all(use.active for use in groups["reader"].nixl()):
                killed.append(group.kill())

        b.caller.on_poll = kill_when_reading
        failure = b.refuse(offered)
        b.caller.on_poll = lambda: None
    assert killed
    assert failure.kind == "TransferFailed"
    # While later waves were posted, or when all of them were.
    assert re.match("(cannot read|the read) from 'refit-0-", failure.message)
    assert_serves(b, OLD)
    b.refit(offer(held.write(1, NEXT)))
    assert_serves(b, NEXT)


@pytest.mark.faults
def test_a_reader_that_dies_leaves_the_others_alone(
    pair: tuple[PeerHalf, PeerHalf], held: Held, tmp_path: Path
) -> None:
    """Its connection goes down under a peer that goes on serving, and staging."""
    a, b = pair
    a.refit(offer(held.write(0, OLD)))
    offered = a.serve()
    with MortalRanks(2, tmp_path) as group:
        group.load(checkpoint("qwen3", "A"))
        doomed = PeerHalf(group)
        doomed.stage(a.serve())
        doomed.caller.on_stage = group.kill
        with pytest.raises((ChildFailed, OSError)):
            doomed.stage(offered)
    b.refit(offered)
    assert_serves(b, OLD)
    a.refit(offer(held.write(1, NEW)))
    b.refit(a.serve())
    assert_serves(b, NEW)

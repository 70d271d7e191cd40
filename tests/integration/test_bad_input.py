# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a trainer can get wrong, from the manifest to the last byte: each is refused
with a typed error that names the tensor, nothing live changes, and the next good
version of the trainer before it is a warm cycle. Where bytes may still arrive later, it
is a cold one, and right.

Real ranks without an engine, the agent's own validation, real NIXL; see
:mod:`tests.support.agent_half`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamo.refit.errors import Failure
from dynamo.refit.manifest import (
    MAX_BOXES,
    MAX_MANIFEST_BYTES,
    MAX_TENSORS,
    Manifest,
    Region,
    TensorEntry,
)
from dynamo.refit.protocol import RankVote, Stage
from graphs.tiny_model import make_checkpoint
from tests.support.agent_half import AgentHalf, Offer, built, offer
from tests.support.bad_manifests import (
    Spoil,
    StoppableSources,
    and_tensor,
    entry,
    moved,
    repeated_tensor,
    shard_at,
    with_metadata,
    with_regions,
    with_shape,
    with_shards,
    with_tensor,
    without_tensor,
)
from tests.support.counted_rank import CountedRanks
from tests.support.rank_group import RanksRefused
from tests.support.raw_sources import Held, RawVersion

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.faults,
    pytest.mark.timeout(180),
]

MODELS = Path(__file__).resolve().parents[2] / ".cache" / "models"
SEEDS = {"A": 1, "B": 2, "C": 3}

#: Every rank has rows of it, and columns of the second one.
COLUMN_PARALLEL = "model.layers.0.mlp.up_proj.weight"
ROW_PARALLEL = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
SHAPES = {
    COLUMN_PARALLEL: (512, 256),
    ROW_PARALLEL: (256, 512),
    NORM: (256,),
    EMBEDDING: (4096, 256),
}

WARM = ("warm", 0, 0, 0)


def checkpoint(weights: str) -> Path:
    seed = SEEDS[weights]
    return make_checkpoint(MODELS / f"bad-input-{seed}", seed=seed, num_hidden_layers=2)


class Served:
    """Ranks that serve versions of one good trainer."""

    def __init__(self, group: CountedRanks, held: Held) -> None:
        self.group = group
        self.half = AgentHalf(group)
        self._held = held
        self._turn = itertools.cycle(enumerate("BC"))
        self.refit()

    def refit(self) -> list[RankVote]:
        """Serve the good trainer's next version; every byte is as it should be."""
        version, golden = self.next_version()
        votes = self.half.refit(offer(version))
        assert self.group.digests() == self.group.golden(golden)
        return votes

    def next_version(self) -> tuple[RawVersion, Path]:
        slot, weights = next(self._turn)
        return self._held.write(slot, checkpoint(weights)), checkpoint(weights)

    def refuse(self, offered: Offer, seconds: float = 30.0) -> Failure:
        """``offered`` is refused, and nothing that is live changes."""
        before = self.group.digests()
        failure = self.half.refuse(offered, seconds)
        assert self.group.digests() == before
        return failure

    def refuse_and_go_on(
        self, offered: Offer, kind: str, tensor: str | None, says: str
    ) -> Failure:
        """It is refused in these words, and the old session has not noticed."""
        used = self.group.nixl()
        failure = self.refuse(offered)
        assert (failure.kind, failure.tensor) == (kind, tensor), failure
        assert re.search(says, failure.message), failure
        assert built(self.refit()) == [WARM] * len(used)
        assert self.group.nixl() == used
        return failure


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoppableSources]:
    """The good trainer."""
    with StoppableSources(2, tmp_path_factory.mktemp("sources")) as sources:
        yield sources


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoppableSources]:
    with StoppableSources(2, tmp_path_factory.mktemp("others")) as harmed:
        yield harmed


@pytest.fixture
def others(harmed: StoppableSources) -> Iterator[StoppableSources]:
    """Another trainer, which comes to harm; it is well again for the next test."""
    yield harmed
    harmed.recover()


@pytest.fixture(scope="module")
def groups(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[int, CountedRanks]]:
    logs = tmp_path_factory.mktemp("ranks")
    groups = {size: CountedRanks(size, logs) for size in (1, 2)}
    yield groups
    for group in groups.values():
        group.close()


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def served(
    groups: dict[int, CountedRanks], sources: StoppableSources, ranks: int
) -> Iterator[Served]:
    group = groups[ranks]
    group.load(checkpoint("A"))
    held = sources.hold(checkpoint("A"), 2)
    served = Served(group, held)
    yield served
    served.half.close()
    held.release()


@pytest.fixture
def version(served: Served) -> RawVersion:
    """A good version of the good trainer, not offered yet."""
    return served.next_version()[0]


# --- manifests that contradict themselves -------------------------------------


def many_boxes(manifest: Manifest) -> Manifest:
    rows = [((row, 0), (1, 256)) for row in range(MAX_BOXES + 1)]
    spoiled = with_tensor(manifest, EMBEDDING, shape=(MAX_BOXES + 1, 256))
    return with_shards(spoiled, EMBEDDING, *rows)


SELF_CONTRADICTIONS: dict[str, tuple[Spoil, str, str]] = {
    "overlap": (
        lambda m: with_shards(
            m, COLUMN_PARALLEL, ((0, 0), (257, 256)), ((256, 0), (256, 256))
        ),
        COLUMN_PARALLEL,
        r"its shards \(\(0, 257\), .* and \(\(256, 512\), .* overlap",
    ),
    "gap": (
        lambda m: with_shards(
            m, COLUMN_PARALLEL, ((0, 0), (256, 256)), ((257, 0), (255, 256))
        ),
        COLUMN_PARALLEL,
        f"its shards hold {511 * 256} of {512 * 256} elements",
    ),
    "no shards": (
        lambda m: with_shards(m, NORM),
        NORM,
        "hold 0 of 256 elements",
    ),
    "out of the tensor": (
        lambda m: with_shards(m, ROW_PARALLEL, ((1, 0), (256, 512))),
        ROW_PARALLEL,
        r"\(\(1, 257\), \(0, 512\)\) is empty or reaches out of \(256, 512\)",
    ),
    "out of the region": (
        lambda m: with_tensor(
            m,
            NORM,
            shards=(shard_at(m.sources[0].slots[0][0].nbytes - 511, (0,), (256,)),),
        ),
        NORM,
        r"bytes \[\d+, \d+\) are outside its registered region of \d+ bytes",
    ),
    "before the region": (
        lambda m: with_tensor(m, NORM, shards=(shard_at(-2, (0,), (256,)),)),
        NORM,
        r"bytes \[-2, 510\) are outside",
    ),
    "other dimensions": (
        lambda m: with_shards(m, ROW_PARALLEL, ((0,), (256 * 512,))),
        ROW_PARALLEL,
        "a shard of 1 dimensions in a tensor of 2",
    ),
    "more than there can be": (
        lambda m: with_shards(
            with_tensor(m, ROW_PARALLEL, shape=((1 << 63) + 1, 1)),
            ROW_PARALLEL,
            ((0, 0), (1, 1)),
            ((1 << 63, 0), (1, 1)),
        ),
        ROW_PARALLEL,
        "is more than can be addressed",
    ),
    "unknown dtype": (
        lambda m: with_tensor(m, NORM, dtype="float4"),
        NORM,
        "dtype 'float4' is not one of",
    ),
    "twice the name": (
        lambda m: and_tensor(m, entry(m, NORM)),
        NORM,
        "the name occurs twice",
    ),
    "too many boxes": (
        many_boxes,
        EMBEDDING,
        f"lies in {MAX_BOXES + 1} different shards, at most {MAX_BOXES} .* publish "
        "larger blocks",
    ),
}


@pytest.mark.parametrize("case", SELF_CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself(
    served: Served, version: RawVersion, case: str
) -> None:
    spoil, tensor, says = SELF_CONTRADICTIONS[case]
    spoiled = offer(version, manifest=spoil(version.manifest))
    calls = len(served.half.caller.calls)
    served.refuse_and_go_on(spoiled, "ManifestInvalid", tensor, says)
    sent = [c for c in served.half.caller.calls[calls:] if isinstance(c, Stage)]
    assert len(sent) == 1, "no rank was asked to stage what the agent refused"


@pytest.mark.parametrize("case", SELF_CONTRADICTIONS)
def test_every_rank_looks_for_itself(
    served: Served, version: RawVersion, case: str
) -> None:
    """A manifest that no agent has looked at."""
    spoil, tensor, says = SELF_CONTRADICTIONS[case]
    before = served.group.digests()
    spoiled = dataclasses.replace(version, manifest=spoil(version.manifest))
    with pytest.raises(RanksRefused) as refused:
        served.group.talk.stage(spoiled)
    for rank, failure in enumerate(refused.value.failures):
        assert (failure.kind, failure.rank) == ("ManifestInvalid", rank)
        assert failure.tensor == tensor
        assert re.search(says, failure.message)
    assert len(refused.value.failures) == len(before)
    assert served.group.digests() == before
    assert {vote.session for vote in served.group.talk.stage(version)} == {"warm"}


@pytest.mark.parametrize(
    "region",
    [Region(1 << 63, 1 << 20), Region((1 << 63) - 1, 1 << 30), Region(-4096, 1 << 30)],
    ids=str,
)
def test_an_address_that_cannot_be_one(
    served: Served, version: RawVersion, region: Region
) -> None:
    spoiled = with_regions(
        version.manifest, lambda there: Region(region.address, there.nbytes)
    )
    served.refuse_and_go_on(
        offer(version, manifest=spoiled), "ManifestInvalid", None, "address"
    )


@pytest.mark.parametrize("slot", [2, -1])
def test_a_slot_that_is_not_there(
    served: Served, version: RawVersion, slot: int
) -> None:
    spoiled = offer(version, slot=slot)
    served.refuse_and_go_on(spoiled, "ManifestInvalid", None, f"slot {slot}.* 2 slots")


# --- payloads -----------------------------------------------------------------


def payload(version: RawVersion, encoded: bytes) -> Offer:
    """``encoded`` in place of a manifest that the agent has not asked for yet."""
    return dataclasses.replace(offer(version), announced="f" * 64, manifest=encoded)


@pytest.mark.parametrize("fault", ["cut off", "garbage", "empty", "more", "other type"])
def test_a_manifest_that_is_not_one(
    served: Served, version: RawVersion, fault: str
) -> None:
    whole = msgspec.msgpack.encode(version.manifest)
    encoded = {
        "cut off": whole[: len(whole) // 2],
        "garbage": b"\xc1" + whole,
        "empty": b"",
        "more": whole + b"\x00",
        "other type": msgspec.msgpack.encode({"model": "m", "tensors": 3}),
    }[fault]
    served.refuse_and_go_on(
        payload(version, encoded), "ManifestInvalid", None, "cannot be decoded"
    )


def test_a_manifest_that_is_not_the_announced_one(
    served: Served, version: RawVersion
) -> None:
    other = msgspec.structs.replace(version.manifest, model="other")
    encoded = msgspec.msgpack.encode(other)
    served.refuse_and_go_on(
        payload(version, encoded),
        "ManifestInvalid",
        None,
        "not the one that was announced",
    )


#: A tensor of no bytes, in as few bytes as can be.
NOTHING = TensorEntry(name="", dtype="bool", shape=(), shards=())


def test_a_million_tensors_are_refused_before_they_are_decoded(
    served: Served, version: RawVersion
) -> None:
    encoded = repeated_tensor(NOTHING, 1_000_000)
    assert len(encoded) < MAX_MANIFEST_BYTES
    grew, seconds = measure_refusal(served, payload(version, encoded))
    # Decoded they take 300 MiB and more, and seconds.
    assert grew < 16 << 20
    assert seconds < 2
    served.refuse_and_go_on(
        payload(version, encoded), "ManifestInvalid", None, f"{MAX_TENSORS}"
    )


def test_too_many_bytes_are_refused_before_they_are_decoded(
    served: Served, version: RawVersion
) -> None:
    shards = (shard_at(0, (0,), (1,)),)
    encoded = repeated_tensor(
        msgspec.structs.replace(NOTHING, shape=(1,), shards=shards), 1_000_000
    )
    assert len(encoded) > MAX_MANIFEST_BYTES
    grew, seconds = measure_refusal(served, payload(version, encoded))
    assert grew < 16 << 20
    assert seconds < 2
    says = f"{len(encoded)} bytes, at most {MAX_MANIFEST_BYTES} are read"
    served.refuse_and_go_on(payload(version, encoded), "ManifestInvalid", None, says)


def measure_refusal(served: Served, offered: Offer) -> tuple[int, float]:
    """By how much this process was larger meanwhile, at its largest; seconds."""
    # Makes the largest size so far the present one.
    Path("/proc/self/clear_refs").write_text("5")
    before, began = psutil.Process().memory_info().rss, time.monotonic()
    served.half.refuse(offered)
    seconds = time.monotonic() - began
    status = Path("/proc/self/status").read_text()
    largest = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10
    return largest - before, seconds


# --- manifests of another model -----------------------------------------------


MISMATCHES: dict[str, tuple[Spoil, str, str]] = {
    "missing tensor": (
        lambda m: without_tensor(m, COLUMN_PARALLEL),
        "model.layers.0.mlp.gate_up_proj.weight",
        "fill .* of its .* elements: a tensor of this parameter is missing",
    ),
    "unknown tensor": (
        lambda m: and_tensor(
            m, msgspec.structs.replace(entry(m, NORM), name="model.unheard_of.weight")
        ),
        "model.unheard_of.weight",
        "the engine's loader rejects it",
    ),
    # vLLM's loaders pass over it.
    "tensor that is not read": (
        lambda m: and_tensor(
            m,
            msgspec.structs.replace(
                entry(m, NORM), name="model.layers.0.self_attn.rotary_emb.inv_freq"
            ),
        ),
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "does not read this tensor: it is not part of the served model",
    ),
    "integers": (
        lambda m: with_tensor(m, ROW_PARALLEL, dtype="int16"),
        ROW_PARALLEL,
        "published as int16, .* as bfloat16: publish it as bfloat16",
    ),
    "eight-bit floats": (
        lambda m: with_tensor(m, ROW_PARALLEL, dtype="float8_e4m3fn"),
        ROW_PARALLEL,
        "published as float8_e4m3fn, .* publish it as bfloat16",
    ),
    "more rows": (
        lambda m: with_shape(m, COLUMN_PARALLEL, (514, 256)),
        COLUMN_PARALLEL,
        r"\(514, 256\)",
    ),
    "fewer rows": (
        lambda m: with_shape(m, COLUMN_PARALLEL, (510, 256)),
        COLUMN_PARALLEL,
        r"\(510, 256\)",
    ),
    "more columns": (
        lambda m: with_shape(m, ROW_PARALLEL, (256, 514)),
        ROW_PARALLEL,
        r"\(256, 514\)",
    ),
    "fewer columns": (
        lambda m: with_shape(m, ROW_PARALLEL, (256, 510)),
        ROW_PARALLEL,
        r"\(256, 510\)",
    ),
    "transposed": (
        lambda m: with_shape(m, ROW_PARALLEL, (512, 256)),
        ROW_PARALLEL,
        r"\(512, 256\)",
    ),
    "larger vocabulary": (
        lambda m: with_shape(m, EMBEDDING, (4100, 256)),
        EMBEDDING,
        r"\(4100, 256\)",
    ),
    "smaller vocabulary": (
        lambda m: with_shape(m, EMBEDDING, (4090, 256)),
        EMBEDDING,
        r"\(4090, 256\)",
    ),
    "one dimension": (
        lambda m: with_shape(m, ROW_PARALLEL, (256 * 512,)),
        ROW_PARALLEL,
        r"\(131072,\)",
    ),
    "three dimensions": (
        lambda m: with_shape(m, ROW_PARALLEL, (1, 256, 512)),
        ROW_PARALLEL,
        r"\(1, 256, 512\)",
    ),
    "longer norm": (
        lambda m: with_shape(m, NORM, (257,)),
        NORM,
        r"\(257,\)",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_manifest_of_another_model(
    served: Served, version: RawVersion, case: str
) -> None:
    spoil, tensor, says = MISMATCHES[case]
    spoiled = spoil(version.manifest)
    numbers = np.zeros(len(spoiled.tensors), dtype=np.uint64)
    served.refuse_and_go_on(
        offer(version, manifest=spoiled, fingerprints=numbers),
        "LayoutRefused",
        tensor,
        says,
    )


# --- dtypes -------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float32", "float16", "float64"])
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint of another dtype, with bits that bfloat16 has to round."""
    dtype = getattr(torch, request.param)
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in load_file(checkpoint("A") / "model.safetensors").items()
    }
    directory = tmp_path_factory.mktemp(request.param)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_other_floats_are_converted_as_the_loader_does(
    served: Served, others: StoppableSources, converted: Path
) -> None:
    held = others.hold(converted, 2)
    for slot in (0, 1):
        votes = served.half.refit(offer(held.write(slot, converted)))
        assert served.group.digests() == served.group.golden(converted)
    assert built(votes) == [WARM] * len(votes)
    served.refit()
    held.release()


def test_bytes_of_another_element_size(served: Served, version: RawVersion) -> None:
    """The trainer says fp32, and what it has are bf16 bytes and some others."""
    tensor = entry(version.manifest, ROW_PARALLEL)
    spoiled = with_shards(
        with_tensor(version.manifest, ROW_PARALLEL, dtype="float32"),
        ROW_PARALLEL,
        ((0, 0), tensor.shape),
    )
    served.refuse_and_go_on(
        offer(version, manifest=spoiled),
        "FingerprintMismatch",
        ROW_PARALLEL,
        "staged bytes of 1 tensors are not the published ones",
    )


# --- addresses ----------------------------------------------------------------


@pytest.mark.parametrize(
    "nbytes",
    [pytest.param(4096, id="partly outside"), pytest.param(1 << 40, id="elsewhere")],
)
def test_an_address_that_the_source_has_not_registered(
    served: Served, version: RawVersion, ranks: int, nbytes: int
) -> None:
    """NIXL refuses it before a byte moves. The layout is the old one, so the buffers
    are, too; the requests of the old addresses must outlive it."""
    spoiled = with_regions(version.manifest, moved(nbytes))
    failure = served.refuse_and_go_on(
        offer(version, manifest=spoiled),
        "TransferFailed",
        None,
        "cannot prepare a read from 'raw-",
    )
    assert failure.rank in range(ranks), "both refuse it; one of them was first"


def test_an_unregistered_address_in_another_layout(
    served: Served, version: RawVersion
) -> None:
    boxes = ((0, 0), (100, 512)), ((100, 0), (156, 512))
    spoiled = with_shards(version.manifest, ROW_PARALLEL, *boxes)
    spoiled = with_regions(spoiled, moved(4096))
    served.refuse_and_go_on(
        offer(version, manifest=spoiled),
        "TransferFailed",
        None,
        "cannot prepare a read from 'raw-",
    )


@pytest.mark.parametrize("metadata", [b"", b"\x00nixl\xff" * 40], ids=["none", "junk"])
def test_metadata_that_is_none(
    served: Served, version: RawVersion, metadata: bytes
) -> None:
    spoiled = with_metadata(version.manifest, metadata)
    served.refuse_and_go_on(
        offer(version, manifest=spoiled),
        "TransferFailed",
        None,
        "'raw-.* cannot be reached",
    )


def test_memory_of_another_kind(served: Served, version: RawVersion) -> None:
    """The source says its host memory is a GPU's."""
    sources = tuple(
        msgspec.structs.replace(source, memory="VRAM")
        for source in version.manifest.sources
    )
    spoiled = msgspec.structs.replace(version.manifest, sources=sources)
    served.refuse_and_go_on(
        offer(version, manifest=spoiled), "TransferFailed", None, "cannot prepare"
    )


def test_only_one_rank_reads_the_bad_part(
    served: Served, sources: StoppableSources, ranks: int
) -> None:
    """The other one has staged it already: both forget it, the refusal names the rank,
    and buffers and plans stay on both."""
    if ranks == 1:
        pytest.skip("needs two ranks")
    version, _ = served.next_version()
    start = version.manifest.sources[0].slots[0][0].nbytes
    regions = tuple(
        (*slot, Region(slot[0].address + (1 << 40), start))
        for slot in version.manifest.sources[0].slots
    )
    first = msgspec.structs.replace(version.manifest.sources[0], slots=regions)
    halves = (
        shard_at(0, (0, 0), (256, 256)),
        msgspec.structs.replace(shard_at(0, (256, 0), (256, 256)), region=1),
    )
    spoiled = with_tensor(
        msgspec.structs.replace(
            version.manifest, sources=(first, *version.manifest.sources[1:])
        ),
        COLUMN_PARALLEL,
        shards=halves,
    )
    failure = served.refuse_and_go_on(
        offer(version, manifest=spoiled),
        "TransferFailed",
        None,
        "cannot prepare a read from 'raw-",
    )
    assert failure.rank == 1


# --- fingerprints -------------------------------------------------------------


def test_one_published_number_is_off(served: Served, version: RawVersion) -> None:
    numbers = version.fingerprints.copy()
    names = [tensor.name for tensor in version.manifest.tensors]
    numbers[names.index(ROW_PARALLEL)] ^= np.uint64(1)
    served.refuse_and_go_on(
        offer(version, fingerprints=numbers),
        "FingerprintMismatch",
        ROW_PARALLEL,
        "the staged bytes of 1 tensors are not the published ones",
    )


@pytest.mark.parametrize("tensor", [ROW_PARALLEL, NORM, EMBEDDING])
def test_one_bit_is_changed_after_it_was_published(
    served: Served, version: RawVersion, tensor: str, tmp_path: Path
) -> None:
    served.refit()
    # Of the other slot: the one that is not live.
    good, golden = served.next_version()
    weights = load_file(golden / "model.safetensors")
    weights[tensor].view(torch.uint8).view(-1)[-1] ^= 0x10
    save_file(weights, tmp_path / "model.safetensors")
    served._held.write(good.slot, tmp_path)
    served.refuse_and_go_on(
        offer(good),
        "FingerprintMismatch",
        tensor,
        "the trainer wrote into the version while it was read",
    )


def test_fingerprints_of_another_version(served: Served, version: RawVersion) -> None:
    other, _ = served.next_version()
    announced = dataclasses.replace(
        offer(version), fingerprints=offer(other).fingerprints
    )
    served.refuse_and_go_on(
        announced,
        "FingerprintMismatch",
        None,
        "not the ones it announced: it holds another version now",
    )


def test_bytes_of_another_version(served: Served, version: RawVersion) -> None:
    other, _ = served.next_version()
    count = len(version.manifest.tensors)
    wrong = offer(version, fingerprints=other.fingerprints)
    served.refuse_and_go_on(
        wrong,
        "FingerprintMismatch",
        version.manifest.tensors[0].name,
        f"the staged bytes of {count} tensors are not the published ones",
    )


@pytest.mark.parametrize("change", [-8, -1, 1, 8])
def test_a_wrong_number_of_fingerprints(
    served: Served, version: RawVersion, change: int
) -> None:
    good = offer(version)
    payload = (good.fingerprints + bytes(8))[: len(good.fingerprints) + change]
    served.refuse_and_go_on(
        dataclasses.replace(good, fingerprints=payload),
        "FingerprintMismatch",
        None,
        f"sent {len(payload)} bytes of fingerprints, .* have {len(good.fingerprints)}",
    )


# --- sources that stop or die -------------------------------------------------


def test_a_source_that_never_answers(
    served: Served, others: StoppableSources, ranks: int
) -> None:
    """Bounded by the deadline. NIXL cannot take the reads back, so their buffers are
    put aside: the next cycle is a cold one, and they come back with the source."""
    used = served.group.nixl()
    held = others.hold(checkpoint("A"), 1)
    stuck = held.write(0, checkpoint("B"))
    others.stop(0)
    began = time.monotonic()
    failure = served.refuse(offer(stuck), seconds=1.0)
    assert 1.0 <= time.monotonic() - began < 30.0
    assert (failure.kind, failure.tensor) == ("StagingCancelled", None)
    assert re.search(
        r"out of time while pulling from raw-.*: the source does not answer",
        failure.message,
    )

    votes = served.refit()
    assert {vote.session for vote in votes} == {"cold"}
    assert all(vote.counters.allocations > 0 for vote in votes)
    assert built(served.refit()) == [WARM] * ranks
    assert all(
        now.registrations == 2 * before.registrations and now.active > 0
        for now, before in zip(served.group.nixl(), used, strict=True)
    )

    others.resume(0)
    deadline = time.monotonic() + 20
    while served.group.nixl() != used:
        assert time.monotonic() < deadline, served.group.nixl()
        assert built(served.refit()) == [WARM] * ranks
    held.release()


def test_a_stage_that_is_out_of_time_before_its_first_read(
    served: Served, version: RawVersion
) -> None:
    """Nothing is under way, so nothing is lost."""
    used = served.group.nixl()
    failure = served.refuse(offer(version), seconds=-1.0)
    assert failure.kind == "StagingCancelled"
    assert "the deadline is too short for the size of the model" in failure.message
    assert built(served.refit()) == [WARM] * len(used)
    assert served.group.nixl() == used


def test_sources_that_never_answer_do_not_pile_up(
    served: Served, others: StoppableSources, ranks: int
) -> None:
    """After some that are stuck, the next one is refused before it takes memory; with
    the stuck process gone everything is given back."""
    used = served.group.nixl()
    held = others.hold(checkpoint("A"), 1)
    others.stop(0)
    try:
        for _ in range(3):
            failure = served.refuse(offer(held_version(held)), seconds=0.3)
            assert failure.kind == "StagingCancelled"
        failure = served.refuse(offer(served.next_version()[0]))
        assert failure.kind == "TransferFailed"
        assert "stop the stuck trainer process" in failure.message
    finally:
        others.kill(0)
        others.restart(0)
    deadline = time.monotonic() + 60
    while True:
        try:
            votes = served.refit()
            break
        except Exception:
            assert time.monotonic() < deadline
    assert {vote.session for vote in votes} == {"cold"}
    assert built(served.refit()) == [WARM] * ranks
    assert served.group.nixl() == used


def held_version(held: Held) -> RawVersion:
    return RawVersion(held.manifest, 0, np.zeros(len(held.manifest.tensors), np.uint64))


@pytest.mark.parametrize("shards", [1, 2], ids=["other layout", "same layout"])
def test_a_source_that_dies_in_the_middle_of_a_pull(
    served: Served, others: StoppableSources, ranks: int, shards: int
) -> None:
    """Deterministic: it is stopped before the first read, so that reads wait for it,
    and killed while they do."""
    held = others.hold(checkpoint("A"), shards)
    version = held.write(0, checkpoint("B"))
    others.stop(0)
    killed = []

    def kill_when_reading() -> None:
        if not killed and all(use.active for use in served.group.nixl()):
            killed.append(others.kill(0))

    served.half.caller.on_poll = kill_when_reading
    try:
        served.refuse_and_go_on(
            offer(version),
            "TransferFailed",
            None,
            "(cannot read|the read) from 'raw-",
        )
    finally:
        served.half.caller.on_poll = lambda: None
        others.restart(0)
    assert killed


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_source_that_dies_around_the_post(
    served: Served, others: StoppableSources, before: bool
) -> None:
    """Killed before the ranks are asked, it fails them; killed when they have voted,
    it is of no more use to anyone, and the version is installed all the same."""
    held = others.hold(checkpoint("A"), 1)
    version = held.write(0, checkpoint("B"))
    if before:
        others.kill(0)
        served.refuse_and_go_on(
            offer(version), "TransferFailed", None, "'raw-.* cannot be reached"
        )
        others.restart(0)
        return
    served.half.stage(offer(version))
    others.kill(0)
    served.group.scribble()
    served.half.install()
    served.half.verify()
    assert served.group.digests() == served.group.golden(checkpoint("B"))
    others.restart(0)
    served.refit()

# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk as shards in mapped files, and what is wrong with others."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamo.refit.publish.checkpoint import (
    INDEX_NAME,
    CheckpointInvalid,
    checkpoint_shards,
)
from dynamo.refit.publish.shard import LocalShard

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

FIRST = {
    "model.embed_tokens.weight": torch.randn(7, 3).to(torch.bfloat16),
    "scale": torch.tensor(2.5),
    "model.norm.weight": torch.randn(5),
}
SECOND = {
    "lm_head.weight": torch.randn(4, 3).to(torch.float16),
    "experts.table": torch.arange(12, dtype=torch.int64).view(2, 2, 3),
    "quantized.weight": torch.randn(3, 3).to(torch.float8_e4m3fn),
}
ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(FIRST | SECOND, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.fixture
def split(tmp_path: Path) -> Path:
    save_file(FIRST, tmp_path / ONE)
    save_file(SECOND, tmp_path / TWO)
    write_index(tmp_path, dict.fromkeys(FIRST, ONE) | dict.fromkeys(SECOND, TWO))
    return tmp_path


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def assert_holds(shards: list[LocalShard], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(shard.name for shard in shards) == sorted(expected)
    for shard in shards:
        tensor = expected[shard.name]
        assert shard.tensor.dtype == tensor.dtype
        assert shard.shape == tuple(shard.tensor.shape) == tuple(tensor.shape)
        assert shard.offset == (0,) * tensor.dim()
        assert shard.tensor.is_contiguous()
        assert raw(shard.tensor) == raw(tensor)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def storages(shards: list[LocalShard]) -> dict[int, int]:
    """Address to size of every storage the shards lie in."""
    found = [shard.tensor.untyped_storage() for shard in shards]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def mapped_pages(file: Path) -> list[str]:
    """The permissions of this process's mappings of ``file``."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[1] for line in maps if line.endswith(str(file))]


def test_one_file_is_one_storage_and_no_copy(single: Path) -> None:
    file = single / "model.safetensors"
    shards = checkpoint_shards(single)
    assert_holds(shards, FIRST | SECOND)
    assert list(storages(shards).values()) == [file.stat().st_size]
    assert mapped_pages(file) == ["rw-p"]
    before = file.read_bytes()
    shards[0].tensor.reshape(-1).fill_(0)
    assert file.read_bytes() == before


def test_several_files_by_their_index(split: Path) -> None:
    """A file that the index does not name is not part of the checkpoint."""
    save_file({"scale": torch.tensor(0.0)}, split / "consolidated.safetensors")
    shards = checkpoint_shards(str(split))
    assert_holds(shards, FIRST | SECOND)
    sizes = [(split / name).stat().st_size for name in (ONE, TWO)]
    assert sorted(storages(shards).values()) == sorted(sizes)


def test_several_files_without_an_index(split: Path) -> None:
    (split / INDEX_NAME).unlink()
    assert_holds(checkpoint_shards(split), FIRST | SECOND)


def test_a_real_checkpoint_is_read_alike(tmp_path: Path) -> None:
    """As safetensors itself reads it, in the order of the file."""
    tensors = {f"t{i}": torch.randn(i % 5 + 1, 3) for i in range(40)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert_holds(checkpoint_shards(tmp_path), load_file(tmp_path / "a.safetensors"))


def test_a_file_can_be_deleted_while_it_is_mapped(single: Path) -> None:
    shards = checkpoint_shards(single)
    (single / "model.safetensors").unlink()
    assert_holds(shards, FIRST | SECOND)


def refused(directory: Path, says: str) -> CheckpointInvalid:
    with pytest.raises(CheckpointInvalid, match=says) as error:
        checkpoint_shards(directory)
    assert "\n" not in str(error.value)
    return error.value


def test_no_directory(single: Path) -> None:
    refused(single / "nowhere", "nowhere is no directory")
    refused(single / "model.safetensors", "model.safetensors is no directory")


def test_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, r"has no \*\.safetensors: give the directory of")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none(split: Path, content: bytes) -> None:
    (split / INDEX_NAME).write_bytes(content)
    refused(split, INDEX_NAME)


def test_a_file_of_the_index_is_missing(split: Path) -> None:
    (split / TWO).unlink()
    refused(split, f"{TWO} is missing: complete the download")


def test_a_tensor_of_the_index_is_missing(split: Path) -> None:
    save_file(dict(list(SECOND.items())[1:]), split / TWO)
    error = refused(split, f"says that it is in {TWO}, but it is not")
    assert error.tensor == "lm_head.weight"


@pytest.mark.parametrize("absolute", [False, True])
def test_a_file_outside_the_directory_is_refused(split: Path, absolute: bool) -> None:
    """Whoever wrote the index may not be who runs the command."""
    inside, outside = split / "inside", split / TWO
    inside.mkdir()
    (split / ONE).rename(inside / ONE)
    name = str(outside) if absolute else f"../{TWO}"
    write_index(inside, dict.fromkeys(FIRST, ONE) | {"lm_head.weight": name})
    error = refused(inside, "outside")
    assert error.tensor == "lm_head.weight"
    assert name in str(error)


def test_files_of_the_hugging_face_cache_are_links_out_of_the_directory(
    split: Path,
) -> None:
    snapshot = split / "snapshots" / "0123abcd"
    blobs = split / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate((ONE, TWO, INDEX_NAME)):
        (split / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert_holds(checkpoint_shards(snapshot), FIRST | SECOND)


def test_files_may_lie_in_directories_below(split: Path) -> None:
    below = split / "weights"
    below.mkdir()
    (split / TWO).rename(below / TWO)
    second = dict.fromkeys(SECOND, f"weights/{TWO}")
    write_index(split, dict.fromkeys(FIRST, ONE) | second)
    assert_holds(checkpoint_shards(split), FIRST | SECOND)


def test_a_tensor_is_in_another_file_than_the_index_says(split: Path) -> None:
    names = dict.fromkeys(FIRST, ONE) | dict.fromkeys(SECOND, TWO)
    write_index(split, {**names, "scale": TWO})
    assert refused(split, f"says that it is in {TWO}").tensor == "scale"


@pytest.mark.parametrize("index", [True, False])
def test_a_tensor_is_in_two_files(split: Path, index: bool) -> None:
    save_file({**SECOND, "scale": torch.tensor(1.0)}, split / TWO)
    if not index:
        (split / INDEX_NAME).unlink()
    error = refused(split, "it is both in .*00001-of-00002.* and in .*00002-of-00002")
    assert error.tensor == "scale"


@pytest.mark.parametrize("left", [0, 5, 40, -1])
def test_a_file_cut_short(single: Path, left: int) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    refused(single, "model.safetensors is cut short or corrupt")


@pytest.mark.parametrize(
    "content", [b"no header at all" * 9, b"\x02" + bytes(7) + b"{]"]
)
def test_a_corrupt_file(single: Path, content: bytes) -> None:
    (single / "model.safetensors").write_bytes(content)
    refused(single, "model.safetensors is cut short or corrupt")


def test_a_dangling_link_is_a_missing_file(split: Path) -> None:
    """A snapshot of the Hugging Face cache whose blobs are gone."""
    (split / TWO).unlink()
    os.symlink(split / "blobs" / "gone", split / TWO)
    refused(split, f"{TWO} is missing")


def test_a_tensor_at_an_odd_place(tmp_path: Path) -> None:
    """A header of a length that does not align what follows it."""
    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    text += b" " * ((3 - len(text)) % 4)
    content = struct.pack("<Q", len(text)) + text + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert refused(tmp_path, "save the file again with").tensor == "a"

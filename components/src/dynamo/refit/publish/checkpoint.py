# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk as a trainer's shards: whole tensors in mapped files.

    publisher = WeightPublisher("my-model", checkpoint_shards(directory),
                                mode="in_place")

Each file is mapped once and is the storage of all its tensors, so a publisher registers
one region per file and pages are read from the disk as they are pulled. The files must
stay as they are while they are published: a checkpoint is replaced by renaming a new
directory into place, never by writing into one.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError, safe_open

from dynamo.refit.errors import RefitError
from dynamo.refit.publish.shard import LocalShard

#: Hugging Face's table of which file holds which tensor.
INDEX_NAME = "model.safetensors.index.json"


class CheckpointInvalid(RefitError):
    """A directory that is no complete safetensors checkpoint."""


def checkpoint_shards(directory: Path | str) -> list[LocalShard]:
    """Every tensor of the safetensors checkpoint in ``directory``.

    The files are those that ``model.safetensors.index.json`` names, or without one all
    ``*.safetensors``. Nothing is copied: the tensors are private mappings of the files
    (``MAP_PRIVATE``), on the CPU.

    Raises:
        CheckpointInvalid: no such directory, no safetensors in it, a file that is
            missing, cut short, corrupt or outside the directory, a tensor that the
            index names and no file has, or one that two files have. Names the file or
            the tensor.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointInvalid(f"{directory} is no directory")
    index = _read_index(directory / INDEX_NAME)
    files = _files(directory, index)
    shards: list[LocalShard] = []
    homes: dict[str, Path] = {}
    for file in files:
        for name, tensor in _map_file(file).items():
            if name in homes:
                raise CheckpointInvalid(
                    f"it is both in {homes[name]} and in {file}: remove the file that "
                    f"does not belong to the checkpoint, or list the right ones in "
                    f"{INDEX_NAME}",
                    tensor=name,
                )
            homes[name] = file
            shape = tuple(tensor.shape)
            shards.append(LocalShard(name, shape, (0,) * len(shape), tensor))
    for name, file in index.items():
        if homes.get(name) != directory / file:
            raise CheckpointInvalid(
                f"{INDEX_NAME} says that it is in {file}, but it is not: complete the "
                "download, or save the checkpoint again",
                tensor=name,
            )
    return shards


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name to file name; empty where there is no index."""
    try:
        weight_map = json.loads(file.read_bytes())["weight_map"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointInvalid(
            f"{file} cannot be read as an index ({type(error).__name__}: {error})"
        ) from error
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointInvalid(f"{file} has no weight_map of tensors to file names")
    for tensor, name in weight_map.items():
        # By its name alone: files of the Hugging Face cache are links to its blobs.
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointInvalid(
                f"{file} says that it is in {name!r}, outside the directory: copy or "
                "link the file into the directory, and list it by its name there",
                tensor=tensor,
            )
    return weight_map


def _files(directory: Path, index: dict[str, str]) -> list[Path]:
    if index:
        return [directory / name for name in sorted(set(index.values()))]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointInvalid(
            f"{directory} has no *.safetensors: give the directory of a Hugging Face "
            "checkpoint in the safetensors format"
        )
    return files


def _map_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, all views of one storage that is the mapped file."""
    try:
        nbytes = file.stat().st_size
        # It checks that the tensors fill the file exactly, so that they lie one
        # after the other at its end; it maps each of them as a storage of its own.
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.offset_keys()}
        storage = torch.UntypedStorage.from_file(str(file), False, nbytes)
    except FileNotFoundError as error:
        raise CheckpointInvalid(f"{file} is missing: complete the download") from error
    # RuntimeError: torch cannot map it.
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointInvalid(
            f"{file} is cut short or corrupt, or cannot be read: {error}"
        ) from error
    mapped: dict[str, torch.Tensor] = {}
    place = nbytes - sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        if place % tensor.element_size():
            raise CheckpointInvalid(
                f"it lies at byte {place} of {file}, which no {tensor.dtype} can: save "
                "the file again with safetensors.torch.save_file",
                tensor=name,
            )
        view = torch.empty(0, dtype=tensor.dtype)
        mapped[name] = view.set_(storage, place // tensor.element_size(), tensor.shape)
        place += tensor.nbytes
    return mapped

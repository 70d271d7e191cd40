# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints, made offline, for the tests and the demo.

    make_checkpoint(Path("v1"), seed=1)
    make_checkpoint(Path("v2"), seed=2, architecture="qwen3moe")

or ``python -m graphs.tiny_model v1 --seed 1``. A checkpoint is an ordinary Hugging Face
directory of 7-12 MB that vLLM and the Dynamo frontend load. It never learned anything,
but it behaves: greedy text is varied, depends on the prompt and on the seed, is plain
ASCII, and goes on until ``max_tokens``.

This module owns what the weights and the tokenizer are. It never starts an engine.
"""

import argparse
import contextlib
import errno
import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging as transformers_logging

MARKER_NAME = "tiny_model.json"
# Raise it when the same arguments come to mean other bytes.
RECIPE = 1

VOCABULARY_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
# The trainer numbers them in this order, from 0.
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class _Architecture:
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    settings: Mapping[str, Any] = field(default_factory=dict)


_ARCHITECTURES: Mapping[str, _Architecture] = {
    "qwen3": _Architecture(Qwen3Config, Qwen3ForCausalLM),
    "qwen3-tied": _Architecture(
        Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True}
    ),
    # One KV head: every tensor-parallel rank holds all of it.
    "qwen3-mqa": _Architecture(
        Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 1}
    ),
    # Query, key and value projections have biases.
    "qwen2": _Architecture(Qwen2Config, Qwen2ForCausalLM),
    "qwen3moe": _Architecture(
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "moe_intermediate_size": 128,
            "norm_topk_prob": True,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "llama": _Architecture(LlamaConfig, LlamaForCausalLM),
}
ARCHITECTURES = tuple(_ARCHITECTURES)

_COMMON_SETTINGS: Mapping[str, Any] = {
    "bos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
    "dtype": "bfloat16",
    "eos_token_id": SPECIAL_TOKENS.index(TURN_END),
    "head_dim": 32,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY_SIZE,
}


def make_checkpoint(
    directory: Path,
    *,
    seed: int,
    architecture: str = "qwen3",
    **config_overrides: Any,
) -> Path:
    """Write a random bf16 checkpoint into ``directory`` and return ``directory``.

    The same seed, architecture and overrides give the same bytes of
    ``model.safetensors``; another seed changes every tensor. ``config_overrides`` are
    fields of the transformers config, as plain JSON values. The tokenizer is the same
    for every checkpoint.

    A directory that already holds exactly this checkpoint is left as it is, one that
    holds another tiny checkpoint is replaced. The files are written to a sibling and
    renamed, so a killed run leaves no half checkpoint.

    Raises:
        ValueError: the architecture is unknown.
        FileExistsError: ``directory`` holds something that is no tiny checkpoint.
    """
    if architecture not in _ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"unknown architecture {architecture!r}; known: {known}")
    marker = {
        "architecture": architecture,
        "config_overrides": config_overrides,
        "recipe": RECIPE,
        "seed": seed,
    }
    if _read_marker(directory) == marker:
        return directory

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=directory.parent, prefix=f".{directory.name}."
    ) as workspace:
        complete = Path(workspace, "complete")
        with _no_progress_bars():
            _build_model(architecture, seed, config_overrides).save_pretrained(complete)
        build_tokenizer().save_pretrained(complete)
        (complete / MARKER_NAME).write_text(json.dumps(marker, indent=2) + "\n")
        _move_into_place(complete, directory, marker)
    return directory


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer; any text survives encode and decode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=_COMMON_SETTINGS["max_position_embeddings"],
    )


def _training_text() -> Iterator[str]:
    """Yield enough distinct words that the trainer fills the whole vocabulary."""
    onsets = "b d f g h k l m n p r s t v w z ch sh st tr".split()
    vowels = "a e i o u ai ea oo".split()
    codas = ("", "n", "r", "s", "l", "m")
    syllables = ["".join(parts) for parts in itertools.product(onsets, vowels, codas)]
    for index, first in enumerate(syllables):
        # Strides that share no factor with the number of syllables (960), so that
        # every syllable is met in each position.
        second = syllables[index * 7 % len(syllables)]
        third = syllables[index * 11 % len(syllables)]
        yield f"{first} {first}{second} {second} {first}{third}, {third}{second}."


def _build_model(
    architecture: str, seed: int, config_overrides: Mapping[str, Any]
) -> PreTrainedModel:
    """Instantiate the transformers model and give it the weights of ``seed``."""
    recipe = _ARCHITECTURES[architecture]
    config = recipe.config(
        **{**_COMMON_SETTINGS, **recipe.settings, **config_overrides}
    )
    # transformers initialises from the global generator; the caller's stays untouched.
    with torch.random.fork_rng(devices=[]):
        model = recipe.model(config)
    model.to(torch.bfloat16)
    _randomise(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Fill every parameter, at scales that keep greedy text varied.

    Embeddings are small beside what the layers add to them: were they not, a tied
    model's likeliest next token would always be its last one.
    """
    vocabulary_weights = (
        model.get_input_embeddings().weight,
        model.get_output_embeddings().weight,
    )
    quiet = _quiet_token_ids()
    for name, parameter in sorted(model.named_parameters()):
        if any(parameter is weight for weight in vocabulary_weights):
            values = 0.1 * torch.randn(parameter.shape, generator=generator)
            values[quiet] *= 0.01
        elif name.endswith(".bias"):
            values = 0.1 * torch.randn(parameter.shape, generator=generator)
        elif parameter.dim() == 1:
            values = 0.5 + torch.rand(parameter.shape, generator=generator)
        else:
            # [..., out, in]: fused experts have a leading dimension.
            gain = 1.5 / math.sqrt(parameter.shape[-1])
            values = gain * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(values)


def _quiet_token_ids() -> list[int]:
    """Ids that greedy text avoids: special tokens, and bytes that are no visible ASCII.

    A small row in the output embedding keeps their logits near zero, far below the
    largest of the thousands of others. So a stream ends at ``max_tokens`` and no chunk
    of it waits for the rest of a UTF-8 sequence.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first_byte = len(SPECIAL_TOKENS)
    invisible = [
        first_byte + index
        for index, character in enumerate(alphabet)
        if not character.isascii()
    ]
    return [*range(first_byte), *invisible]


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _read_marker(directory: Path) -> dict[str, Any] | None:
    try:
        return json.loads((directory / MARKER_NAME).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None


def _move_into_place(
    complete: Path, directory: Path, marker: Mapping[str, Any]
) -> None:
    """Rename ``complete`` to ``directory``; an older one is moved away first."""
    if _read_marker(directory) is not None:
        # FileNotFoundError: another process was faster.
        with contextlib.suppress(FileNotFoundError):
            directory.rename(complete.with_name("previous"))
    try:
        complete.rename(directory)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.ENOTEMPTY):
            raise
        # Another process may have made the same one meanwhile.
        if _read_marker(directory) != marker:
            raise FileExistsError(
                f"{directory} exists and is no tiny checkpoint (it has no "
                f"{MARKER_NAME}); remove it or choose another directory"
            ) from error


def main() -> None:
    """Make one checkpoint from the command line and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m graphs.tiny_model")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="qwen3")
    arguments = parser.parse_args()
    print(
        make_checkpoint(
            arguments.directory,
            seed=arguments.seed,
            architecture=arguments.architecture,
        )
    )


if __name__ == "__main__":
    main()

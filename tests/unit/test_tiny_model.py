# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The checkpoints that every other test serves: repeatable, distinct and whole."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from graphs import tiny_model
from graphs.tiny_model import ARCHITECTURES, MARKER_NAME, make_checkpoint

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "qwen3", seed=1)


def _weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_seed_gives_the_same_bytes(tmp_path: Path, architecture: str) -> None:
    first = make_checkpoint(tmp_path / "a", seed=7, architecture=architecture)
    torch.manual_seed(123)
    second = make_checkpoint(tmp_path / "b", seed=7, architecture=architecture)

    assert sorted(path.name for path in first.iterdir()) == sorted(
        path.name for path in second.iterdir()
    )
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_differs_between_seeds(tmp_path: Path, architecture: str) -> None:
    one = make_checkpoint(tmp_path / "1", seed=1, architecture=architecture)
    two = make_checkpoint(tmp_path / "2", seed=2, architecture=architecture)
    tensors, others = (load_file(path / "model.safetensors") for path in (one, two))

    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.shape == others[name].shape
        assert not torch.equal(tensor, others[name]), name
    assert ("lm_head.weight" in tensors) == (architecture != "qwen3-tied")
    assert (one / "tokenizer.json").read_bytes() == (
        two / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_is_small(tmp_path: Path, architecture: str) -> None:
    directory = make_checkpoint(tmp_path / "m", seed=1, architecture=architecture)
    assert 4e6 < (directory / "model.safetensors").stat().st_size < 12.6e6


def test_qwen2_has_biases_where_qwen_has_them(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", seed=1, architecture="qwen2")
    tensors = load_file(directory / "model.safetensors")

    prefix = "model.layers.0.self_attn"
    biases = {name for name in tensors if ".0." in name and name.endswith(".bias")}
    assert biases == {f"{prefix}.{part}_proj.bias" for part in "qkv"}
    assert tensors[f"{prefix}.q_proj.bias"].shape == (256,)
    assert tensors[f"{prefix}.k_proj.bias"].shape == (128,)


def test_one_kv_head_serves_all_query_heads(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", seed=1, architecture="qwen3-mqa")
    tensors = load_file(directory / "model.safetensors")

    prefix = "model.layers.0.self_attn"
    assert tensors[f"{prefix}.q_proj.weight"].shape == (256, 256)
    assert tensors[f"{prefix}.v_proj.weight"].shape == (32, 256)


def test_generating_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    make_checkpoint(tmp_path / "model", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_experts_are_written_under_their_hugging_face_names(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "moe", seed=1, architecture="qwen3moe")
    tensors = load_file(directory / "model.safetensors")

    prefix = "model.layers.3.mlp.experts.7"
    assert tensors[f"{prefix}.gate_proj.weight"].shape == (128, 256)
    assert tensors[f"{prefix}.down_proj.weight"].shape == (256, 128)
    assert tensors["model.layers.3.mlp.gate.weight"].shape == (8, 256)


def test_overrides_reach_the_config_and_the_weights(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", seed=1, num_hidden_layers=2)

    config = json.loads((directory / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    names = load_file(directory / "model.safetensors")
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}


def test_an_existing_checkpoint_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_checkpoint(tmp_path / "model", seed=1)
    written = (directory / "model.safetensors").stat()

    def refuse(*_: object) -> None:
        raise AssertionError("the model was built again")

    monkeypatch.setattr(tiny_model, "_build_model", refuse)
    assert make_checkpoint(directory, seed=1) == directory
    assert (directory / "model.safetensors").stat() == written


def test_another_seed_replaces_the_checkpoint(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", seed=1)
    before = _weights(directory)
    make_checkpoint(directory, seed=2)

    assert _weights(directory) != before
    assert json.loads((directory / MARKER_NAME).read_text())["seed"] == 2
    assert list(tmp_path.iterdir()) == [directory]


def test_a_foreign_directory_is_refused_and_kept(tmp_path: Path) -> None:
    note = tmp_path / "model" / "note.txt"
    note.parent.mkdir()
    note.write_text("mine")

    with pytest.raises(FileExistsError, match="no tiny checkpoint"):
        make_checkpoint(note.parent, seed=1)
    assert note.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [note.parent]


def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_model, "build_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "model", seed=1)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'gpt2'; known: qwen3, qwen3-tied"):
        make_checkpoint(tmp_path / "model", seed=1, architecture="gpt2")


@pytest.mark.parametrize(
    "text",
    [
        "The weights of version 42 are live.",
        "  indented\n\n\tand tabbed  ",
        "Zwölf Boxkämpfer, 日本語, 🙂, \u0000",
    ],
)
def test_tokenizer_round_trips_text(checkpoint: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(text)["input_ids"]

    assert tokenizer.decode(ids) == text
    assert max(ids) < 4096


def test_every_id_of_the_model_is_a_token(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())

    assert len(tokenizer) == config["vocab_size"] == 4096
    assert tokenizer.bos_token_id == config["bos_token_id"] == 0
    assert tokenizer.eos_token_id == config["eos_token_id"] == 2


def test_chat_template_renders(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which version?"},
    ]
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )

    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhich version?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # The markers of a turn are single tokens, not spelled out in bytes.
    assert tokenizer(rendered)["input_ids"].count(1) == 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_text_is_varied_and_depends_on_seed_and_prompt(
    tmp_path: Path, architecture: str
) -> None:
    texts: dict[tuple[int, str], str] = {}
    for seed in (1, 2):
        directory = make_checkpoint(
            tmp_path / str(seed), seed=seed, architecture=architecture
        )
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory)
        for prompt in ("Which version?", "One, two, three"):
            inputs = tokenizer(prompt, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
            generated = output[0, inputs["input_ids"].shape[1] :].tolist()
            texts[seed, prompt] = tokenizer.decode(generated)

            assert len(generated) == 48
            assert len(set(generated)) >= 24

    assert len(set(texts.values())) == len(texts)
    assert all(text.isascii() for text in texts.values())

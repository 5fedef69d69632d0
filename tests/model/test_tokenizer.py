"""Token ids equal those of transformers' Qwen2Tokenizer, however a model's files hold it."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import Qwen2Tokenizer

from image_worker.errors import ModelMismatch
from image_worker.model.tokenizer import TextTokenizer
from tests.conftest import MINI_FOLDER

SHIPPED = MINI_FOLDER / "tokenizer"
CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORD = "<tool_call>"  # an added token that is no control token
Files = dict[str, Any]


def texts() -> list[str]:
    """Chosen ones, and random ones of signs that are known to be awkward."""
    chosen = [
        "",
        " ",
        "make the red circle blue",
        "It's WE'LL don'T I'm 'Re",
        " a\n\n  b\r\n c  \t d \n",
        "12345 x1 1x ½ ²",
        "héllo e\u0301 Å \u212b ﬁ \ud7a3 각",  # composed and not, and compatibility forms
        "日本語のテキスト、中文。 हिन्दी العربية",
        "🎨👩‍👩‍👧‍👦🏳️‍🌈",
        "\x00\x07\u200b\ufeff\u2028\xa0",
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|> x<|im_end|>",
        "<|im_start <|IM_END|> <|image_pad|",
        f"a {WORD} b{WORD}",
        "a" * 5000,
        " red" * 1024,
    ]
    ranges = [(32, 127), (0xA0, 0x250), (0x300, 0x370), (0x4E00, 0x4E50), (0x1F300, 0x1F350)]
    signs = [chr(code) for start, end in ranges for code in range(start, end)]
    signs += ["\n", "\r", "\t", "  ", "'s", "'LL", *CONTROL, WORD]
    chance = Random(0)
    return chosen + ["".join(chance.choices(signs, k=chance.randrange(60))) for _ in range(300)]


def parts(content: Callable[[int], Files], *, within: bool = False) -> Callable[[Path], None]:
    """Writes the miniature's tokenizer as vocabulary and merges.

    content(count): the other files' contents, for a vocabulary of so many tokens; within: control
    tokens are in it, too.
    """

    def write(folder: Path) -> None:
        model = json.loads((SHIPPED / "tokenizer.json").read_text())["model"]
        vocabulary = model["vocab"]
        if not within:
            vocabulary = {
                token: number - len(CONTROL)
                for token, number in vocabulary.items()
                if token not in CONTROL
            }
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n")
        for name, held in content(len(vocabulary)).items():
            (folder / name).write_text(json.dumps(held))

    return write


def shipped(folder: Path) -> None:
    for path in SHIPPED.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


def with_decoder(count: int) -> Files:
    """As the models of the Qwen-Image family are published."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(count + place): {"content": token, "special": token in CONTROL, **plain}
        for place, token in enumerate((*CONTROL, WORD))
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(CONTROL[1:]),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }
    return {"tokenizer_config.json": config, "added_tokens.json": {"nonsense": 3}}


def with_older_files(count: int) -> Files:
    added = {token: count + place for place, token in enumerate((*CONTROL, WORD))}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {
        "additional_special_tokens": list(CONTROL[1:]),
        "eos_token": {"content": "<|im_end|>", **plain},
        "pad_token": {"content": "<|endoftext|>", **plain},
    }
    return {
        "added_tokens.json": added,
        "special_tokens_map.json": named,
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"},
    }


def with_names_only(count: int) -> Files:
    return {"tokenizer_config.json": json.loads((SHIPPED / "tokenizer_config.json").read_text())}


def with_spaces_first(count: int) -> Files:
    files = with_decoder(count)
    files["tokenizer_config.json"]["add_prefix_space"] = True
    return files


WAYS = {
    "as shipped": shipped,
    "added_tokens_decoder": parts(with_decoder),
    "added_tokens.json": parts(with_older_files),
    "names of tokens in the vocabulary": parts(with_names_only, within=True),
    "names of tokens beside it": parts(with_names_only),
    "add_prefix_space": parts(with_spaces_first),
}


@pytest.mark.parametrize("way", WAYS)
def test_equals_upstream(way: str, tmp_path: Path) -> None:
    WAYS[way](tmp_path)
    ours, theirs = TextTokenizer(tmp_path), Qwen2Tokenizer.from_pretrained(tmp_path)
    for text in texts():
        assert ours.ids(text) == theirs(text).input_ids, text
    assert sorted(ours.control) == sorted(theirs.all_special_ids)
    assert sorted(ours.control.values()) == sorted(CONTROL)
    assert all(ours.ids(token) == [number] for number, token in ours.control.items())


def test_threads_share_one_without_a_lock() -> None:
    tokenizer, given = TextTokenizer(SHIPPED), texts()
    expected = [tokenizer.ids(text) for text in given]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(4):
            assert list(threads.map(tokenizer.ids, given)) == expected


def test_truncation_and_padding_in_a_file_do_not_count(tmp_path: Path) -> None:
    shipped(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(content))
    text = "make the red circle blue"
    assert TextTokenizer(tmp_path).ids(text) == TextTokenizer(SHIPPED).ids(text)


def shifted(count: int) -> Files:
    """Ids that leave a gap."""
    files = with_older_files(count)
    files["added_tokens.json"]["<|video_pad|>"] += 5
    return files


def without(token: str) -> Callable[[int], Files]:
    def content(count: int) -> Files:
        files = with_decoder(count)
        config = files["tokenizer_config.json"]
        del config["added_tokens_decoder"]
        config["additional_special_tokens"].remove(token)
        return {"tokenizer_config.json": config}

    return content


def test_ids_that_the_vocabulary_contradicts_are_refused(tmp_path: Path) -> None:
    parts(shifted)(tmp_path)
    with pytest.raises(ModelMismatch, match=r"<\|video_pad\|>.*not"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_start|>"])
def test_every_token_of_the_templates_is_needed(token: str, tmp_path: Path) -> None:
    parts(without(token))(tmp_path)
    with pytest.raises(ModelMismatch) as caught:
        TextTokenizer(tmp_path)
    assert token in str(caught.value)


@pytest.mark.parametrize(
    ("way", "name", "content"),
    [
        ("as shipped", "tokenizer.json", b"{"),
        ("as shipped", "tokenizer.json", b'{"model": {}}'),
        ("as shipped", "tokenizer.json", b"\xff"),
        ("as shipped", "tokenizer_config.json", b"[]"),
        ("added_tokens_decoder", "vocab.json", b"{"),
        ("added_tokens_decoder", "vocab.json", b'{"a": 0}'),
        ("added_tokens_decoder", "merges.txt", b"one two three four\n"),
        ("added_tokens_decoder", "merges.txt", None),
        ("added_tokens_decoder", "tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}'),
        ("added_tokens_decoder", "tokenizer_config.json", b'{"added_tokens_decoder": {"1": 2}}'),
        ("added_tokens.json", "added_tokens.json", b'{"<a>": "x"}'),
    ],
)
def test_what_is_damaged_is_named(
    way: str, name: str, content: bytes | None, tmp_path: Path
) -> None:
    WAYS[way](tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelMismatch) as caught:
        TextTokenizer(tmp_path)
    assert f"{tmp_path.name}/{name}" in str(caught.value)

"""Text to token ids, as the Qwen2 tokenizer does it: byte-level BPE with control tokens.

From `tokenizer.json` where a model has one, else from the vocabulary and merges that it was made
from. It never changes after it is made, so any thread may use it at any time, without a lock. It
knows nothing of templates, padding or truncation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from image_worker.errors import ModelMismatch
from image_worker.model.in_folder import read_json

# Qwen2's words, which no merge crosses: English clitics, letters with one sign before them, single
# digits, signs, line ends, spaces.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Of the templates: each has to be one token.
_NEEDED = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


class TextTokenizer:
    """The tokenizer of one model. control: tokens that are no text, by their ids."""

    def __init__(self, folder: Path) -> None:
        """folder: `tokenizer/` of a model.

        Raises:
            ModelMismatch: a file is missing or damaged, or lacks a token that templates use.
        """
        config = _optional(folder / "special_tokens_map.json")
        config |= _optional(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").is_file():
            tokenizer = _whole(folder / "tokenizer.json")
        else:
            tokenizer = _from_parts(folder, space_first=bool(config.get("add_prefix_space")))
            _add(tokenizer, _added(folder, config))
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in _named(config)])
        # A file may ask for either, for batches; here each prompt stands alone.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self.control = {n: token.content for n, token in added.items() if token.special}
        self._tokenizer = tokenizer
        for text in _NEEDED:
            if text not in self.control.values():
                raise ModelMismatch(f"{folder.name}/ of the model has no control token {text}")

    def ids(self, text: str) -> list[int]:
        """The ids of a text. Control tokens in it become their own ids."""
        found: list[int] = self._tokenizer.encode(text).ids
        return found


def _whole(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library's errors have no kind of their own
        raise ModelMismatch(f"{path.parent.name}/{path.name} of the model is damaged") from error


def _from_parts(folder: Path, *, space_first: bool) -> Tokenizer:
    """From vocab.json and merges.txt, without added tokens."""
    parts = [folder / "vocab.json", folder / "merges.txt"]
    for path in parts:
        if not path.is_file():
            raise ModelMismatch(f"{folder.name}/{path.name} of the model is missing")
    try:
        tokenizer = Tokenizer(BPE.from_file(*map(str, parts)))
    except Exception as error:  # the library's errors have no kind of their own
        raise ModelMismatch(
            f"{folder.name}/vocab.json or {folder.name}/merges.txt of the model is damaged"
        ) from error
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=space_first, use_regex=False),
        ]
    )
    return tokenizer


def _added(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens beside the vocabulary, by their ids: of tokenizer_config.json, or the older file."""
    name = "tokenizer_config.json"
    try:
        if config.get("added_tokens_decoder") is not None:
            listed = config["added_tokens_decoder"].items()
            return {int(number): AddedToken(**fields) for number, fields in listed}
        name = "added_tokens.json"
        special = set(_named(config))
        return {
            int(number): AddedToken(text, special=text in special)
            for text, number in _optional(folder / name).items()
        }
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelMismatch(f"{folder.name}/{name} of the model is damaged") from error


def _add(tokenizer: Tokenizer, tokens: dict[int, AddedToken]) -> None:
    """The library counts ids on by itself: they must come out as they are known."""
    tokenizer.add_tokens([token for _, token in sorted(tokens.items())])
    for number, token in tokens.items():
        found = tokenizer.token_to_id(token.content)
        if found != number:
            raise ModelMismatch(
                f"the vocabulary in tokenizer/ of the model does not fit its added tokens: "
                f"{token.content} would be {found}, not {number}"
            )


def _named(config: dict[str, Any]) -> Iterator[str]:
    """The tokens that a configuration calls special, each by a field or in a list."""
    for field, value in config.items():
        tokens: Iterable[Any] = ()
        if field.endswith("_token"):
            tokens = [value]
        elif field in ("additional_special_tokens", "extra_special_tokens"):
            tokens = value.values() if isinstance(value, dict) else value or ()
        for token in tokens:
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                yield text


def _optional(path: Path) -> dict[str, Any]:
    """A JSON object from a file that need not be there."""
    return read_json(path) if path.is_file() else {}

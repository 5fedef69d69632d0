"""The miniature's tokenizer: a byte-level BPE in which every word of the prompt templates and
of the training instructions is one token.

The templates matter because a fixed number of tokens (64 or 34) is dropped after encoding: that
number must hold for this vocabulary as it does for Qwen's.
"""

from __future__ import annotations

import json
import re

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from image_worker.catalog import EDIT_PLUS, TEXT_TO_IMAGE
from tools.miniature.scenes import COLOURS, NEUTRALS, PLACES, SHAPES
from tools.miniature.wordings import OPENINGS, SPELLINGS, WORDINGS

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _words() -> list[str]:
    """Every word of the instructions, in the forms in which it can stand in a sentence."""
    sentences = [text for wording in WORDINGS.values() for text in wording.train]
    blanks = (*COLOURS, *NEUTRALS, *SHAPES, "shape", "object", *PLACES)
    plain = sorted(
        {
            word
            for text in (*sentences, *OPENINGS, *SPELLINGS.values(), *blanks)
            for word in re.findall(r"(?<!{)\b[A-Za-z]+\b(?!})", text)
        }
    )
    first = {text.replace("{thing}", "the").split()[0] for text in (*sentences, *OPENINGS)}
    return [f" {word}" for word in plain] + [f for w in sorted(first) for f in (w, w.title())]


def build() -> Qwen2Tokenizer:
    """Trains the vocabulary (1,024 tokens at most) on the templates and `WORDS`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    templates = [EDIT_PLUS.render("", 4), TEXT_TO_IMAGE.render("", 0)]
    corpus = templates * 1000 + _words() * 10
    tokenizer.train_from_iterator(corpus, trainer)
    model = tokenizer.get_vocab()
    merges = _merges(tokenizer)
    built = Qwen2Tokenizer(vocab=model, merges=merges, additional_special_tokens=list(SPECIAL[1:]))
    for template in (EDIT_PLUS, TEXT_TO_IMAGE):
        prefix = template.text.split("{}")[0]
        count = len(built(prefix).input_ids)
        if count != template.drop:
            raise SystemExit(f"the template's prefix has {count} tokens, not {template.drop}")
    return built


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]

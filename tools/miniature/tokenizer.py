"""The miniature's tokenizer: a byte-level BPE in which every word of the prompt templates, and the
common words of editing instructions, is one token.

The templates matter because a fixed number of tokens (64 or 34) is dropped after encoding: that
number must hold for this vocabulary as it does for Qwen's.
"""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from image_worker.catalog import EDIT_PLUS, TEXT_TO_IMAGE

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

WORDS = """
red green blue yellow orange purple pink cyan magenta brown black white gray grey gold silver
teal navy lime olive circle circles square squares triangle triangles star stars heart ring
cross diamond hexagon pentagon ellipse oval rectangle moon arrow shape shapes object objects
thing background sky picture image scene colour color colours colors gradient texture pattern
outline edge border corner make turn change recolour recolor paint fill replace swap exchange
switch remove delete erase take away get rid add put place draw insert move shift slide push
enlarge grow shrink scale bigger larger smaller double half invert mirror flip blur sharpen
brighten darken brighter darker lighter dim grayscale greyscale monochrome negative horizontally
vertically outlined everything every all the a an of in on to from into with and by at it its is
this that one two three other both between left right top bottom middle centre center upper
lower above below near side up down please now second first reference use like same shown keep
rest look style so has have be as instead big small
"""


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
    words = WORDS.split()
    corpus = templates * 1000 + [f" {word}" for word in words] * 10
    corpus += [word.title() for word in words]
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

"""The forward that the miniature is trained with computes what the served modules compute."""

from __future__ import annotations

from random import Random

import pytest
import torch

from image_worker.edit import conditions
from tests import upstream
from tests.conftest import mini_model
from tools.miniature import forward
from tools.miniature.edits import random_edit
from tools.miniature.render import pictures_of, to_image, to_picture

SENTENCES = ("make it blue", "swap the colours of the red circle and the blue star", "blur")


@pytest.mark.parametrize("pictures", [1, 2])
def test_prompts_are_encoded_as_when_served(pictures: int) -> None:
    model = mini_model()
    edits = [random_edit(Random(number), "move", "train") for number in range(3)]
    drawn = pictures_of(edits)
    layout = forward.layout(upstream.tokenizer(), pictures, torch.device("cpu"))
    words = [model.tokenizer.ids(sentence) for sentence in SENTENCES]
    ids, lengths = layout.tokens(words)

    images = [[to_image(drawn[which][row]) for which in range(pictures)] for row in range(3)]
    seen = [image for row in images for image in row]
    patches = forward.patches(
        torch.stack([to_picture(image) for image in seen]),
        torch.tensor(model.patching.mean),
        torch.tensor(model.patching.deviation),
    )
    with torch.inference_mode():
        found = forward.encode_text(upstream.text_encoder(torch.float32), layout, ids, patches)
    for row, sentence in enumerate(SENTENCES):
        expected = conditions.encode(model, sentence, None, images[row]).text
        assert lengths[row] == len(expected)
        torch.testing.assert_close(found[row, : len(expected)], expected, atol=1e-4, rtol=1e-4)

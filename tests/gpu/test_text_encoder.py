"""The text encoder at full size against transformers'. Run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLModel

from image_worker.bench.checkpoint import text_config
from image_worker.model.text_encoder import TextEncoder

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda")
GRIDS = [(28, 28), (24, 32)]  # of 384² and a wider picture, in patches


@torch.inference_mode()
def test_is_as_near_to_float32_as_stock_is() -> None:
    torch.manual_seed(0)
    config = text_config()
    with CARD:
        stock = Qwen2_5_VLModel._from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in stock.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    with torch.device("meta"):
        ours = TextEncoder(config.to_dict())
    ours.load_state_dict(stock.state_dict(), assign=True)
    ours.language_model.embed_tokens.cpu()  # in place: the stock module's stays
    ids, patches = prompt(config.image_token_id)
    found = ours(ids, patches, GRIDS).float()
    mine = run(stock, ids, patches)
    exact = run(stock.float(), ids, patches)
    assert distance(found, exact) <= 1.15 * distance(mine, exact)
    assert distance(found, exact) <= 0.1


def prompt(image: int) -> tuple[Tensor, Tensor]:
    """Ids with two pictures among them, and their patches; on the CPU."""
    tokens = [rows * columns // 4 for rows, columns in GRIDS]
    parts = [torch.randint(100, 900, (60,))]
    for count in tokens:
        parts += [torch.full((count,), image), torch.randint(100, 900, (20,))]
    patches = torch.randn(sum(rows * columns for rows, columns in GRIDS), 3 * 2 * 14 * 14)
    return torch.cat(parts), patches


def run(stock: Qwen2_5_VLModel, ids: Tensor, patches: Tensor) -> Tensor:
    hidden = stock(
        input_ids=ids[None].to(CARD),
        attention_mask=torch.ones_like(ids)[None].to(CARD),
        pixel_values=patches.to(CARD, stock.dtype),
        image_grid_thw=torch.tensor([[1, *grid] for grid in GRIDS], device=CARD),
        mm_token_type_ids=(ids == stock.config.image_token_id).long()[None].to(CARD),
    ).last_hidden_state
    return hidden[0].float()  # type: ignore[no-any-return]


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative to what is exact."""
    return float((found - exact).norm() / exact.norm())

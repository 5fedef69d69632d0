"""The autoencoder for single pictures equals diffusers', with and without tiles."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from image_worker.errors import ModelMismatch
from image_worker.model import weights
from image_worker.model.components import VAE
from image_worker.model.configs import VaeConfig
from image_worker.model.vae import Vae, checkpoint_name, last_frame
from tests.conftest import MINI_FOLDER, make_picture, read_mini

CPU = torch.device("cpu")
# Of values of size 1: convolutions over one frame and over three sum in another order; and where
# the picture grows, upstream rounds to float32, also in float64.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}
# What the miniature has not: temporal layers, several blocks at each size, widths that differ.
CONFIG: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 3, 2, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "input_channels": 4,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}


@pytest.fixture(scope="module")
def random() -> tuple[Any, Vae]:
    """Both with the same random weights, norms included."""
    torch.manual_seed(0)
    stock = AutoencoderKLQwenImage(**CONFIG).eval()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
        stock.decoder.conv_out.weight *= 5  # so that pixels exceed the range that they have
    ours = Vae(VaeConfig.parse(stock.config)).eval()
    state = stock.state_dict().items()
    ours.load_state_dict({name: last_frame(t) for name, t in state if checkpoint_name(name)})
    return stock, ours


@pytest.fixture(scope="module")
def miniature() -> tuple[Any, Vae]:
    return AutoencoderKLQwenImage.from_pretrained(MINI_FOLDER / "vae"), read_mini(
        VAE, torch.float32
    )


def stock_encode(stock: Any, pixels: Tensor) -> Tensor:
    found: Tensor = stock.encode(pixels[:, :, None]).latent_dist.mode()
    return found[:, :, 0]


def stock_decode(stock: Any, latents: Tensor) -> Tensor:
    found: Tensor = stock.decode(latents[:, :, None]).sample
    return found[:, :, 0]


def in_type(pair: Any, dtype: torch.dtype, request: pytest.FixtureRequest) -> Any:
    """Both for one test in another type."""
    request.addfinalizer(lambda: [vae.float() for vae in pair])
    return [vae.to(dtype) for vae in pair]


def pixels_of(stock: Any, height: int, width: int) -> Tensor:
    return torch.rand(2, stock.config.input_channels, height, width) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["random", "miniature"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_stock(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    stock, ours = in_type(request.getfixturevalue(name), dtype, request)
    pixels = pixels_of(stock, 40, 72).to(dtype)
    exact = {"atol": TOLERANCE[dtype], "rtol": 0.0}
    latents = stock_encode(stock, pixels)
    torch.testing.assert_close(ours.encode(pixels), latents, **exact)
    decoded = stock_decode(stock, latents)
    torch.testing.assert_close(ours.decode(latents), decoded, **exact)
    assert latents.std() > 0.01 and decoded.std() > 0.01
    assert name == "miniature" or decoded.max() == 1, "limited"


@torch.no_grad()
def test_in_bf16_it_is_no_further_from_float32_than_stock() -> None:
    exact = AutoencoderKLQwenImage.from_pretrained(MINI_FOLDER / "vae")
    stock = AutoencoderKLQwenImage.from_pretrained(MINI_FOLDER / "vae", torch_dtype=torch.bfloat16)
    ours = read_mini(VAE, torch.bfloat16)
    values = torch.from_numpy(np.array(make_picture(48, 32)))
    pixels = (values.permute(2, 0, 1)[None] / 127.5 - 1).bfloat16()
    latents = stock_encode(exact, pixels.float())
    drawn = stock_decode(exact, latents)
    for found, theirs, expected in (
        (ours.encode(pixels), stock_encode(stock, pixels), latents),
        (ours.decode(latents.bfloat16()), stock_decode(stock, latents.bfloat16()), drawn),
    ):
        assert found.dtype == torch.bfloat16
        assert distance(found, expected) <= 1.2 * distance(theirs, expected)
        assert distance(theirs, expected) < 0.03


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the length of what is expected."""
    return float((found.float() - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("size", [(80, 136), (104, 56), (64, 64)])
def test_tiles_equal_stocks_tiles(
    random: Any, size: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    """Tiles of 64 that overlap by 16, some of which the edges cut off to less than that."""
    stock, ours = in_type(random, torch.float64, request)
    stock.enable_tiling(64, 64, 48, 48)
    request.addfinalizer(stock.disable_tiling)
    pixels = pixels_of(stock, *size).double()
    exact = {"atol": TOLERANCE[torch.float64], "rtol": 0.0}
    latents = stock_encode(stock, pixels)
    torch.testing.assert_close(ours.encode(pixels, tile=64), latents, **exact)
    found = ours.decode(latents, tile=64)
    torch.testing.assert_close(found, stock_decode(stock, latents), **exact)
    fits = max(size) <= 64
    assert torch.equal(found, ours.decode(latents)) == fits, "tiles were used or not"


def test_nothing_that_only_joins_frames_is_kept(random: Any, tmp_path: Path) -> None:
    """A checkpoint is loaded as in a start, and its forecast of bytes is right."""
    stock, _ = random
    save_file(stock.state_dict(), tmp_path / "vae.safetensors")
    with torch.device("meta"):
        ours = Vae(VaeConfig.parse(stock.config))
    storage = weights.Storage(torch.float32)
    files = [tmp_path / "vae.safetensors"]
    weights.load(ours, weights.read(files, "", VAE.rename, VAE.cut), storage, CPU)
    kept, there = (sum(p.nbytes for p in vae.parameters()) for vae in (ours, stock))
    assert kept == sum(
        weights.stored_bytes(weights.shapes(files, VAE.rename, VAE.cut), storage).values()
    )
    assert kept < 0.45 * there
    for parameter in ours.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, "a slice of what was there"


class Count(TorchDispatchMode):
    """Bytes of the tensors that are made while it is active: of those that live, and the most."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        return made

    def _drop(self, key: int, size: int) -> None:
        self._seen.remove(key)
        self.live -= size


@torch.no_grad()
@pytest.mark.parametrize(("way", "shape"), [("encode", (3, 256, 256)), ("decode", (16, 32, 32))])
def test_three_tensors_of_full_size_are_the_most(way: str, shape: tuple[int, int, int]) -> None:
    """Of the published model's size, in bf16, on the meta device."""
    config = CONFIG | {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "input_channels": 3}
    statistics = {name: [0.0] * 16 for name in ("latents_mean", "latents_std")}
    with torch.device("meta"):
        vae = Vae(VaeConfig.parse(config | statistics)).bfloat16()
        x = torch.empty(1, *shape, dtype=torch.bfloat16)
    with Count(vae.parameters()) as count:
        getattr(vae, way)(x)
    assert 3 <= count.peak / (256 * 256 * 96 * 2) < 3.2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"attn_scales": [0.5]}, "attn_scales of the VAE is"),
        ({"dim_mult": [1, 2, 4]}, "dim_mult of the VAE is"),
        ({"latents_mean": [0.0] * 3}, "3 and 4 channels, but z_dim is 4"),
        ({"base_dim": "wide"}, "configuration is damaged"),
        ({"latents_std": None}, "configuration is damaged"),
        ({"latents_std": [1.0, None, 1.0, 1.0]}, "configuration is damaged"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelMismatch, match=complaint):
        VaeConfig.parse(CONFIG | change)


def test_an_option_that_is_missing_is_named() -> None:
    config = {name: value for name, value in CONFIG.items() if name != "num_res_blocks"}
    with pytest.raises(ModelMismatch, match="num_res_blocks"):
        VaeConfig.parse(config)


def test_options_that_upstream_ignores_are_ignored() -> None:
    assert VaeConfig.parse(CONFIG | {"new": 1}) == VaeConfig.parse(CONFIG)


@torch.no_grad()
def test_gradients_pass_through_what_is_computed_in_place(random: Any) -> None:
    """The miniature is trained with it: its gradients are those of stock's."""
    stock, ours = random
    pixels = pixels_of(stock, 32, 32)
    with torch.enable_grad():
        stock.encode(pixels[:, :, None]).latent_dist.mode().square().mean().backward()
        ours.encode(pixels).square().mean().backward()
    expected = dict(stock.named_parameters())
    for name, parameter in ours.encoder.named_parameters(prefix="encoder"):
        gradient = last_frame(expected[name].grad)
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-3)

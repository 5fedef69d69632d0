"""Qwen-Image's autoencoder for single pictures: pixels to latents and back.

It is made for video, after Wan 2.1 (arXiv:2503.20314): its kernels look at three frames. Of those a
picture has one, the last, and the other two are zeros, so that only the last time slice of each
kernel counts: here it is all there is, and what joins frames is left out. Parameters are called as
in diffusers' `AutoencoderKLQwenImage`. Not here: sampling from the posterior, and videos.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from image_worker.model.configs import VAE_SCALE, VaeConfig
from image_worker.model.tiles import in_tiles

_LEAST_LENGTH = 1e-12
_SILU = nn.SiLU(inplace=True)


def checkpoint_name(name: str) -> str | None:
    """The name here of a checkpoint's tensor; None: it only joins frames, and is not needed."""
    return None if ".time_conv." in name else name


def last_frame(tensor: Tensor) -> Tensor:
    """What of a checkpoint's tensor meets a picture.

    Of a kernel over frames, (out, in, time, height, width), that is the last time slice.
    """
    return tensor[:, :, -1].contiguous() if tensor.ndim == 5 else tensor


class Vae(nn.Module):
    """The autoencoder. Pixels are (B, channels, H, W) in [-1, 1], H and W multiples of 8.

    Latents are (B, z_dim, H / 8, W / 8), not normalised. Both are in the weights' type.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor, tile: int | None = None) -> Tensor:
        """The mean of the latents.

        tile: side in pixels, a multiple of 32, of the tiles in which a larger picture is encoded.
        """
        if tile is None or max(pixels.shape[-2:]) <= tile:
            return self._mean(pixels)
        return in_tiles(self._mean, pixels, tile, tile // VAE_SCALE)

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Pixels. tile: as for `encode`; tiles are not limited to [-1, 1], nor are upstream's."""
        if tile is None or max(latents.shape[-2:]) * VAE_SCALE <= tile:
            return self._pixels(latents).clamp_(-1, 1)
        return in_tiles(self._pixels, latents, tile // VAE_SCALE, tile)

    def _mean(self, pixels: Tensor) -> Tensor:
        mean, _ = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean  # type: ignore[no-any-return]

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """(B, channels, H, W) to (B, 2 · z_dim, H / 8, W / 8): mean and log variance."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        self.conv_in = nn.Conv2d(config.input_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, (before, width) in enumerate(pairwise(widths)):
            if level > 0:
                pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(before, before, 3, stride=2)
                self.down_blocks.append(_Resample(pad, conv))
            self.down_blocks.extend(_residuals(before, width, config.num_res_blocks))
        self.mid_block = _Middle(widths[-1])
        self.norm_out = _Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        before = (self.conv_in, *self.down_blocks, self.mid_block)
        return _run((*before, self.norm_out, _SILU, self.conv_out), x)


class Decoder(nn.Module):
    """(B, z_dim, H / 8, W / 8) to (B, channels, H, W)."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in reversed(config.dim_mult)]
        self.conv_in = nn.Conv2d(config.z_dim, widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0])
        self.up_blocks = nn.ModuleList()
        before = widths[0]
        for level, width in enumerate(widths, start=1):
            grows = level < len(widths)
            self.up_blocks.append(_Up(before, width, config.num_res_blocks + 1, grows=grows))
            before = width // 2
        self.norm_out = _Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.input_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        before = (self.conv_in, self.mid_block, *self.up_blocks)
        return _run((*before, self.norm_out, _SILU, self.conv_out), x)


def _run(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Through all layers in turn.

    Groups are taken apart first, because nothing else may hold on to a layer's input: of the
    published model those are up to 192 MiB for a picture of 1024².
    """
    for layer in _flat(layers):
        x = layer(x)
    return x


def _flat(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for layer in layers:
        if isinstance(layer, _Group):
            yield from _flat(layer.layers())
        else:
            yield layer


class _Group(nn.Module, ABC):
    """Layers that share a part of their parameters' names. `_run` runs them, one by one."""

    @abstractmethod
    def layers(self) -> Iterable[nn.Module]:
        """They, in their order."""


class _Up(_Group):
    """Residual blocks and, where the picture grows, twice the size with half the channels."""

    def __init__(self, inputs: int, outputs: int, blocks: int, *, grows: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_residuals(inputs, outputs, blocks))
        self.upsamplers = nn.ModuleList()
        if grows:
            double = nn.Upsample(scale_factor=2.0, mode="nearest-exact")
            conv = nn.Conv2d(outputs, outputs // 2, 3, padding=1)
            self.upsamplers.append(_Resample(double, conv))

    def layers(self) -> Iterable[nn.Module]:
        return (*self.resnets, *self.upsamplers)


class _Resample(_Group):
    """Another size, then a convolution."""

    def __init__(self, size: nn.Module, conv: nn.Conv2d) -> None:
        super().__init__()
        self.resample = nn.Sequential(size, conv)

    def layers(self) -> Iterable[nn.Module]:
        return self.resample


class _Middle(_Group):
    """Attention between two residual blocks, at the latents' size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([_Attention(channels)])
        self.resnets = nn.ModuleList(_residuals(channels, channels, 2))

    def layers(self) -> Iterable[nn.Module]:
        return (self.resnets[0], *self.attentions, self.resnets[1])


def _residuals(inputs: int, outputs: int, count: int) -> Iterator[_Residual]:
    for number in range(count):
        yield _Residual(inputs if number == 0 else outputs, outputs)


class _Residual(nn.Module):
    """Two convolutions beside the identity. (B, inputs, H, W) to (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _Norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _Norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        # One statement each, so that beside x there are never more than two tensors of its size.
        y: Tensor = functional.silu(self.norm1(x), inplace=True)
        y = self.conv1(y)
        y = functional.silu(self.norm2(y), inplace=True)
        y = self.conv2(y)
        return y.add_(self.conv_shortcut(x))


class _Attention(nn.Module):
    """Every place attends to every other, with one head. (B, channels, H, W) in and out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _Norm(channels, dimensions=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].contiguous()
        mixed = functional.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        y: Tensor = self.proj(mixed[:, 0].transpose(1, 2).reshape(x.shape))
        return y.add_(x)


class _Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) over channels, as Wan has it. (B, channels, H, W) in and out."""

    def __init__(self, channels: int, dimensions: int = 3) -> None:
        """dimensions: of size 1 that `gamma` has behind its channels in checkpoints."""
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dimensions))
        self._scale = channels**0.5

    def forward(self, x: Tensor) -> Tensor:
        # Upstream rounds where this does, but makes copies in float32, which are twice as large.
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
        y = x.clone().div_(length.clamp_min(_LEAST_LENGTH))
        return y.mul_(self._scale).mul_(self.gamma.view(-1, 1, 1))

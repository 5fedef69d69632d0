"""Qwen-Image's autoencoder, for pictures: the video autoencoder with time folded away.

Its convolutions look at three frames, of which a picture has one and two are zero padding. With
only the weights of that one frame left, the result is the same, for a third of the arithmetic and
less than half of the memory.
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageCausalConv3d,
    QwenImageResample,
)
from torch import Tensor, nn
from torch.nn import functional


class PictureVae(AutoencoderKLQwenImage):  # type: ignore[misc]
    """diffusers' class for single frames: no cache of earlier frames. Call `fold` after loading."""

    def clear_cache(self) -> None:
        """Called before every picture or tile. Without a cache, layers take one frame."""
        self._feat_map = self._enc_feat_map = None

    def fold(self) -> None:
        """Drops, in place, the weights that only ever meet zeros. Frees their memory."""
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(module, QwenImageResample) and name == "time_conv":
                    delattr(module, name)  # joins frames; a picture has nothing to join
                elif isinstance(child, QwenImageCausalConv3d):
                    setattr(module, name, _PictureConv(child))


class _PictureConv(nn.Module):
    """A causal 3D convolution on one frame: the 2D convolution with its last time slice."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight[:, :, -1].clone(), requires_grad=False)
        self.bias = conv.bias
        self.stride = conv.stride[1:]
        self.padding = (conv._padding[2], conv._padding[0])  # of height, of width

    def forward(self, x: Tensor, cache: None = None) -> Tensor:  # noqa: ARG002 (diffusers passes it)
        """x: (batch, channels, 1, height, width)."""
        y = functional.conv2d(x.squeeze(2), self.weight, self.bias, self.stride, self.padding)
        return y.unsqueeze(2)

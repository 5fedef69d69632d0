"""The miniature's architecture: the same classes as the 20 B model, 3,000 times smaller.

Sizes are chosen so that a 128² edit takes seconds on two CPU cores, and so that every weight
format of this project can store them: widths are multiples of 64 (NF4 blocks, int4 groups).
Upstream's constraints: `axes_dims_rope` sums to the head size, `mrope_section` to half the text
head size, `in_channels` is four times the VAE's `z_dim`.
"""

from __future__ import annotations

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

LATENT_CHANNELS = 16
TEXT_WIDTH = 128


def transformer(*, zero_cond_t: bool = False) -> QwenImageTransformer2DModel:
    """The dual-stream transformer: 7 blocks of width 128."""
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=7,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
        zero_cond_t=zero_cond_t,
    )


def vae() -> AutoencoderKLQwenImage:
    """The autoencoder: 8× per side as in the big one, without its layers for video."""
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 3, 3],
        num_res_blocks=1,
        temperal_downsample=[False, False, False],
        # Measured after training.
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The vision-language model that reads the instruction and the pictures."""
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }.items()
    }
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 1024,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 128,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=True,
        **ids,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def image_processor() -> Qwen2VLImageProcessorPil:
    """How the text encoder's pictures are cut: at 128², 8 × 8 patches, merged to 16 tokens."""
    return Qwen2VLImageProcessorPil(patch_size=16)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's own schedule."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )

"""The worker's configuration: a frozen value, read once from the environment, and by nothing else.

What "auto" means depends on the card and the model, so it is resolved elsewhere
(`catalog.choose`, `model/placement.py`) into new values; settings are never changed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from image_worker import contradictions
from image_worker.allowed import explain
from image_worker.errors import InvalidSettings

ModelName = Literal["auto", "edit-2509", "edit-2511", "edit", "image", "image-2512", "mini"]
Precision = Literal["bf16", "fp8", "8bit", "svdq", "4bit"]


def _number_in_text(value: object) -> object:
    """Environment variables are text; `Literal[4, 8]` wants numbers."""
    return int(value) if isinstance(value, str) and value.strip().isdigit() else value


def _current_name(value: object) -> object:
    """Of a way to offload: one of them had another name before."""
    return "stream" if value == "model" else value


Offload = Annotated[Literal["auto", "none", "stream"], BeforeValidator(_current_name)]


def _default_model_dir() -> Path:
    return Path.home() / ".cache" / "image-worker"


class Settings(BaseSettings):
    """One field per environment variable, which has the field's name in capitals."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: ModelName = Field("auto", description="which model of the catalogue to serve")
    model_id: str | None = Field(
        None, description="another hub repo of the same kind, or a local folder in diffusers layout"
    )
    model_revision: str | None = Field(None, description="commit, tag or branch of the repo")
    model_dir: Path = Field(
        default_factory=_default_model_dir,
        description="where downloaded weights and compiled kernels are kept",
    )
    checkpoint: str | None = Field(
        None,
        description="a file with another transformer, in FP8, SVDQuant int4, GGUF or 16 bits: a "
        "path, an https URL, or owner/name:file@revision on the hub",
    )
    checkpoint_lightning: Annotated[Literal["auto", 0, 4, 8], BeforeValidator(_number_in_text)] = (
        Field(
            "auto",
            description="steps of the Lightning LoRA that is merged in CHECKPOINT, 0 for none; "
            "auto knows published files",
        )
    )
    checkpoint_decode: bool = Field(
        False,
        description="decode CHECKPOINT's weights when they are loaded, and store them as "
        "PRECISION_MODE says, LoRAs merged; else they stay in the file's format",
    )
    text_encoder_checkpoint: str | None = Field(
        None,
        description="a file with another text encoder, in FP8 or 16 bits: a path, an https URL, or "
        "owner/name:file@revision on the hub",
    )
    keep_prepared: Literal["auto", "1", "0", "whole"] = Field(
        "auto",
        description="write weights as they are served to MODEL_DIR/prepared, from where the next "
        "start reads them; auto does where there is a card; whole: all that a start needs, so that "
        "the checkpoint and the LoRAs need not be there any more",
    )
    local_only: bool = Field(False, description="never download")
    download_timeout: int = Field(
        300,
        ge=1,
        le=86_400,
        description="how long downloads are tried without a byte arriving, in seconds",
    )
    precision_mode: Literal["auto", "bf16", "fp8", "8bit", "svdq", "4bit"] = Field(
        "auto", description="how weights are stored on the card; auto picks by free memory"
    )
    svdq_rank: Annotated[Literal[32, 64, 128], BeforeValidator(_number_in_text)] = Field(
        32, description="rank of the part in 16 bits that svdq leaves beside its int4"
    )
    svdq_ranges: Path | None = Field(
        None,
        description="file of activation ranges that svdq fits the transformer to, as `python -m "
        "image_worker calibrate` writes it",
    )
    quantize_components: Literal["all", "text"] = Field(
        "all",
        description="what fp8, 8bit, svdq and 4bit apply to: everything, or the text encoder alone",
    )
    bnb_compute: Literal["bf16", "fp16"] = Field(
        "bf16", description="the type in which the model computes"
    )
    compute: Literal["auto", "bf16", "fp8", "int8"] = Field(
        "auto",
        description="what the transformer multiplies weights in few bits in: fp8, int8, or the "
        "type of BNB_COMPUTE; auto is by weights and card",
    )
    attention: Literal["auto", "bf16", "int8"] = Field(
        "auto",
        description="what the transformer attends in: int8 queries and keys and fp8 values, or the "
        "type of BNB_COMPUTE; auto is int8 on Hopper cards",
    )
    use_lightning_lora: bool = Field(True, description="few-step sampling by the Lightning LoRA")
    lightning_steps: Annotated[Literal[4, 8], BeforeValidator(_number_in_text)] = Field(
        8, description="which Lightning LoRA: the one for 4 or the one for 8 steps"
    )
    lora_dir: Path | None = Field(None, description="folder with LoRAs that jobs may name")
    lora_sources: str = Field(
        "folder,hub,https",
        description="which LoRAs jobs may name: folder (LORA_DIR), hub (public repos), https (any "
        "host), owner/name or owner/* (repos, read with HF_TOKEN), names of hosts",
    )
    max_lora_mb: int = Field(
        2048, ge=1, le=100_000, description="largest file of a LoRA that a job names, in MB"
    )
    lora_cache_mb: int = Field(
        1024,
        ge=0,
        le=1_000_000,
        description="memory for LoRAs of earlier jobs, in MB, on the host and again on the card",
    )
    cpu_offload: Offload = Field(
        "auto",
        description="which weights stay on the card: as many as fit (auto), all (none), or as few "
        "as possible (stream; model is its older name); others pass through it, from the host",
    )
    int8_cpu_offload: bool = Field(
        False, description="older name for CPU_OFFLOAD=stream together with PRECISION_MODE=8bit"
    )
    gpu_max_gib: float | None = Field(
        None,
        gt=0,
        le=1024,
        allow_inf_nan=False,
        description="hard limit on the card's memory, in GiB",
    )
    default_cfg_scale: float | None = Field(
        None, ge=1, le=20, allow_inf_nan=False, description="true_cfg_scale of jobs that name none"
    )
    batch_size: int = Field(4, ge=1, le=64, description="most pictures that are denoised at a time")
    batch_timeout_ms: int = Field(
        40, ge=0, le=10_000, description="longest wait for a batch to fill, in milliseconds"
    )
    remember_mb: int = Field(
        256,
        ge=0,
        le=100_000,
        description="host memory for encoded prompts and pictures of earlier jobs, in MB",
    )
    standalone_mode: bool = Field(False, description="serve plain HTTP instead of RunPod's queue")
    api_host: str = Field("127.0.0.1", description="address of the standalone server")
    api_port: int = Field(8000, ge=1, le=65_535, description="port of the standalone server")
    api_key: SecretStr | None = Field(
        None, description="bearer key that the standalone server asks for"
    )
    queue_size: int = Field(
        100, ge=1, le=10_000, description="most unfinished jobs of the standalone server"
    )
    max_reply_mb: int = Field(
        10, ge=0, le=1000, description="largest reply with pictures in it, in MB; 0 is no limit"
    )
    embed_metadata: bool = Field(
        True, description="write the prompt, the seed and the model into the pictures' files"
    )
    bucket_endpoint_url: str | None = Field(
        None,
        description="S3 storage for the pictures: its URL, with the bucket's name or not",
    )
    bucket_access_key_id: SecretStr | None = Field(None, description="the storage's access key")
    bucket_secret_access_key: SecretStr | None = Field(
        None, description="the secret of that access key"
    )
    bucket_name: str | None = Field(
        None, description="the bucket, where its name is not in the storage's URL"
    )
    bucket_link_seconds: int = Field(
        604_800, ge=60, le=604_800, description="how long links to stored pictures are valid"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="how much is logged"
    )
    runpod_webhook_get_job: str | None = Field(
        None, description="set by RunPod: the queue; without it the worker runs one local job"
    )

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """Reads the settings from `env`. An empty value counts as unset.

        Raises:
            InvalidSettings: names every bad variable, its value and what is allowed.
        """
        values = {
            name: env[name.upper()].strip()
            for name in cls.model_fields
            if env.get(name.upper(), "").strip()
        }
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            lines = explain(error, cls.model_fields, values)
            raise InvalidSettings("\n".join(lines)) from None
        contradictions.refuse(settings)
        return settings

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: `from_env` is the one place that knows the environment."""
        return (init_settings,)


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `changes`, for a process of its own."""
    return {**os.environ, **changes}

"""The machine: its card, and how much memory of the card and the host there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from image_worker.model.host import free_host_memory
from image_worker.settings import Settings

GIB = 2**30

# CPUs, in torch's words, on which a product in bf16 takes 7 times as long as in float32.
_SLOW_IN_BF16 = ("DEFAULT", "NO AVX", "AVX2")


@dataclass(frozen=True)
class Hardware:
    """What the plan needs to know of the machine. Without a card, memory is not planned.

    free, host: bytes of the card and of the host that can still be had; capability: the card's
    compute capability.
    """

    name: str
    free: int | None = None
    has_bf16: bool = True
    capability: tuple[int, int] | None = None
    host: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device("cpu" if self.free is None else "cuda")


def detect_hardware(settings: Settings) -> Hardware:
    """Looks at the card, and makes `GPU_MAX_GIB` a limit that the process cannot exceed."""
    if not torch.cuda.is_available():
        return Hardware(
            name="CPU", has_bf16=torch.backends.cpu.get_cpu_capability() not in _SLOW_IN_BF16
        )
    free, total = torch.cuda.mem_get_info()
    if settings.gpu_max_gib is not None:
        limit = int(settings.gpu_max_gib * GIB)
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        free = min(free, limit)
    capability = torch.cuda.get_device_capability()
    return Hardware(
        name=torch.cuda.get_device_name(),
        free=free,
        has_bf16=capability >= (8, 0),
        capability=capability,
        host=free_host_memory(),
    )

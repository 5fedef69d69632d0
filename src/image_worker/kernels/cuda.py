"""Kernels in CUDA's own language: sources of this folder, compiled by NVRTC when needed."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Kernel:
    """One kernel, for the current card, which is a Hopper."""

    def __init__(
        self,
        source: str,
        name: str,
        macros: Mapping[str, int | str],
        cache: Path | None = None,
        *,
        shared_bytes: int = 0,
    ) -> None:
        """source, macros, cache: as of `compiled`; shared_bytes: of each block, asked for here.

        Raises:
            Exception: it cannot run here. Errors of CUDA's packages have no kind of their own.
        """
        from cuda.bindings import driver
        from cuda.core import Device

        device = Device(torch.cuda.current_device())
        device.set_current()
        self._shared_bytes = shared_bytes
        self._kernel = compiled(source, macros, cache).get_kernel(name)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(
            attribute, shared_bytes, self._kernel.handle, device.device_id
        )
        if error:
            raise RuntimeError(f"{name} needs {shared_bytes} bytes of shared memory: {error}")

    def __call__(
        self, grid: tuple[int, ...], threads: int, *arguments: Tensor | int | float
    ) -> None:
        """Launches it on torch's stream.

        Contiguous tensors are passed as addresses, numbers in 32 bits.
        """
        from cuda.core import LaunchConfig, launch

        config = LaunchConfig(grid=grid, block=threads, shmem_size=self._shared_bytes)
        launch(_CurrentStream(), config, self._kernel, *map(_argument, arguments))


def compiled(
    source: str, macros: Mapping[str, int | str], cache: Path | None = None, log: Any = None
) -> Any:
    """Object code of a file of this folder, its `macros` defined, for Hopper.

    cache: a folder where it is kept and looked for; log: a stream for the compiler's remarks.
    """
    from cuda.core import Program, ProgramOptions
    from cuda.core.utils import FileStreamProgramCache

    options = ProgramOptions(
        std="c++17",
        arch="sm_90a",
        define_macro=[(name, str(value)) for name, value in macros.items()],
        ptxas_options=["-v"] if log else None,
    )
    program = Program(Path(__file__).with_name(source).read_text(), "c++", options)
    if cache:
        try:
            return program.compile("cubin", cache=FileStreamProgramCache(cache))
        except OSError:  # a folder that cannot be written; the last start's kernel is no loss
            pass
    return program.compile("cubin", logs=log)


class _CurrentStream:
    """torch's stream, by the protocol of CUDA's Python packages."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


def _argument(value: Tensor | int | float) -> Any:
    if isinstance(value, Tensor):
        if not value.is_contiguous():
            raise ValueError(f"a kernel reads contiguous tensors only, not {value.stride()}")
        return value.data_ptr()
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)

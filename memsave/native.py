"""The one switch between the C core and Python: buffers in, exceptions out."""

from __future__ import annotations

import os
from array import array
from typing import Any

from memsave._native import ffi, lib
from memsave.errors import MemsaveError

__all__ = ["checked", "ffi", "hash_bytes", "lib", "numbers", "u64"]


def checked(result: int, what: str) -> int:
    """Turn a negative errno into MemsaveError, pass everything else."""
    if result < 0:
        raise MemsaveError(f"{what}: {os.strerror(-result)}")
    return result


def u64(values: array[int]) -> Any:
    """A view of an array of u64 for C; valid while the array is neither resized nor freed."""
    return ffi.from_buffer("uint64_t[]", values)


def numbers(count: int) -> array[int]:
    """``count`` zeros of u64."""
    return array("Q", bytes(8 * count))


def hash_bytes(data: bytes | memoryview) -> int:
    """XXH3-64 with seed 0."""
    return int(lib.ms_hash_bytes(ffi.from_buffer(data), len(data)))

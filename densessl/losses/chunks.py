"""How many rows of logits one tensor may hold."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl.memory import free_memory

# Below 32 MiB glibc hands freed memory out again; more is fetched and zeroed anew.
CPU_CHUNK_BYTES = 16 * 2**20
GPU_CHUNK_BYTES = 256 * 2**20
LEAST_CHUNK_BYTES = 2**20  # less is slower and saves next to nothing
_CHUNKS = 8  # up to 6 of them live at a time; the rest is for others


def rows_at_once(rows: Tensor, width: int, chunk_bytes: int | None = None) -> int:
    """How many rows of ``width`` logits one tensor may hold, 1 or more.

    Args:
        rows: gives the device and the type of the logits.
        width: of a row, ``K``.
        chunk_bytes: bound on the tensor; None takes :func:`bytes_at_once`.
    """
    if chunk_bytes is None:
        chunk_bytes = bytes_at_once(rows.device)
    return max(1, chunk_bytes // (width * rows.dtype.itemsize))


def bytes_at_once(device: torch.device) -> int:
    """16 MiB on CPU and 256 MiB elsewhere; less where memory is scarce.

    It is halved until eight such tensors fit into what is free, down to 1 MiB. So
    results are the same bits as long as there are 128 MiB, or 2 GiB, to spare, and the
    same up to rounding with less.
    """
    size = CPU_CHUNK_BYTES if device.type == 'cpu' else GPU_CHUNK_BYTES
    free = free_bytes(device)
    while free is not None and size > LEAST_CHUNK_BYTES and _CHUNKS * size > free:
        size //= 2
    return size


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process could still take; None where nobody says.

    On a GPU also what torch has taken and uses for nothing; on CPU see
    :func:`densessl.memory.free_memory`.
    """
    if device.type == 'cuda':
        unused = torch.cuda.memory_reserved(device)
        unused -= torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return free_memory() if device.type == 'cpu' else None

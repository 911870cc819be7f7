"""A number that tells weights apart, whatever file or package holds them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def fingerprint(state: dict[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        flat = state[name].detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Several processes: the wrapper around the model, and the process group."""

from __future__ import annotations

import os

import torch
from mmengine.model import MMDistributedDataParallel
from torch import nn

from densessl.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class DistributedDataParallel(MMDistributedDataParallel):
    """MMEngine's DDP that leaves the step to the algorithm, on GPU and on CPU."""

    def train_step(self, data: dict, optim_wrapper) -> dict:
        """The algorithm's step, with gradients averaged over the ranks."""
        return self.module.train_step(data, optim_wrapper, forward=self)


def unwrap(model: nn.Module) -> nn.Module:
    """The algorithm itself, out of the wrapper of several processes if it is in one."""
    return getattr(model, 'module', model)


def init_process_group() -> bool:
    """Join the process group that torchrun announces in the environment.

    Returns:
        Whether there is one. NCCL where every process has a GPU, else gloo.
    """
    if 'LOCAL_RANK' not in os.environ or 'WORLD_SIZE' not in os.environ:
        return False
    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        backend = 'nccl' if torch.cuda.is_available() else 'gloo'
        torch.distributed.init_process_group(backend)
    return True


def model_wrapper_cfg() -> dict:
    """Config of the wrapper for this machine; MMEngine's default needs GPUs."""
    cuda = torch.cuda.is_available()
    return dict(
        type='densessl.DistributedDataParallel',
        device_ids=[int(os.environ['LOCAL_RANK'])] if cuda else None,
        broadcast_buffers=False,
        find_unused_parameters=False,
    )

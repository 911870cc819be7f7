"""What a training step takes: measured on one and two pictures, then extrapolated."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from densessl.datasets import collate_views
from densessl.errors import DenseSSLError
from densessl.memory import free_memory
from densessl.registry import OPTIM_WRAPPER_CONSTRUCTORS
from densessl.schedules import Progress

from .check import Check
from .config import noise_samples
from .machine import GIB, Loading

_SMALL = (1, 2)  # pictures a step, on the CPU
_SMALL_WITH_NORM = (2, 3)  # one picture has no spread for batch norm
_CLOSE = 0.9  # of the free memory; more is too near to its end


@dataclass(frozen=True)
class StepNeed:
    """What :func:`measure` found, for one process.

    Attributes:
        device: ``'cpu'`` or ``'cuda'``.
        parameters: of the student.
        first_bytes: greatest memory of a step on one picture, with the gradients whole:
            weights of both sides, optimiser, activations.
        image_bytes: that each picture more adds.
        view_bytes: of a picture's normalised views; a whole batch of them is there
            also where ``model.accumulate`` splits it.
        gradient_bytes: of the trained parameters; several processes hold them twice.
        seconds_per_image: of the larger of the two batches.
        checkpoint_bytes: of ``step_*.pth``, near enough.
        free_bytes: of the device's memory before; None where not known.
    """

    device: str
    parameters: int
    first_bytes: float
    image_bytes: float
    view_bytes: int
    gradient_bytes: int
    seconds_per_image: float
    checkpoint_bytes: int
    free_bytes: int | None

    def peak_bytes(self, batch: int, accumulate: int = 1, processes: int = 1) -> float:
        """Greatest memory of a process in a step of a batch in so many parts."""
        part = -(-batch // accumulate)
        copies = self.gradient_bytes if processes > 1 else 0
        waiting = (batch - part) * self.view_bytes
        return self.first_bytes + (part - 1) * self.image_bytes + waiting + copies


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the greatest number.

    Args:
        tensors: that are there already.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def measure(cfg: Config, model: nn.Module) -> StepNeed:
    """Take three small steps of a config's training on noise, and extrapolate.

    The model, its optimiser and the views are those of the config, in full size. On the
    CPU the bytes of living tensors are counted in steps of 1 and 2 pictures; on a GPU
    the allocator counts them, in steps of a quarter and a half of the batch.

    Memory of a step on ``b`` pictures: what one picture takes, with all gradients there
    at the end of the forward pass, and ``b - 1`` times what the second one added,
    before or during the backward pass. A little too much rather than too little.

    Args:
        cfg: the config.
        model: built from it; its weights change.

    Raises:
        DenseSSLError: not even that fits a GPU.
    """
    cuda = torch.cuda.is_available()
    device = 'cuda' if cuda else 'cpu'
    free = torch.cuda.mem_get_info()[0] if cuda else free_memory()
    torch.manual_seed(0)
    model.accumulate = 1
    if blocks := cfg.get('activation_checkpointing'):
        turn_on_activation_checkpointing(model, blocks)
    model = model.to(device).train()
    wrapper = _optim_wrapper(cfg, model)
    _set_progress(model, cfg)
    norms = any(isinstance(m, _BatchNorm) for m in model.modules())
    small, large = _SMALL_WITH_NORM if norms else _SMALL
    if cuda:
        part = cfg.train_dataloader.batch_size // max(1, cfg.model.get('accumulate', 1))
        small, large = max(small, part // 4), max(large, part // 2)
    samples = noise_samples(cfg, min(large, 16))
    counter = (
        _CudaBytes() if cuda else LiveBytes([*model.parameters(), *model.buffers()])
    )
    _step(model, wrapper, samples, small, counter)  # the optimiser makes its state
    low = _step(model, wrapper, samples, small, counter)
    high = _step(model, wrapper, samples, large, counter)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = _bytes(trained)
    slope = max(
        (high.forward - low.forward) / (large - small),
        (high.peak - low.peak) / (large - small),
    )
    first = max(low.forward + gradients, low.peak) - (small - 1) * slope
    return StepNeed(
        device=device,
        parameters=sum(p.numel() for p in trained),
        first_bytes=first,
        image_bytes=slope,
        view_bytes=4 * sum(view.numel() for view in samples[0]['inputs'].values()),
        gradient_bytes=gradients,
        seconds_per_image=high.seconds / large,
        checkpoint_bytes=_bytes(tree_leaves(model.state_dict()))
        + _bytes(tree_leaves(wrapper.state_dict())),
        free_bytes=free,
    )


def check_memory(need: StepNeed, cfg: Config, loading: Loading) -> Iterator[Check]:
    """The step's memory against what is free, in main memory or on each GPU."""
    batch, processes = cfg.train_dataloader.batch_size, loading.processes
    accumulate = max(1, cfg.model.get('accumulate', 1))
    several = processes if need.device == 'cpu' else 1  # share one memory
    extra = loading.shared_bytes if need.device == 'cpu' else 0

    def total(parts: int) -> float:
        return several * need.peak_bytes(batch, parts, processes) + extra

    where = 'main memory' if need.device == 'cpu' else 'each GPU'
    about = (
        f'a step of {batch} images takes about {total(accumulate) / GIB:.2f} GiB of '
        f'{where}'
    )
    free = need.free_bytes
    if free is None:
        yield Check('ok', 'memory', f'{about}; what is free is not known')
        return
    about += f', {free / GIB:.2f} GiB free'
    if total(accumulate) <= _CLOSE * free:
        yield Check('ok', 'memory', about)
        return
    parts = (n for n in range(accumulate + 1, batch + 1) if batch % n == 0)
    enough = next((n for n in parts if total(n) <= _CLOSE * free), None)
    remedy = (
        f'set model.accumulate={enough}'
        if enough
        else 'choose a smaller backbone, fewer views or a machine with more memory'
    )
    if not cfg.get('low_memory'):
        remedy += ' or low_memory=True, which computes activations twice'
    yield Check('fail' if total(accumulate) > free else 'warn', 'memory', about, remedy)


@dataclass(frozen=True)
class _Peaks:
    forward: int  # at the end of the forward pass
    peak: int
    seconds: float


class _CudaBytes:
    """The allocator's account, in the place of :class:`LiveBytes`."""

    def __enter__(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *error: Any) -> None:
        torch.cuda.synchronize()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


def _step(model, wrapper, samples: list[dict], size: int, counter) -> _Peaks:
    batch = collate_views([samples[i % len(samples)] for i in range(size)])
    backward, forward_peaks = wrapper.backward, []

    def noted(*args, **kwargs):
        forward_peaks.append(counter.peak)
        return backward(*args, **kwargs)

    if isinstance(counter, LiveBytes):
        counter.peak = counter.live
    wrapper.backward = noted
    start = time.perf_counter()
    try:
        with counter:
            model.train_step(batch, wrapper)
    except torch.OutOfMemoryError as error:
        raise DenseSSLError(
            f'a step of {size} images does not fit the memory of the GPU; set '
            'model.accumulate higher, or low_memory=True'
        ) from error
    finally:
        del wrapper.backward  # the class's own method shows again
    seconds = time.perf_counter() - start
    return _Peaks(forward_peaks[0], counter.peak, seconds)


def _optim_wrapper(cfg: Config, model: nn.Module) -> OptimWrapper:
    wrapper_cfg = cfg.optim_wrapper.to_dict()
    return OPTIM_WRAPPER_CONSTRUCTORS.get(wrapper_cfg.pop('constructor'))(wrapper_cfg)(
        model
    )


def _set_progress(model: nn.Module, cfg: Config) -> None:
    """To the last step, where all heads are at work."""
    steps = 10 * cfg.train_cfg.max_epochs
    model.progress = Progress(steps - 1, steps, 10)


def _bytes(leaves: Iterable[Any]) -> int:
    tensors: Iterator[Tensor] = (x for x in leaves if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)

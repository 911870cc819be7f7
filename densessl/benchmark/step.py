"""Time and memory of a training step on demo scenes."""

from __future__ import annotations

import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from torch.utils.flop_counter import FlopCounterMode

import densessl
from densessl.datasets import DemoScenes, collate_views
from densessl.engine.optim import TwoGroupConstructor
from densessl.errors import DenseSSLError
from densessl.registry import MODELS
from densessl.schedules import Progress

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
PHASES = ('preprocess', 'teacher', 'student', 'heads', 'backward', 'update')


@dataclass
class StepTimes:
    """What :func:`measure_step` found.

    Attributes:
        images_per_second: of the median step.
        milliseconds: median of each phase, and of the whole step under ``'step'``.
            Phases are timed in steps of their own, with the device synchronised.
        peak_gib: greatest resident memory of the process so far (CPU), or greatest
            allocated memory of the device (GPU).
        fixed_gib: of that, weights, gradients and optimiser state.
        base_gib: of that, the process before there was a model (CPU).
        gflop: products of matrices in a step, see :func:`count_gflop`.
        gflop_per_second: what the device makes of one large product in the step's
            precision, see :func:`product_rate`.
    """

    images_per_second: float
    milliseconds: dict[str, float]
    peak_gib: float
    fixed_gib: float
    base_gib: float = 0.0
    gflop: float = 0.0
    gflop_per_second: float = 0.0
    settings: dict = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the device's rate in products, 0 to 1; what else a step does costs it."""
        seconds = self.milliseconds['step'] / 1e3
        return self.gflop / seconds / self.gflop_per_second

    @property
    def above_gib(self) -> float:
        """What the steps took on top: activations, temporaries, the batch."""
        return self.peak_gib - self.fixed_gib - self.base_gib


def demo_batch(cfg: Config, batch_size: int) -> dict:
    """Demo scenes through a config's own crops, collated."""
    pipeline = cfg.train_dataloader.dataset.pipeline
    crops = [step for step in pipeline if not step['type'].startswith('Load')]
    scenes = DemoScenes(batch_size, size=256, pipeline=crops)
    return collate_views([scenes[i] for i in range(batch_size)])


def measure_step(
    cfg: Config, batch_size: int, steps: int = 5, warmup: int = 2
) -> StepTimes:
    """Train a config's model on one batch of demo scenes and time it.

    Args:
        cfg: a training config.
        batch_size: images a step on this device.
        steps: timed steps; the median counts.
        warmup: steps before.
    """
    base = _peak_gib()
    model, wrapper, batch = set_up(cfg, batch_size)
    step = partial(model.train_step, batch, wrapper)
    whole = time_steps(step, steps, warmup)
    memory = _peak_gib(), base
    gflop = count_gflop(step)  # it holds memory of its own
    clocks = [_timed_phases(model, wrapper, batch) for _ in range(steps)]
    phases = {
        phase: 1e3 * _median([clock[phase] for clock in clocks]) for phase in PHASES
    }
    return _result(model, wrapper, batch, whole, memory, gflop, phases)


def measure_plain_step(
    cfg: Config, batch_size: int, steps: int = 5, warmup: int = 2
) -> StepTimes:
    """The same for the plain formulation of ``benchmarks/reference/plain.py``.

    It is measured in the config's precision, by autocast; of fp16 without the scaling
    of the loss, which costs next to nothing.
    """
    sys.path.insert(0, str(Path(densessl.__file__).parents[1] / 'benchmarks/reference'))
    from plain import PlainStep

    cfg = copy.deepcopy(cfg)
    cfg.optim_wrapper.optimizer.pop('fused', None)  # torch's default
    base = _peak_gib()
    model, wrapper, batch = set_up(cfg, batch_size)
    dtype = None if wrapper.precision == 'fp32' else DTYPES[wrapper.precision]
    step = partial(PlainStep(model, wrapper.optimizer, dtype=dtype).step, batch)
    whole = time_steps(step, steps, warmup)
    memory = _peak_gib(), base
    gflop = count_gflop(step)  # it holds memory of its own
    return _result(model, wrapper, batch, whole, memory, gflop, {})


def in_turns(commands: dict[str, list[str]], rounds: int) -> dict[str, StepTimes]:
    """``tools/benchmark.py step`` with several command lines, one after the other.

    A machine's speed drifts; in turns all see the same drift. Each measurement is a
    process of its own, so that peaks of memory do not mix.

    Args:
        commands: arguments of ``step`` by a name of one's own.
        rounds: measurements of each. Times are medians over them, the peak is the
            greatest.

    Raises:
        DenseSSLError: a measurement failed.
    """
    found: dict[str, list[StepTimes]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, words in commands.items():
            module = [sys.executable, '-m', 'densessl.benchmark.main', 'step']
            ran = subprocess.run([*module, *words, '--json'], stdout=subprocess.PIPE)
            if ran.returncode:
                raise DenseSSLError(f'step {" ".join(words)}: failed, see above')
            last = ran.stdout.decode().splitlines()[-1]
            found[name].append(StepTimes(**json.loads(last)))
    return {name: _middle(several) for name, several in found.items()}


def _middle(several: list[StepTimes]) -> StepTimes:
    milliseconds = {
        phase: _median([times.milliseconds[phase] for times in several])
        for phase in several[0].milliseconds
    }
    return StepTimes(
        _median([times.images_per_second for times in several]),
        milliseconds,
        max(times.peak_gib for times in several),
        several[0].fixed_gib,
        several[0].base_gib,
        several[0].gflop,
        max(times.gflop_per_second for times in several),
        several[0].settings,
    )


def set_up(cfg: Config, batch_size: int):
    """Model, optimiser wrapper and a batch of demo scenes."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).to(device).train()
    wrapper_cfg = cfg.optim_wrapper.to_dict()
    wrapper_cfg.pop('constructor')
    wrapper = TwoGroupConstructor(wrapper_cfg)(model)
    model.progress = Progress(100, 1000, 10)  # past the epochs of frozen layers
    return model, wrapper, demo_batch(cfg, batch_size)


def time_steps(step: Callable[[], object], steps: int, warmup: int) -> list[float]:
    """Seconds of calls, those of the first ones left out."""
    seconds = []
    for _ in range(warmup + steps):
        start = _synchronize()
        step()
        seconds.append(_synchronize() - start)
    return seconds[warmup:]


def _synchronize() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def count_gflop(step: Callable[[], object]) -> float:
    """Products of matrices in a call, attention's included, each as 2 operations."""
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with torch.compiler.set_stance('force_eager'), counter:  # it sees no compiled code
        step()
    return counter.get_total_flops() / 1e9


def product_rate(device: torch.device, precision: str) -> float:
    """Billions of operations a second in the best of a few large products."""
    side = 8192 if device.type == 'cuda' else 2048
    factor = torch.ones(side, side, dtype=DTYPES[precision], device=device)
    seconds = min(time_steps(lambda: factor @ factor, 10, 2))
    return 2 * side**3 / seconds / 1e9


def _result(model, wrapper, batch, whole, memory, gflop, phases) -> StepTimes:
    batch_size = len(batch['paths'])
    seconds = _median(whole)
    device = next(model.parameters()).device
    return StepTimes(
        images_per_second=batch_size / seconds,
        milliseconds=phases | {'step': 1e3 * seconds},
        peak_gib=memory[0],
        fixed_gib=_fixed_gib(model, wrapper.optimizer),
        base_gib=memory[1],
        gflop=gflop,
        gflop_per_second=product_rate(device, wrapper.precision),
        settings=dict(
            device=str(device), batch_size=batch_size, precision=wrapper.precision
        ),
    )


def _timed_phases(model, wrapper, batch) -> dict[str, float]:
    """One step with a clock between its parts; same calls as ``train_step``."""
    marks: list[tuple[str, float]] = []
    undo = []

    def mark_after(owner, name: str, phase: str) -> None:
        call = getattr(owner, name)

        def timed(*args, **kwargs):
            result = call(*args, **kwargs)
            marks.append((phase, _synchronize()))
            return result

        setattr(owner, name, timed)
        undo.append((owner, name))

    features = model._features

    def timed_features(branch, *args):
        result = features(branch, *args)
        phase = 'teacher' if branch is model.teacher else 'student'
        marks.append((phase, _synchronize()))
        return result

    model._features = timed_features
    undo.append((model, '_features'))
    mark_after(model.data_preprocessor, 'forward', 'preprocess')
    mark_after(model, 'forward', 'heads')
    mark_after(wrapper, 'backward', 'backward')
    mark_after(model, 'update_teacher', 'update')
    start = _synchronize()
    try:
        model.train_step(batch, wrapper)
    finally:
        for owner, name in undo:
            delattr(owner, name)  # the class's own method shows again
    times = dict.fromkeys(PHASES, 0.0)
    for phase, now in marks:
        times[phase] += now - start
        start = now
    return times


def _peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _fixed_gib(model, optimizer) -> float:
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p for p in model.parameters() if p.requires_grad]  # their gradients
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**30


def _median(values: list[float]) -> float:
    return statistics.median(values)

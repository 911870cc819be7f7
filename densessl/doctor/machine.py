"""The machine: GPUs, cores, shared memory, open files, disk and memory."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .check import Check

GIB, MIB = 2**30, 2**20
SHARED_MEMORY = Path('/dev/shm')
CGROUP = Path('/sys/fs/cgroup')
_OWN_FILES = 256  # libraries, pipes, logs and the sockets of several processes
_RAISED_FILES = 4096  # MMEngine raises the limit to this, as far as it may
_BUSY = 2 * GIB  # in use on a GPU, more than the look at it takes


@dataclass(frozen=True)
class Loading:
    """What the loader of one process holds at once.

    Attributes:
        processes: of the run on this machine, one a GPU.
        workers: of each process.
        prefetch: batches that each worker keeps ready.
        batch_bytes: of the views of a batch.
        batch_tensors: of a batch; each takes an open file.
    """

    processes: int
    workers: int
    prefetch: int
    batch_bytes: int
    batch_tensors: int

    @property
    def shared_bytes(self) -> int:
        """Of all processes, in shared memory."""
        batches = self.workers * self.prefetch + 1 if self.workers else 0
        return self.processes * batches * self.batch_bytes

    @property
    def files(self) -> int:
        """Open at once in one process."""
        return _OWN_FILES + self.workers * (self.prefetch * self.batch_tensors + 8)


def cores() -> float:
    """Cores that this process may use, by its affinity and its control group."""
    count = float(len(os.sched_getaffinity(0)))
    quota = _read(CGROUP / 'cpu.max').split()
    if len(quota) == 2 and quota[0] != 'max':
        count = min(count, int(quota[0]) / int(quota[1]))
    return count


def nvidia_driver() -> bool:
    """Whether this machine has NVIDIA's driver."""
    there = Path('/proc/driver/nvidia/version').exists()
    return there or shutil.which('nvidia-smi') is not None


def check_gpus() -> Iterator[Check]:
    """GPUs that torch can use, and whether others use them."""
    import torch

    hidden = os.environ.get('CUDA_VISIBLE_DEVICES')
    if not torch.cuda.is_available():
        if not nvidia_driver() or hidden in ('', '-1'):
            yield Check('ok', 'GPU', 'none: training runs on the CPU, in float32')
        elif torch.version.cuda is None:
            yield Check(
                'fail',
                'GPU',
                f'not used: torch {torch.__version__} is built for the CPU alone, and '
                'there is an NVIDIA driver',
                'install a CUDA build, as https://pytorch.org/get-started/locally says',
            )
        else:
            yield Check(
                'fail',
                'GPU',
                f'not used: torch {torch.__version__} for CUDA {torch.version.cuda} '
                f'finds none (CUDA_VISIBLE_DEVICES={hidden!r})',
                'run nvidia-smi; update the driver, or install a build of torch for '
                'the CUDA that it names',
            )
        return
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    kind = 'bf16' if bf16 else 'no bf16, so fp16 with a scaled loss'
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        about = (
            f'{torch.cuda.get_device_name(number)}, {free / GIB:.1f} of '
            f'{total / GIB:.1f} GiB free, {kind}'
        )
        if total - free > _BUSY:
            yield Check(
                'warn',
                f'GPU {number}',
                f'busy: {about}',
                'wait, or choose idle ones by CUDA_VISIBLE_DEVICES',
            )
        else:
            yield Check('ok', f'GPU {number}', f'idle: {about}')


def check_cores(threads: int, loading: Loading | None) -> Iterator[Check]:
    """Threads and workers against the cores there are.

    Args:
        threads: of torch.
        loading: of the config, or None.
    """
    there = cores()
    most = max(1, int(there))
    if threads > max(there, 1):
        yield Check(
            'warn',
            'CPU',
            f'{threads} threads on {there:g} cores',
            f'export OMP_NUM_THREADS={most}',
        )
    elif loading and loading.processes * loading.workers > max(there, 1):
        yield Check(
            'warn',
            'CPU',
            f'{there:g} cores for {loading.processes} x {loading.workers} workers',
            f'set train_dataloader.num_workers={max(1, most // loading.processes)}',
        )
    else:
        yield Check('ok', 'CPU', f'{there:g} cores, {threads} threads')


def check_shared_memory(loading: Loading | None) -> Iterator[Check]:
    """Room for the batches that workers hand over."""
    if not SHARED_MEMORY.exists():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    need = loading.shared_bytes if loading else GIB
    about = f'{free / GIB:.2f} GiB free in {SHARED_MEMORY}'
    if loading:
        about += f', {need / GIB:.2f} GiB needed'
    if free >= need:
        yield Check('ok', 'shared memory', about)
        return
    yield Check(
        'fail' if loading else 'warn',
        'shared memory',
        about,
        f'docker run --shm-size={max(1, round(2 * need / GIB))}g (or --ipc=host), or '
        'fewer train_dataloader.num_workers; 0 needs none',
    )


def check_open_files(loading: Loading | None) -> Iterator[Check]:
    """The limit of open files against what workers' tensors take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    hard = 2**31 if hard == unlimited else hard
    soft = hard if soft == unlimited else soft
    limit = min(max(soft, _RAISED_FILES), hard)
    need = loading.files if loading else 2 * _OWN_FILES
    about = f'{limit} allowed, {need} needed'
    if limit >= need:
        yield Check('ok', 'open files', about)
    else:
        yield Check(
            'fail',
            'open files',
            about,
            'raise the hard limit (ulimit -Hn 65536, docker run --ulimit '
            'nofile=65536), or set fewer train_dataloader.num_workers',
        )


def check_disk(folder: Path, need: int | None, what: str = '') -> Iterator[Check]:
    """Room for checkpoints, and whether they may be written.

    Args:
        folder: work dir, which need not exist yet.
        need: bytes; None for a config that is not known.
        what: the need in words.
    """
    places = (folder, *folder.absolute().parents)
    there = next(path for path in places if path.exists())
    free = shutil.disk_usage(there).free
    about = f'{free / GIB:.1f} GiB free for {folder}'
    if what:
        about += f', {(need or 0) / GIB:.2f} GiB needed ({what})'
    if not os.access(there, os.W_OK):
        yield Check(
            'fail', 'disk', f'{there} cannot be written', 'choose another --work-dir'
        )
    elif need is not None and free < need:
        yield Check(
            'fail',
            'disk',
            about,
            'free some, choose another --work-dir, or keep fewer checkpoints: '
            'default_hooks.checkpoint.keep=1',
        )
    elif need is None and free < 5 * GIB:
        yield Check('warn', 'disk', about, 'free some, or choose another --work-dir')
    else:
        yield Check('ok', 'disk', about)


def _read(path: str | Path) -> str:
    """As `densessl.memory.read_text`; here `import densessl` may be what is broken."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ''

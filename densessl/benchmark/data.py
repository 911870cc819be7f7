"""Speed of the input pipeline on one core, beside Pillow with torchvision.

Rates are images per second of processor time: reading from a slow disk is not counted,
and other programs on the machine disturb the figure less than they disturb a clock. The
pipeline and the reference take turns, so that what remains hits both alike; trust their
ratio more than either rate.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from PIL import Image, ImageFilter, ImageOps

from densessl.datasets.channels import LoadChannels
from densessl.datasets.image_io import LoadImage
from densessl.datasets.transforms.multi_crop import MultiCrop, ViewRecipe
from densessl.datasets.unlabelled import ENDINGS
from densessl.errors import DenseSSLError
from densessl.registry import TRANSFORMS

Pipeline = Sequence[Any] | Mapping[str, Any] | Config | str | os.PathLike[str]
_TURNS = 5


@dataclass(frozen=True)
class DataSpeed:
    """What a run found.

    Attributes:
        images_per_second: the pipeline's rate on one core.
        reference_images_per_second: that of Pillow with torchvision; None if not run.
        num_images: pictures that the pipeline processed.
    """

    images_per_second: float
    reference_images_per_second: float | None
    num_images: int

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the reference the pipeline is."""
        if self.reference_images_per_second is None:
            return None
        return self.images_per_second / self.reference_images_per_second


def run(
    config: Pipeline,
    folder: str | os.PathLike[str] | None = None,
    seconds: float = 10.0,
    reference: bool = True,
    size: tuple[int, int] = (480, 360),
) -> DataSpeed:
    """Measure a config's pipeline, and the same views by torchvision in turn with it.

    Args:
        config: a config file or its content with ``train_dataloader.dataset.pipeline``,
            a dict with ``pipeline``, or the list of transforms itself.
        folder: pictures to read, searched with its subfolders; None makes some
            JPEGs of noise that is as rough as photographs.
        seconds: for each of the two, by the clock.
        reference: measure the reference too, if torchvision is installed.
        size: ``(W, H)`` of the pictures that are made, in px.

    Raises:
        DenseSSLError: no pipeline in the config, no picture in the folder, or a
            reference is wanted and the pipeline has no ``MultiCrop``.
    """
    steps = build_pipeline(config)
    tasks = [sample_maker(steps)]
    if reference and importlib.util.find_spec('torchvision') is not None:
        crops = [step for step in steps if isinstance(step, MultiCrop)]
        if not crops:
            raise DenseSSLError(
                'the pipeline has no MultiCrop to compare; measure without a reference'
            )
        tasks.append(torchvision_reference(crops[0].views))
    with pictures(folder, size) as paths:
        rates, counts = _take_turns(tasks, paths, seconds)
    return DataSpeed(rates[0], rates[1] if len(tasks) == 2 else None, counts[0])


def measure(
    pipeline: Pipeline,
    folder: str | os.PathLike[str] | None = None,
    seconds: float = 10.0,
) -> float:
    """Images per second that a pipeline makes of a folder's pictures on one core.

    Arguments and errors are those of :func:`run`.
    """
    return run(pipeline, folder, seconds, reference=False).images_per_second


def parse_size(text: str) -> tuple[int, int]:
    """``(W, H)`` in px of a text such as ``1000x750``.

    Raises:
        DenseSSLError: it is none, or a side is below 16 px.
    """
    sides = text.split('x')
    if len(sides) != 2 or not all(s.isdecimal() and int(s) >= 16 for s in sides):
        raise DenseSSLError(f'--size {text}: give WIDTHxHEIGHT in px, such as 1000x750')
    return int(sides[0]), int(sides[1])


def build_pipeline(config: Pipeline) -> list[Callable]:
    """Build the transforms that a config names, with ``LoadImage`` in front.

    Raises:
        DenseSSLError: the config holds no pipeline.
    """
    if isinstance(config, (str, os.PathLike)):
        if not Path(config).is_file():
            raise DenseSSLError(f"there is no config file '{config}'; check the path")
        config = Config.fromfile(config)
    if isinstance(config, Config):
        config = config.to_dict()
    if isinstance(config, Mapping):
        dataset = (config.get('train_dataloader') or {}).get('dataset', config)
        if 'pipeline' not in dataset:
            raise DenseSSLError(
                'the config has no train_dataloader.dataset.pipeline; name one that has'
            )
        config = dataset['pipeline']
    steps = [
        TRANSFORMS.build(step) if isinstance(step, Mapping) else step for step in config
    ]
    if not steps or not isinstance(steps[0], LoadImage | LoadChannels):
        steps.insert(0, LoadImage())
    return steps


def torchvision_reference(views: Sequence[ViewRecipe]) -> Callable[[str, int], Any]:
    """The same views by Pillow and torchvision, in the usual way.

    Args:
        views: one recipe per view, such as ``MultiCrop.views``.

    Returns:
        A function of a picture's path and a seed that returns the views, one uint8
        tensor ``(3, H, W)`` each. It draws from torch's global generator.

    Raises:
        DenseSSLError: torchvision is not installed.
    """
    if importlib.util.find_spec('torchvision') is None:
        raise DenseSSLError('the reference needs torchvision; pip install torchvision')
    from torchvision import transforms as T

    def blur(recipe: ViewRecipe, picture: Image.Image) -> Image.Image:
        sigma = torch.empty(()).uniform_(*recipe.blur_sigma).item()
        return picture.filter(ImageFilter.GaussianBlur(sigma))

    def compose(recipe: ViewRecipe) -> Callable:
        return T.Compose(
            [
                T.RandomResizedCrop(
                    recipe.size,
                    scale=recipe.scale,
                    ratio=recipe.ratio,
                    interpolation=T.InterpolationMode.BICUBIC,
                ),
                T.RandomHorizontalFlip(recipe.flip),
                T.RandomApply(
                    [T.ColorJitter(*recipe.jitter_strength)], p=recipe.jitter
                ),
                T.RandomGrayscale(recipe.grayscale),
                T.RandomApply(
                    [T.Lambda(lambda picture: blur(recipe, picture))], p=recipe.blur
                ),
                T.RandomSolarize(recipe.solarize_threshold, p=recipe.solarize),
                T.PILToTensor(),
            ]
        )

    transforms = [compose(recipe) for recipe in views]

    def make_views(path: str, seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert('RGB')
        return [transform(picture) for transform in transforms]

    return make_views


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep OpenCV and torch to one thread each; what was set comes back after."""
    opencv_threads, torch_threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(opencv_threads)
        torch.set_num_threads(torch_threads)


def write_noise_jpegs(
    folder: Path, count: int = 32, seed: int = 0, size: tuple[int, int] = (480, 360)
) -> list[Path]:
    """Write JPEGs of coloured noise, its amplitudes ``f ** -1.5``.

    They are as rough as photographs (4 levels from a pixel to the next), and take as
    many bytes (a quarter a pixel).

    Args:
        folder: where to.
        count: how many.
        seed: of the noise.
        size: ``(W, H)`` in px.
    """
    rng = np.random.default_rng(seed)
    width, height = size
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    falloff = np.hypot(rows, columns).clip(1 / max(size)) ** -1.5
    mix = np.array([[1.0, 0.2, 0.1], [1.0, 0.0, -0.1], [1.0, -0.2, 0.1]])
    paths = []
    for number in range(count):
        spectra = np.fft.rfft2(rng.normal(size=(3, height, width))) * falloff
        fields = np.fft.irfft2(spectra, s=(height, width))
        fields /= fields.std(axis=(1, 2), keepdims=True)
        levels = 128 + 55 * np.einsum('ck,khw->hwc', mix, fields)
        paths.append(folder / f'noise_{number:03d}.jpg')
        options = [cv2.IMWRITE_JPEG_QUALITY, 90]
        cv2.imwrite(str(paths[-1]), levels.clip(0, 255).astype(np.uint8), options)
    return paths


@contextmanager
def pictures(
    folder: str | os.PathLike[str] | None, size: tuple[int, int]
) -> Iterator[list[str]]:
    """Paths of the folder's pictures, or of temporary ones of ``size``, ``(W, H)``."""
    with tempfile.TemporaryDirectory() if folder is None else nullcontext() as made:
        if made is not None:
            paths = write_noise_jpegs(Path(made), size=size)
        else:
            files = sorted(Path(folder).rglob('*'))
            paths = [path for path in files if path.suffix[1:].lower() in ENDINGS]
        if not paths:
            raise DenseSSLError(
                f"no picture in '{folder}'; name a folder with pictures"
            )
        yield [str(path) for path in paths]


def sample_maker(steps: Sequence[Callable]) -> Callable[[str, int], Any]:
    """The pipeline as a function of a picture's path and a seed."""

    def make_sample(path: str, seed: int) -> dict[str, Any]:
        results = {'path': path, 'rng': np.random.default_rng(seed)}
        for step in steps:
            results = step(results)
        return results

    return make_sample


def _take_turns(
    tasks: Sequence[Callable[[str, int], Any]], paths: Sequence[str], seconds: float
) -> tuple[list[float], list[int]]:
    """Run the tasks A B A B ...; rates in images per processor second, and counts."""
    counts, spent = [0] * len(tasks), [0.0] * len(tasks)
    # glibc keeps freed memory as large as what was once freed, and hands more back,
    # which costs a fresh picture 2 ms. Workers inherit this from a model's process.
    np.empty(31 << 20, np.uint8)
    with one_thread(), torch.random.fork_rng(devices=[]):
        for task in tasks:  # imports, page cache
            task(paths[0], 0)
        for _ in range(_TURNS):
            for number, task in enumerate(tasks):
                begin = time.process_time()
                end = time.monotonic() + seconds / _TURNS
                while True:
                    seed = counts[number]
                    task(paths[seed % len(paths)], seed)
                    counts[number] += 1
                    if time.monotonic() >= end:
                        break
                spent[number] += time.process_time() - begin
    rates = [count / used for count, used in zip(counts, spent, strict=True)]
    return rates, counts

"""Demo scenes as a COCO data set: pictures, boxes and exact masks, no download."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from densessl.command import run_command
from densessl.errors import DenseSSLError

from .demo_scenes import CLASSES, DemoScenes, Scene

THINGS = CLASSES[6:]  # the first six are stuff, which has no instances


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """A mask in COCO's uncompressed run lengths.

    Args:
        mask: ``(H, W)`` bool.

    Returns:
        ``size`` as ``[H, W]``, and ``counts``: pixels outside, inside, outside, ...
        by turns, down the columns from left to right.
    """
    flat = np.concatenate(([False], mask.T.ravel()))
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate(([0], changes, [mask.size])))
    return dict(size=list(mask.shape), counts=counts.tolist())


def annotations(scene: Scene) -> list[dict[str, Any]]:
    """COCO annotations of a scene's things, less ``id`` and ``image_id``.

    One for each thing that is seen at all; mask and box are those of the visible part.
    Categories count from 1, in the order of ``THINGS``.
    """
    found = []
    for number, label in enumerate(scene.box_labels.tolist()):
        mask = scene.instances == number + 1
        if mask.any():
            found.append(
                dict(
                    category_id=label - len(CLASSES) + len(THINGS) + 1,
                    bbox=scene.boxes[number].tolist(),
                    area=int(mask.sum()),
                    segmentation=run_lengths(mask),
                    iscrowd=0,
                )
            )
    return found


def write_split(root: Path, split: str, scenes: DemoScenes) -> Path:
    """Write ``root/split/NNNNNN.png`` and ``root/annotations/instances_<split>.json``.

    Returns:
        The file of annotations.

    Raises:
        DenseSSLError: the folder cannot be written.
    """
    images, instances = [], []
    target = root / 'annotations' / f'instances_{split}.json'
    try:
        for folder in (root / split, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        for index in range(len(scenes)):
            scene = scenes.scene(index)
            name = f'{index:06d}.png'
            bgr = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
            (root / split / name).write_bytes(cv2.imencode('.png', bgr)[1].tobytes())
            height, width = scene.labels.shape
            images.append(dict(id=index, file_name=name, height=height, width=width))
            for instance in annotations(scene):
                number = len(instances) + 1
                instances.append(dict(id=number, image_id=index, **instance))
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(THINGS)]
        coco = dict(images=images, annotations=instances, categories=categories)
        target.write_text(json.dumps(coco))
    except OSError as error:
        raise DenseSSLError(
            f'cannot write {root}: {error.strerror}; choose another --out'
        ) from error
    return target


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``tools/demo_coco.py``."""
    parser = argparse.ArgumentParser(
        prog='tools/demo_coco.py',
        description='Write demo scenes with boxes and masks, in the layout of COCO.',
    )
    parser.add_argument('--out', default='data/demo_coco', metavar='DIR')
    parser.add_argument('--train', type=int, default=200, help='pictures to train on')
    parser.add_argument('--val', type=int, default=100, help='pictures to validate on')
    parser.add_argument('--size', type=int, default=128, help='side in pixels')
    parser.add_argument(
        '--seed',
        type=int,
        default=1,
        help='of the training scenes; validation has the next one, and pretraining by '
        'configs/quickstart has 0',
    )
    return run_command(_write, parser.parse_args(argv))


def _write(args: argparse.Namespace) -> None:
    for shift, split in enumerate(('train', 'val')):
        scenes = DemoScenes(vars(args)[split], args.size, args.seed + shift)
        print(write_split(Path(args.out), split, scenes))

"""Linear segmentation of CamVid on frozen backbones of runs, and on untrained ones.

python examples/camvid_segmentation.py CAMVID WORK_DIR... [--seed SEED]

CAMVID holds images/{train,val}/*.jpg and annotations/{train,val}/*.png of the same
names, one byte a pixel: classes 0 to 10, and 11 for void.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch

import densessl
from densessl.datasets import read_image
from densessl.evaluation import FeatureExtractor, linear_segmentation
from densessl.interop.backbone import BACKBONE_FILE, read_backbone
from densessl.registry import MODELS

CLASSES = 11
SIZE = (160, 128)  # width and height in px


def samples(camvid: Path, part: str):
    """Pictures ``(128, 160, 3)`` and labels ``(128, 160)``, void as 255."""
    for path in sorted((camvid / 'images' / part).glob('*.jpg')):
        mask = camvid / 'annotations' / part / f'{path.stem}.png'
        labels = cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
        labels = cv2.resize(labels, SIZE, interpolation=cv2.INTER_NEAREST)
        image = cv2.resize(read_image(str(path)), SIZE, interpolation=cv2.INTER_AREA)
        yield image, np.where(labels < CLASSES, labels, 255)


def score(camvid: Path, backbone) -> float:
    """Mean IoU over the 11 classes, in 0..1."""
    extractor = FeatureExtractor(backbone, backbone.mean, backbone.std)
    parts = (list(samples(camvid, part)) for part in ('train', 'val'))
    options = dict(epochs=60, batch_size=20, lr=1.0, train_mask_size=32)
    return linear_segmentation(extractor, *parts, CLASSES, **options).miou


def main() -> None:
    """Print a line for each work dir."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('camvid', type=Path)
    parser.add_argument('work_dirs', type=Path, nargs='+')
    parser.add_argument('--seed', type=int, default=0, help='of the untrained ones')
    args = parser.parse_args()
    for work_dir in args.work_dirs:
        trained = densessl.load_backbone(work_dir / BACKBONE_FILE)
        torch.manual_seed(args.seed)
        fresh = MODELS.build(read_backbone(work_dir / BACKBONE_FILE)[1]['config'])
        fresh.mean, fresh.std = trained.mean, trained.std
        scores = (score(args.camvid, backbone) for backbone in (fresh, trained))
        print('{}: untrained {:.1%}, trained {:.1%}'.format(work_dir, *scores))


if __name__ == '__main__':
    main()

"""Every protocol on the far device and on the CPU, in a process of its own.

Torch must know the device before the first backward pass of a process. Prints a line of
JSON a protocol: its scores on either.
"""

import json
import sys
from pathlib import Path

import torch
from far_device import FarDevice
from planted import CLASSES, write_stripes
from test_correspondence import mosaics
from test_depth import _write as write_depth
from test_image_protocols import SIZE, make_tree
from test_video_segmentation import bands, dataset

from densessl.evaluation import FeatureExtractor
from densessl.registry import EVALUATORS, MODELS

ARCH = dict(embed_dims=16, depth=2, num_heads=2)
MASKS = dict(classes=CLASSES, size=(32, 48))
HEAD = dict(epochs=2, batch_size=5, train_mask_size=24)
DEPTH = dict(size=(32, 48), epochs=2, batch_size=8, train_size=16)
PROTOCOLS = dict(
    knn=dict(type='KNN', ks=[3], **SIZE),
    linear=dict(type='LinearClassification', epochs=2, batch_size=7, **SIZE),
    suite=dict(type='LinearSuite', **SIZE),
    segmentation=dict(type='LinearSegmentationProtocol', head=HEAD, **MASKS),
    localisation=dict(type='Localisation', head=HEAD, **MASKS),
    kmeans=dict(type='KMeansSegmentation', restarts=2, **MASKS),
    video=dict(type='VideoSegmentation', year=2017, height=48),
    correspondence=dict(type='Correspondence', resize=32, crop=32),
    depth=dict(type='DepthEstimation', **DEPTH),
    depth_dpt=dict(type='DepthEstimation', head='dpt', **DEPTH),
)


def main(folder: Path) -> None:
    FarDevice()
    data = dict.fromkeys(('knn', 'linear', 'suite'), folder / 'tree')
    make_tree(folder / 'tree', train=4, val=2)
    masks = write_stripes(folder / 'masks', train=6, val=3)
    data |= dict.fromkeys(('segmentation', 'localisation', 'kmeans'), masks)
    data['video'] = dataset(folder / 'davis', [bands(8 * i) for i in range(3)], 2017)
    data['correspondence'] = mosaics(folder / 'mosaics', 3)
    depth = write_depth(folder / 'depth', train=6, val=3)
    data |= dict.fromkeys(('depth', 'depth_dpt'), depth)
    out = folder / 'out'
    out.mkdir()
    for name, protocol in PROTOCOLS.items():
        scores = dict(cpu=run(protocol, data[name], out, 'cpu'))
        with FarDevice():
            scores['far'] = run(protocol, data[name], out, 'far')
        print(json.dumps(dict(protocol=name, scores=scores)))


def run(protocol: dict, data: Path, out: Path, device: str) -> dict[str, float]:
    """Scores of a small ViT."""
    torch.manual_seed(0)
    backbone = dict(type='VisionTransformer', arch=ARCH, patch_size=8, img_size=32)
    door = FeatureExtractor(
        MODELS.build(backbone), [128] * 3, [64] * 3, device, batch_size=4, layers=2
    )
    return EVALUATORS.build(protocol).run(door, data, out).metrics


if __name__ == '__main__':
    main(Path(sys.argv[1]))

"""A backbone trained on CamVid's labels: stands in for good public weights.

python examples/camvid_supervised.py CAMVID CONFIG OUT [--epochs 40] [--seed 0]

CAMVID as in camvid_segmentation.py; the backbone is that of a training config, and
OUT the file for --init-from.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from camvid_segmentation import CLASSES, samples
from mmengine.config import Config
from torch import nn

from densessl.interop import save_backbone
from densessl.registry import MODELS

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
BATCH = 16


def main() -> None:
    """Train by cross-entropy of every patch's pixels, then save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('camvid', type=Path)
    parser.add_argument('config')
    parser.add_argument('out', type=Path)
    parser.add_argument('--epochs', type=int, default=40)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images, labels = map(np.stack, zip(*samples(args.camvid, 'train'), strict=True))
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    images = (images - mean) / std
    labels = torch.from_numpy(labels).long()

    config = Config.fromfile(args.config).model.backbone
    backbone = MODELS.build(config)
    head = nn.Linear(backbone.embed_dims, CLASSES)
    parameters = [*backbone.parameters(), *head.parameters()]
    steps = args.epochs * max(1, len(images) // BATCH)
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.04)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    for step in range(steps):
        chosen = torch.randperm(len(images))[:BATCH]
        batch, target = images[chosen], labels[chosen]
        if step % 2:
            batch, target = batch.flip(-1), target.flip(-1)
        tokens = backbone(batch)
        logits = head(tokens.patches).mT.unflatten(-1, tokens.grid)
        logits = F.interpolate(logits, target.shape[1:], mode='bilinear')
        loss = F.cross_entropy(logits, target, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f'step {step} of {steps}: loss {loss:.3f}')
    save_backbone(args.out, backbone, config.to_dict(), mean=MEAN, std=STD)


if __name__ == '__main__':
    main()

"""What several tests share: a small model, views, and runs of the trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from densessl.engine.optim import TwoGroupConstructor
from densessl.geometry import ViewGeometry
from densessl.registry import MODELS

ROOT = Path(__file__).parent.parent


def model_config(**options) -> dict:
    """SelfPatch and view head on a ViT of 2 blocks, patch 8; all small."""
    return (
        dict(
            type='SelfDistillation',
            backbone=dict(
                type='VisionTransformer',
                arch=dict(embed_dims=32, depth=2, num_heads=2),
                patch_size=8,
                img_size=32,
                cls_token=False,
                final_norm=False,
            ),
            neck=dict(type='ClassAttentionNeck', num_heads=2),
            heads=dict(
                view=dict(
                    type='ViewHead',
                    out_dims=64,
                    center_views='all',
                    projector=dict(hidden_dims=48, bottleneck_dims=16),
                ),
                selfpatch=dict(
                    type='SelfPatchHead',
                    out_dims=32,
                    projector=dict(hidden_dims=48, bottleneck_dims=16),
                ),
            ),
        )
        | options
    )


def region_config(matching='geometric', **options) -> dict:
    """The same network with a view and a region head."""
    projector = dict(hidden_dims=48, bottleneck_dims=16, norm_last_layer=False)
    head = dict(out_dims=40, projector=projector)
    heads = dict(
        view=dict(type='ViewHead', **head),
        region=dict(type='RegionHead', matching=matching, **head),
    )
    return (
        dict(heads=heads, neck=dict(type='AveragePoolNeck'), average_losses=True)
        | options
    )


def loca_config(**options) -> dict:
    """The same network with LOCA's heads: the two 32 px views are the references."""
    roles = dict(reference_role='global', query_roles=['global', 'local'])
    projector = dict(hidden_dims=48, bottleneck_dims=16)
    heads = dict(
        position=dict(type='PositionHead', grid=4, mask_ratio=0.5, **roles),
        cluster=dict(type='ClusterHead', out_dims=40, projector=projector, **roles),
    )
    drop = dict(local=dict(type='PatchDrop', keep=5))
    return dict(heads=heads, neck=dict(type='AveragePoolNeck'), drop=drop) | options


def point_config(**options) -> dict:
    """The same network with a class token, a view head and reference points."""
    projector = dict(hidden_dims=48, bottleneck_dims=16)
    head = dict(loss_weight=0.5, projector=projector)
    backbone = model_config()['backbone'] | dict(cls_token=True, final_norm=True)
    heads = dict(
        view=dict(type='ViewHead', out_dims=64, **head),
        points=dict(type='PointHead', out_dims=40, **head, **options),
    )
    return dict(backbone=backbone, neck=dict(type='ClassTokenNeck'), heads=heads)


def moby_config(patch: dict | None = None, **options) -> dict:
    """The same network with MoBY's view head and SelfPatch on it."""
    head = dict(out_dims=16, hidden_dims=24)
    heads = dict(
        view=dict(type='ContrastiveHead', queue_length=10, **head),
        selfpatch=dict(type='ContrastiveSelfPatchHead', **head) | (patch or {}),
    )
    return dict(heads=heads, teacher_momentum=0.99) | options


def build_model(seed: int = 0, **options):
    torch.manual_seed(seed)
    return MODELS.build(model_config(**options))


def optim_wrapper(
    model,
    lr: float = 1e-2,
    max_norm: float = 3.0,
    kind: str = 'AdamW',
    precision: str = 'auto',
):
    return TwoGroupConstructor(
        dict(
            precision=precision,
            optimizer=dict(type=kind, lr=lr, weight_decay=0.04),
            clip_grad=dict(type='each', max_norm=max_norm),
        )
    )(model)


def keep_gradients(model, wrapper) -> dict[str, torch.Tensor]:
    """Copies of the gradients by name, unclipped, made at each of its steps."""
    grads, step = {}, wrapper.step

    def keep():
        named = model.named_parameters()
        grads.update({n: p.grad.clone() for n, p in named if p.grad is not None})
        step()

    wrapper.step = keep
    return grads


@pytest.fixture
def double():
    """Float64 by default."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def views(batch: int = 4, seed: int = 0) -> dict:
    """A batch as the collate function gives it: 2 x 32 and 3 x 24 pixels."""
    g = torch.Generator().manual_seed(seed)

    def draw(count: int, size: int):
        shape = (batch, count, 3, size, size)
        return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)

    return dict(
        inputs={'global': draw(2, 32), 'local': draw(3, 24)},
        geometry=view_geometry(batch, g),
        paths=[f'{i}.jpg' for i in range(batch)],
        broken=[],
    )


def view_geometry(batch: int, generator: torch.Generator) -> ViewGeometry:
    """Where 2 x 32 and 3 x 24 pixel views lie in pictures of 100 x 80."""
    extent = 20 + 40 * torch.rand(batch, 5, 2, generator=generator).double()
    room = torch.tensor([100.0, 80.0]).double() - extent
    start = room * torch.rand(batch, 5, 2, generator=generator)
    size = torch.tensor([32, 32, 24, 24, 24])[:, None].expand(batch, 5, 2)
    return ViewGeometry(
        torch.cat([start, extent], -1),
        torch.rand(batch, 5, generator=generator) < 0.5,
        size,
        torch.tensor([80, 100]).expand(batch, 5, 2),
    )


def train(*arguments, check: bool = True, **options) -> subprocess.CompletedProcess:
    """``tools/train.py`` in a process of its own."""
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, str(ROOT / 'tools/train.py'), *map(str, arguments)]
    result = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=600, **options
    )
    if check and result.returncode:
        raise AssertionError(f'exit {result.returncode}:\n{result.stderr[-4000:]}')
    return result


@pytest.fixture
def small_config(tmp_path) -> Path:
    """A config whose run takes seconds: 3 epochs of 4 steps on 16 demo scenes."""
    path = tmp_path / 'small.py'
    path.write_text(
        f"""
_base_ = ['{ROOT}/configs/quickstart/selfpatch_vit-t8_demo.py']
model = dict(
    backbone=dict(
        arch=dict(embed_dims=32, depth=2, num_heads=2), img_size=32, drop_path_rate=0.2
    ),
    neck=dict(num_heads=2),
    heads=dict(
        view=dict(out_dims=64, projector=dict(hidden_dims=32, bottleneck_dims=16)),
        selfpatch=dict(out_dims=32, projector=dict(hidden_dims=32, bottleneck_dims=16)),
    ),
)
_views = [
    dict(role='global', count=2, size=32, scale=(0.25, 1.0), blur=0.5),
    dict(role='local', count=2, size=24, scale=(0.05, 0.25)),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    sampler=dict(length=16),
    dataset=dict(
        length=16, size=48, pipeline=[dict(type='MultiCrop', views=_views)]
    ),
)
train_cfg = dict(max_epochs=3)
default_hooks = dict(
    logger=dict(interval=1),
    health=dict(interval=1),
    checkpoint=dict(interval=1, keep=0),
    report=dict(probe=False, size=48, pictures=2),
)
"""
    )
    return path

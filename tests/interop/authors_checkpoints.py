"""Whole checkpoints of every layout, and what the tests of imports share."""

import torch
from authors_files import (
    Draw,
    ca_head,
    cvt,
    densedino_vit,
    dino_head,
    flax_loca,
    moby_mlp,
    named,
    selfpatch_vit,
    swin,
    training,
    vit,
)

from densessl.interop.authors import export_checkpoint, import_checkpoint
from densessl.interop.authors.reading import flatten
from densessl.registry import MODELS

# width, depth, patch, side of the table of positions
VITS = [(32, 1, 8, 4), (64, 3, 16, 3), (128, 2, 4, 6)]
# width, depths, heads, windows, side of the first map
SWINS = [
    (16, [1, 2, 1, 1], [1, 1, 2, 4], [2, 2, 2, 2], 16),
    (32, [2, 1, 2, 2], [2, 4, 4, 8], [4, 4, 4, 2], 16),
]
PROJECTOR = dict(hidden_dims=48, bottleneck_dims=16)


def vit_config(width, depth, patch, side, **options) -> dict:
    arch = dict(embed_dims=width, depth=depth, num_heads=max(1, width // 64))
    return dict(
        type='VisionTransformer',
        arch=arch,
        patch_size=patch,
        img_size=side * patch,
        **(dict(cls_token=True, final_norm=True) | options),
    )


def swin_config(width, depths, heads, windows, side) -> dict:
    arch = dict(embed_dims=width, depths=depths, num_heads=heads)
    one = len(set(windows)) == 1
    return dict(
        type='SwinTransformer',
        arch=arch,
        window_size=windows[0] if one else windows,
        img_size=4 * side,
    )


def algorithm(backbone, neck, **heads):
    """Our model for a method, to be loaded strictly."""
    return MODELS.build(
        dict(type='SelfDistillation', backbone=backbone, neck=neck, heads=heads)
    )


def view_head(**options) -> dict:
    return dict(type='ViewHead', out_dims=20, projector=PROJECTOR, **options)


def dino_file(draw: Draw, sizes, network=vit) -> dict:
    def branch():
        return {
            **named('backbone', network(draw, *sizes)),
            **named('head', dino_head(draw, sizes[0], 20)),
        }

    return training(branch(), branch(), dict(center=draw(1, 20)))


def selfpatch_file(draw: Draw, sizes) -> dict:
    def branch():
        return {
            **named('backbone', selfpatch_vit(draw, *sizes)),
            **named('ca_head', ca_head(draw, sizes[0])),
            **named('c_head', dino_head(draw, sizes[0], 20)),
            **named('p_head', dino_head(draw, sizes[0], 12)),
        }

    centers = dict(center=draw(1, 1, 20), patch_center=draw(1, 12))
    return training(branch(), branch(), centers)


def densedino_file(draw: Draw, sizes) -> dict:
    def branch():
        return {
            **named('backbone', densedino_vit(draw, *sizes)),
            **named('head', dino_head(draw, sizes[0], 20)),
            **named('ref_head', dino_head(draw, sizes[0], 20)),
        }

    centers = dict(center=draw(1, 20), ref_center=draw(1, 20))
    return training(branch(), branch(), centers)


def esvit_file(draw: Draw, sizes, network=swin) -> dict:
    width = sizes[0][-1] if network is cvt else sizes[0] * (8 if network is swin else 1)

    def branch():
        return {
            **network(draw, *sizes),
            **named('head', dino_head(draw, width, 20)),
            **named('head_dense', dino_head(draw, width, 20)),
        }

    centers = dict(center=draw(1, 20), center_grid=draw(1, 20))
    return training(branch(), branch(), centers)


def moby_file(draw: Draw, sizes, network=swin) -> dict:
    width = 8 * sizes[0] if network is swin else sizes[0]
    model = {
        **named('encoder', network(draw, *sizes)),
        **named('encoder_k', network(draw, *sizes)),
        **named('projector', moby_mlp(draw, width, 24, 10)),
        **named('projector_k', moby_mlp(draw, width, 24, 10)),
        **named('predictor', moby_mlp(draw, 10, 24, 10)),
        'queue1': draw(10, 30),
        'queue2': draw(10, 30),
        'queue_ptr': torch.tensor([12]),
    }
    return dict(model=model, optimizer={}, lr_scheduler={}, max_accuracy=0.0, epoch=9)


def loca_file(draw: Draw, sizes, heads: int) -> dict:
    return dict(
        params=flax_loca(draw, *sizes, heads), ema_params=flax_loca(draw, *sizes, heads)
    )


def dinov2_file(draw: Draw, sizes, registers: int = 0, gated: bool = False) -> dict:
    width, depth = sizes[:2]
    out = vit(draw, *sizes) | dict(mask_token=draw(1, width))
    for i in range(depth):
        out[f'blocks.{i}.ls1.gamma'] = draw(width)
        out[f'blocks.{i}.ls2.gamma'] = draw(width)
        if gated:
            for layer in ('fc1', 'fc2'):
                for leaf in ('weight', 'bias'):
                    del out[f'blocks.{i}.mlp.{layer}.{leaf}']
            out |= draw.linear(f'blocks.{i}.mlp.w12', width, 8 * width)
            out |= draw.linear(f'blocks.{i}.mlp.w3', 4 * width, width)
    if registers:
        out['register_tokens'] = draw(1, registers, width)
    return out


def mmpretrain_vit(weights: dict) -> dict:
    names = [
        ('patch_embed.proj', 'patch_embed.projection'),
        ('blocks.', 'layers.'),
        ('norm1', 'ln1'),
        ('norm2', 'ln2'),
        ('mlp.fc1', 'ffn.layers.0.0'),
        ('mlp.fc2', 'ffn.layers.1'),
    ]
    out = {}
    for name, value in weights.items():
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        out[f'backbone.{name.replace("norm.", "ln1.")}'] = value
    return out


def save(tmp_path, checkpoint, name='file.pth'):
    path = tmp_path / name
    torch.save(checkpoint, path)
    return path


def assert_same(one: dict, other: dict) -> None:
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def weights_alone(checkpoint: dict) -> dict:
    """Tensors of a file, without what follows from sizes."""
    return {
        name: value
        for name, value in flatten(checkpoint).items()
        if not name.endswith(('relative_position_index', 'attn_mask', 'rel_pos_idx'))
    }


def whole_cycle(tmp_path, checkpoint: dict, layout: str, model=None):
    """Import; load strictly; export gives the file again, and import that the same."""
    imported = import_checkpoint(save(tmp_path, checkpoint), layout)
    if model is not None:
        model.load_state_dict(imported.state, strict=True)
    exported = export_checkpoint(imported.state, imported.config, layout)
    kept = {key: checkpoint[key] for key in exported if key in checkpoint}
    assert_same(weights_alone(exported), weights_alone(kept))
    again = import_checkpoint(save(tmp_path, exported, 'again.pth'), layout)
    assert_same(again.state, imported.state)
    assert again.config == imported.config
    return imported


def load(path, layout: str):
    """Imported file, and its teacher's backbone in eval mode."""
    imported = import_checkpoint(path, layout)
    backbone = MODELS.build(imported.config).eval()
    backbone.load_state_dict(part(imported, 'teacher.backbone.'))
    return imported, backbone


def part(imported, prefix: str) -> dict:
    return {
        name.removeprefix(prefix): value
        for name, value in imported.state.items()
        if name.startswith(prefix)
    }


def images(side: int, count: int = 2) -> torch.Tensor:
    return Draw(99)(count, 3, side, side) * 5


def assert_near(ours, theirs):
    """Within 1e-4 of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()

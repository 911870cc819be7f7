"""Backbones alone: of DINOv2, timm and MMPretrain, and of authors."""

import pytest
from authors_checkpoints import (
    SWINS,
    VITS,
    assert_same,
    dinov2_file,
    mmpretrain_vit,
    save,
    swin_config,
    vit_config,
)
from authors_files import (
    Draw,
    dino_head,
    named,
    resnet,
    swin,
    vit,
)

from densessl.interop.authors import export_checkpoint, import_checkpoint


@pytest.mark.parametrize('registers', [0, 4, 2])
@pytest.mark.parametrize('gated', [False, True])
def test_dinov2(tmp_path, registers, gated):
    sizes = (64, 2, 14, 3)
    checkpoint = dinov2_file(Draw(7), sizes, registers, gated)
    imported = import_checkpoint(save(tmp_path, checkpoint), 'dinov2')
    exported = export_checkpoint(imported.state, imported.config, 'dinov2')
    again = import_checkpoint(save(tmp_path, exported), 'dinov2')
    assert_same(again.state, imported.state)
    assert set(exported) == set(checkpoint)

    chunked = {  # as its training writes: chunks of blocks, projectors beside
        'backbone.' + name.replace('blocks.', 'blocks.0.'): value
        for name, value in checkpoint.items()
    }
    chunked |= named('dino_head', dino_head(Draw(0), 64, 20))
    chunked |= named('ibot_head', dino_head(Draw(0), 64, 20))
    other = import_checkpoint(save(tmp_path, dict(teacher=chunked)), 'dinov2')
    assert_same(other.state, imported.state)
    assert any('projectors of DINOv2' in note for note in other.notes)


@pytest.mark.parametrize('sizes', VITS)
def test_flat_vit_files(tmp_path, sizes):
    """A backbone alone: of DINO, of timm with a classifier, of MMPretrain."""
    draw = Draw(8)
    weights = vit(draw, *sizes)
    dino = import_checkpoint(save(tmp_path, weights), 'dino')
    assert_same(
        {k: v for k, v in dino.state.items() if k.startswith('teacher.')},
        named('teacher.backbone', weights),
    )
    assert_same(
        named(
            'teacher',
            {k: v for k, v in dino.state.items() if not k.startswith('teacher.')},
        ),
        named('teacher.backbone', weights),
    )
    classifier = draw.linear('head', sizes[0], 10)
    timm = import_checkpoint(save(tmp_path, dict(model=weights | classifier)), 'timm')
    assert_same(timm.state, dino.state)
    assert timm.config == dino.config == vit_config(*sizes)
    mm = mmpretrain_vit(weights) | named('head.layers', classifier)
    mm = import_checkpoint(save(tmp_path, dict(meta={}, state_dict=mm)), 'mmpretrain')
    assert_same(mm.state, dino.state)
    for layout in ('timm', 'mmpretrain'):
        exported = export_checkpoint(dino.state, dino.config, layout)
        back = import_checkpoint(save(tmp_path, exported), layout)
        assert_same(back.state, dino.state)


@pytest.mark.parametrize('sizes', SWINS)
def test_flat_swin_files(tmp_path, sizes):
    weights = swin(Draw(9), *sizes)
    official = import_checkpoint(save(tmp_path, dict(model=weights)), 'timm')
    moved = {}
    for name, value in weights.items():
        if not name.endswith(('attn_mask', 'relative_position_index')):
            for stage in (2, 1, 0):
                old = f'layers.{stage}.downsample'
                name = (
                    name.replace(old, f'layers.{stage + 1}.downsample')
                    if name.startswith(old)
                    else name
                )
            moved[name] = value
    new = import_checkpoint(save(tmp_path, moved), 'timm')
    assert_same(new.state, official.state)
    esvit = import_checkpoint(save(tmp_path, weights), 'esvit')
    assert_same(esvit.state, official.state)
    moby = import_checkpoint(save(tmp_path, dict(model=weights)), 'moby')
    assert_same(moby.state, official.state)
    for layout in ('timm', 'mmpretrain'):
        exported = export_checkpoint(new.state, new.config, layout)
        back = import_checkpoint(save(tmp_path, exported), layout)
        assert_same(back.state, new.state)
        assert back.config == new.config == swin_config(*sizes)


def test_flat_resnet_files(tmp_path):
    draw = Draw(10)
    weights = resnet(draw, [1, 1, 1, 1]) | draw.linear('fc', 2048, 10)
    timm = import_checkpoint(save(tmp_path, weights), 'timm')
    mm = import_checkpoint(
        save(tmp_path, dict(state_dict=named('backbone', weights))), 'mmpretrain'
    )
    assert_same(mm.state, timm.state)
    exported = export_checkpoint(mm.state, mm.config, 'mmpretrain')
    assert_same(
        import_checkpoint(save(tmp_path, exported), 'mmpretrain').state, mm.state
    )

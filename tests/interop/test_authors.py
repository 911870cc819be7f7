"""Authors' training states in: every weight in its place, and out again."""

import pytest
import torch
from authors_checkpoints import (
    PROJECTOR,
    SWINS,
    VITS,
    algorithm,
    assert_same,
    densedino_file,
    dino_file,
    esvit_file,
    moby_file,
    save,
    selfpatch_file,
    swin_config,
    view_head,
    vit_config,
    whole_cycle,
)
from authors_files import (
    Draw,
    cvt,
    named,
    resnet,
    vit,
)

from densessl.interop import read_weights
from densessl.interop.authors import import_checkpoint
from densessl.interop.authors.architecture import backbone_config
from densessl.registry import MODELS


@pytest.mark.parametrize('sizes', VITS)
def test_dino(tmp_path, sizes):
    checkpoint = dino_file(Draw(0), sizes)
    config = vit_config(*sizes)
    model = algorithm(config, dict(type='ClassTokenNeck'), view=view_head())
    imported = whole_cycle(tmp_path, checkpoint, 'dino', model)
    assert imported.config == config
    state, student = imported.state, checkpoint['student']
    for ours, theirs in (
        ('backbone.blocks.0.attn.qkv.weight', 'backbone.blocks.0.attn.qkv.weight'),
        ('backbone.pos_embed', 'backbone.pos_embed'),
        ('projectors.view.mlp.2.bias', 'head.mlp.2.bias'),
        ('projectors.view.last_layer.weight_g', 'head.last_layer.weight_g'),
    ):
        assert torch.equal(state[ours], student[f'module.{theirs}'])
        assert torch.equal(state[f'teacher.{ours}'], checkpoint['teacher'][theirs])
    center = checkpoint['dino_loss']['center']
    assert torch.equal(state['heads.view.center'], center[0])
    assert 'left out: optimizer, epoch, args, fp16_scaler' in imported.notes
    assert 'taken: student and teacher' in imported.notes
    assert imported.mean == (123.675, 116.28, 103.53)


def test_dino_resnet(tmp_path):
    def network(draw, width, *blocks):
        return resnet(draw, blocks)

    checkpoint = dino_file(Draw(0), (2048, 1, 1, 1, 2), network)
    config = dict(type='TimmBackbone', name='resnet50', layers=[1, 1, 1, 2])
    model = algorithm(config, dict(type='AveragePoolNeck'), view=view_head())
    imported = whole_cycle(tmp_path, checkpoint, 'dino', model)
    assert imported.config == config


@pytest.mark.parametrize('sizes', VITS)
def test_selfpatch(tmp_path, sizes):
    checkpoint = selfpatch_file(Draw(1), sizes)
    config = vit_config(*sizes, cls_token=False, final_norm=False)
    heads = dict(
        view=view_head(center_views='all'),
        selfpatch=dict(type='SelfPatchHead', out_dims=12, projector=PROJECTOR),
    )
    model = algorithm(config, dict(type='ClassAttentionNeck'), **heads)
    imported = whole_cycle(tmp_path, checkpoint, 'selfpatch', model)
    assert imported.config == config
    state, teacher = imported.state, checkpoint['teacher']
    kv = [teacher[f'ca_head.cls_blocks.1.attn.{part}.weight'] for part in 'kv']
    assert torch.equal(state['teacher.neck.blocks.1.kv.weight'], torch.cat(kv))
    assert torch.equal(state['teacher.neck.token'], teacher['ca_head.cls_token'])
    centers = checkpoint['dino_loss']
    assert torch.equal(state['heads.view.center'], centers['center'].flatten())
    patch_center = centers['patch_center'].flatten()
    assert torch.equal(state['heads.selfpatch.center'], patch_center)
    assert 'taken: projectors selfpatch (12), view (20)' in imported.notes


@pytest.mark.parametrize('layout', ['esvit', 'glsd'])
@pytest.mark.parametrize('sizes', SWINS)
def test_esvit_swin(tmp_path, sizes, layout):
    checkpoint = esvit_file(Draw(2), sizes)
    config = swin_config(*sizes)
    region = dict(type='RegionHead', out_dims=20, projector=PROJECTOR)
    neck = dict(type='AveragePoolNeck')
    model = algorithm(config, neck, view=view_head(), region=region)
    imported = whole_cycle(tmp_path, checkpoint, layout, model)
    assert imported.config == config
    centers = checkpoint['dino_loss']
    assert torch.equal(imported.state['heads.region.center'], centers['center_grid'][0])
    name = 'projectors.region.mlp.0.weight'
    ours, theirs = imported.state[name], checkpoint['student']
    assert torch.equal(ours, theirs['module.head_dense.mlp.0.weight'])


def test_esvit_view_task_alone(tmp_path):
    checkpoint = esvit_file(Draw(2), SWINS[0])
    for part in ('student', 'teacher'):
        weights = checkpoint[part].items()
        checkpoint[part] = {k: v for k, v in weights if 'head_dense' not in k}
    del checkpoint['dino_loss']['center_grid']
    imported = whole_cycle(tmp_path, checkpoint, 'esvit')
    assert not any('region' in name for name in imported.state)
    lacks = 'not in the file, starts anew: projectors.region, heads.region.center'
    assert lacks in imported.notes


def test_esvit_vit_and_cvt(tmp_path):
    checkpoint = esvit_file(Draw(3), VITS[1], vit)
    imported = whole_cycle(tmp_path, checkpoint, 'esvit')
    assert imported.config == vit_config(*VITS[1], pos_embed_offset=0.0)
    sizes = ([16, 32], [1, 2], [1, 2], 3)
    checkpoint = esvit_file(Draw(3), sizes, cvt)
    imported = whole_cycle(tmp_path, checkpoint, 'esvit')
    arch = dict(embed_dims=[16, 32], depths=[1, 2], num_heads=[1, 2])
    assert imported.config == dict(type='CvT', arch=arch, window_size=3)
    assert any('GELU' in note for note in imported.notes)


def test_esvit_resnet(tmp_path):
    """There the backbone is behind a prefix, as in DINO's files."""

    def network(draw, width):
        return named('backbone', resnet(draw, [1, 1, 1, 1]))

    checkpoint = esvit_file(Draw(3), (2048,), network)
    imported = whole_cycle(tmp_path, checkpoint, 'esvit')
    assert imported.config['type'] == 'TimmBackbone'


@pytest.mark.parametrize('sizes', VITS)
def test_densedino(tmp_path, sizes):
    checkpoint = densedino_file(Draw(4), sizes)
    config = vit_config(*sizes)
    points = dict(type='PointHead', out_dims=20, projector=PROJECTOR, content=True)
    neck = dict(type='ClassTokenNeck')
    model = algorithm(config, neck, view=view_head(), points=points)
    imported = whole_cycle(tmp_path, checkpoint, 'densedino', model)
    assert imported.config == config
    state, teacher = imported.state, checkpoint['teacher']
    table = [teacher[f'backbone.{part}_pos_embed'] for part in ('cls', 'patch')]
    assert torch.equal(state['teacher.backbone.pos_embed'], torch.cat(table, 1))
    token = teacher['backbone.ref_learn_token'].flatten()
    assert torch.equal(state['teacher.projectors.points.content'], token)


def test_densedino_without_class_token(tmp_path):
    checkpoint = densedino_file(Draw(4), VITS[0])
    for part in ('student', 'teacher'):
        weights = checkpoint[part].items()
        checkpoint[part] = {
            name: value
            for name, value in weights
            if not name.endswith(('cls_token', 'cls_pos_embed', 'ref_learn_token'))
        }
    imported = whole_cycle(tmp_path, checkpoint, 'densedino')
    assert imported.config['cls_token'] is False


@pytest.mark.parametrize('sizes', SWINS)
def test_moby(tmp_path, sizes):
    checkpoint = moby_file(Draw(5), sizes)
    view = dict(type='ContrastiveHead', out_dims=10, hidden_dims=24, queue_length=30)
    config = swin_config(*sizes)
    model = algorithm(config, dict(type='AveragePoolNeck'), view=view)
    imported = whole_cycle(tmp_path, checkpoint, 'moby', model)
    assert imported.config == config
    state, theirs = imported.state, checkpoint['model']
    assert torch.equal(state['heads.view.queue'][1, 3], theirs['queue2'][:, 3])
    assert int(state['heads.view.enqueued']) % 30 == 12
    name = 'projectors.view.3.weight'
    assert torch.equal(
        state[f'teacher.{name}'], theirs['projector_k.linear_out.weight']
    )


def test_moby_vit(tmp_path):
    imported = whole_cycle(tmp_path, moby_file(Draw(5), VITS[2], vit), 'moby')
    assert imported.config == vit_config(*VITS[2])


def test_saved_weights_are_what_was_imported(tmp_path):
    checkpoint = selfpatch_file(Draw(1), VITS[0])
    imported = import_checkpoint(save(tmp_path, checkpoint), 'selfpatch')
    path = tmp_path / 'weights.safetensors'
    imported.save(path, 'selfpatch: file.pth')
    state, about = read_weights(path)
    assert_same(state, imported.state)
    assert about['config'] == imported.config
    assert tuple(about['std']) == imported.std


def test_known_sizes_are_named():
    for name, heads in (('tiny', 3), ('huge', 16)):
        config = dict(type='VisionTransformer', arch=name, patch_size=16)
        with torch.device('meta'):
            state = MODELS.build(config).state_dict()
        found, told = backbone_config(state)
        assert found['arch'] == name
        assert told == f'{heads} heads, which no shape tells'
    state = MODELS.build(dict(type='SwinTransformer', arch='tiny')).state_dict()
    found, _ = backbone_config(state)
    assert found['arch'] == 'tiny'
    assert found['img_size'] == 224 and found['window_size'] == 7

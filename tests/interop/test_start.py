"""A new run from weights of several kinds, part by part."""

from __future__ import annotations

import pytest
import torch

from densessl.engine.start import start_from
from densessl.errors import DenseSSLError
from densessl.interop import read_backbone, read_weights, save_backbone, save_weights
from densessl.registry import MODELS

BACKBONE = dict(
    type='VisionTransformer',
    arch=dict(embed_dims=24, depth=2, num_heads=3),
    patch_size=8,
    img_size=32,
)
STATISTICS = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])


def model(seed: int, heads=('view', 'region'), neck='ClassTokenNeck', out_dims=16):
    torch.manual_seed(seed)
    head = dict(out_dims=out_dims, projector=dict(hidden_dims=16, bottleneck_dims=8))
    kinds = dict(view='ViewHead', region='RegionHead', more='ViewHead')
    built = MODELS.build(
        dict(
            type='SelfDistillation',
            backbone=BACKBONE,
            neck=dict(type=neck),
            heads={
                name: dict(head, type=kinds[name])
                | (dict(matching='similarity') if name == 'region' else {})
                for name in heads
            },
        )
    )
    for parameter in built.teacher.parameters():  # not the student's
        parameter.data += 0.5
    for name in built.heads:
        built.heads[name].center.normal_()
    return built


def save(path, state):
    save_weights(path, state, BACKBONE, **STATISTICS, source='a test')
    return str(path)


def assert_equal(found, expected, prefix=''):
    keys = [key for key in expected if key.startswith(prefix)]
    assert keys
    for key in keys:
        assert torch.equal(found[key], expected[key]), key


def test_everything_a_file_holds_is_loaded(tmp_path):
    source = model(0)
    path = save(tmp_path / 'w.safetensors', source.state_dict())
    target = model(1)
    lines = start_from(target, path)
    assert_equal(target.state_dict(), source.state_dict())
    assert 'a test' in lines[0] and 'projector region (student and teacher)' in lines[0]
    assert len(lines) == 1  # nothing anew, nothing left


def test_a_head_the_file_lacks_starts_anew(tmp_path):
    source, target = model(0), model(1, heads=('view', 'more'))
    before = {k: v.clone() for k, v in target.state_dict().items()}
    path = save(tmp_path / 'w.safetensors', source.state_dict())
    lines = start_from(target, path)
    after = target.state_dict()
    assert_equal(after, source.state_dict(), 'projectors.view.')
    assert_equal(after, before, 'projectors.more.')
    assert_equal(after, before, 'teacher.projectors.more.')
    assert_equal(after, before, 'heads.more.')
    assert 'starting anew: projector more, state of head more' in lines
    assert lines[-1].startswith('in the file and not used:')
    assert 'projectors.region' in lines[-1]


def test_a_backbone_alone_serves_both_branches(tmp_path):
    source, target = model(0), model(1)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    path = tmp_path / 'backbone.safetensors'
    save_backbone(path, source.teacher.backbone, BACKBONE, **STATISTICS, steps=3)
    lines = start_from(target, str(path))
    teacher = source.teacher.backbone.state_dict()
    assert_equal(target.backbone.state_dict(), teacher)
    assert_equal(target.teacher.backbone.state_dict(), teacher)
    assert_equal(target.state_dict(), before, 'projectors.')
    assert 'the backbone (one network)' in lines[0]
    assert lines[1].startswith('starting anew: projector view, projector region')


def test_a_part_that_does_not_fit_is_refused(tmp_path):
    path = save(tmp_path / 'w.safetensors', model(0).state_dict())
    with pytest.raises(DenseSSLError, match=r'projector view, is of another archit'):
        start_from(model(1, out_dims=32), path)
    torn = model(0).state_dict()
    del torn['teacher.backbone.blocks.1.norm1.weight']
    path = save(tmp_path / 'torn.safetensors', torn)
    with pytest.raises(DenseSSLError, match=r'1 missing \(blocks\.1\.norm1\.weight'):
        start_from(model(1), path)


def test_a_run_is_refused(tmp_path):
    with pytest.raises(DenseSSLError, match='checkpoint of a run'):
        start_from(model(0), str(tmp_path / 'step_00000001.pth'))


def test_one_network_is_written_for_two(tmp_path):
    teacher = model(0).teacher.backbone.state_dict()
    both = {f'{b}backbone.{k}': v for k, v in teacher.items() for b in ('', 'teacher.')}
    state, _ = read_weights(save(tmp_path / 'w.safetensors', both))
    assert state.keys() == both.keys()
    assert_equal(state, both)


def test_weights_are_read_as_they_were_written(tmp_path):
    source = model(0).state_dict()
    path = save(tmp_path / 'w.safetensors', source)
    state, about = read_weights(path)
    assert state.keys() == source.keys()
    assert_equal(state, source)
    assert about['config'] == BACKBONE and about['source'] == 'a test'
    assert dict(mean=about['mean'], std=about['std']) == STATISTICS
    backbone, _ = read_backbone(path)
    prefix = 'teacher.backbone.'
    expected = {
        k.removeprefix(prefix): v for k, v in source.items() if k.startswith(prefix)
    }
    assert backbone.keys() == expected.keys()
    assert_equal(backbone, expected)

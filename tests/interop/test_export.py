"""Backbones in other packages: every name, the same features, or nothing written."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors import safe_open

from densessl.errors import DenseSSLError
from densessl.interop import export as export_module
from densessl.interop import save_backbone
from densessl.interop.convert import main
from densessl.interop.export import export
from densessl.interop.fingerprint import fingerprint
from densessl.interop.twins import TARGETS, largest_difference, twin
from densessl.registry import MODELS

STATISTICS = dict(mean=[127.5, 120.0, 100.0], std=[51.0, 51.0, 51.0])
VIT = dict(
    type='VisionTransformer',
    arch=dict(embed_dims=24, depth=3, num_heads=3),
    patch_size=8,
    img_size=32,
)
BACKBONES = dict(
    vit=VIT,
    vit_no_cls=dict(VIT, cls_token=False, final_norm=False),
    vit_norm_no_cls=dict(VIT, cls_token=False),
    vit_grey=dict(VIT, in_channels=1),
    swin=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=12, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8]),
        img_size=224,
        window_size=7,
    ),
    swin_windows=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=12, depths=[2, 2, 2], num_heads=[1, 2, 4]),
        img_size=64,
        window_size=[8, 8, 4],
    ),
    timm_vit=dict(type='TimmBackbone', name='vit_tiny_patch16_224', depth=2),
    timm_swin=dict(
        type='TimmBackbone',
        name='swin_tiny_patch4_window7_224',
        embed_dim=12,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 4, 8],
    ),
    resnet=dict(type='TimmBackbone', name='resnet18'),
)
OPENMMLAB = ('mmseg', 'mmdet', 'mmpretrain')
GOES = {
    'vit': (*OPENMMLAB, 'timm', 'hf'),
    'vit_no_cls': (*OPENMMLAB, 'timm'),
    'vit_norm_no_cls': ('mmseg', 'timm'),
    'vit_grey': ('mmpretrain', 'timm', 'hf'),
    'swin': (*OPENMMLAB, 'timm', 'hf'),
    'swin_windows': ('mmpretrain', 'timm'),
    'timm_vit': ('mmseg', 'timm'),
    'timm_swin': ('mmdet', 'timm'),
    'resnet': (*OPENMMLAB, 'timm', 'torchvision-resnet'),
}
PAIRS = [(name, target) for name, targets in GOES.items() for target in targets]
MODULES = dict(hf='transformers')


def need(target: str) -> None:
    module = MODULES.get(target, target.split('-')[0])
    if importlib.util.find_spec(module) is None:
        pytest.skip(f'{module} is not installed')


def saved(folder, name: str):
    torch.manual_seed(0)
    config = BACKBONES[name]
    backbone = MODELS.build(config)
    for parameter in backbone.parameters():  # also what starts at 0 and 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    path = folder / f'{name}.safetensors'
    channels = config.get('in_channels', 3)
    statistics = {key: value[:channels] for key, value in STATISTICS.items()}
    save_backbone(path, backbone, config, **statistics, steps=7)
    return backbone, str(path)


def out(folder, target: str):
    suffix = '.pth' if target in OPENMMLAB else '.safetensors'
    return folder / ('model' if target == 'hf' else f'out{suffix}')


@pytest.mark.parametrize(('name', 'target'), PAIRS)
def test_features_are_the_same_there(tmp_path, name, target):
    need(target)
    _, path = saved(tmp_path, name)
    done = export(path, out(tmp_path, target), target)
    assert done.version is not None
    assert done.difference < 1e-5


@pytest.mark.parametrize(('name', 'target'), PAIRS)
def test_what_went_out_comes_back(tmp_path, name, target):
    backbone, _ = saved(tmp_path, name)
    there = twin(backbone, target)
    back = there.keymap.back(there.keymap.there(there.state))
    assert back.keys() == {
        key for key in there.state if not key.removeprefix('model.').startswith('fc.')
    }
    for key, value in back.items():
        assert torch.equal(value, there.state[key]), key


@pytest.mark.parametrize('target', OPENMMLAB)
def test_file_for_openmmlab(tmp_path, target):
    need(target)
    backbone, path = saved(tmp_path, 'swin')
    done = export(path, out(tmp_path, target), target)
    content = torch.load(done.path, weights_only=True)
    assert all(key.startswith('backbone.') for key in content['state_dict'])
    plain = {k.removeprefix('backbone.'): v for k, v in content['state_dict'].items()}
    meta = content['meta']
    assert meta['fingerprint'] == fingerprint(plain) == done.fingerprint
    assert (meta['format'], meta['target']) == ('densessl-export', target)
    assert (meta['steps'], meta['mean']) == (7, STATISTICS['mean'])
    assert meta['config'] == BACKBONES['swin']
    module = twin(backbone, target).build()
    module.load_state_dict(plain, strict=True)
    bare = export(path, tmp_path / 'bare.pth', target, prefix='')
    assert torch.load(bare.path, weights_only=True)['state_dict'].keys() == plain.keys()


def test_mmengine_loads_it_by_load_from_and_by_init_cfg(tmp_path):
    from mmengine.runner import load_checkpoint
    from mmpretrain.models import VisionTransformer

    backbone, path = saved(tmp_path, 'vit_no_cls')
    done = export(path, tmp_path / 'out.pth', 'mmpretrain')
    options = {k: v for k, v in done.config.items() if k != 'type'}
    model = torch.nn.Module()
    model.backbone = VisionTransformer(**options)
    load_checkpoint(model, str(done.path), strict=True)
    images = torch.randn(1, 3, 32, 32)
    expected = backbone.eval()(images).patches
    model.eval()
    found = model.backbone(images)[-1].flatten(2).mT
    torch.testing.assert_close(found, expected)
    export(path, tmp_path / 'bare.pth', 'mmpretrain', prefix='')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'bare.pth'))
    second = VisionTransformer(**options, init_cfg=init)
    second.init_weights()
    assert fingerprint(second.state_dict()) == done.fingerprint


def test_timm_loads_its_files(tmp_path):
    backbone, path = saved(tmp_path, 'vit')
    for name in ('out.safetensors', 'out.pth'):
        done = export(path, tmp_path / name, 'timm')
        model = timm.models.VisionTransformer(**done.config)
        timm.models.load_checkpoint(model, str(done.path), strict=True)
        images = torch.randn(1, 3, 32, 32)
        found = model.eval().forward_features(images)[:, 1:]
        torch.testing.assert_close(found, backbone.eval()(images).patches)
    with safe_open(tmp_path / 'out.safetensors', 'pt') as file:
        meta = file.metadata()
    assert meta['fingerprint'] == done.fingerprint
    assert json.loads(meta['config']) == VIT
    sidecar = json.loads((tmp_path / 'out.json').read_text())
    assert sidecar['fingerprint'] == done.fingerprint


def test_hugging_face_loads_its_folder(tmp_path):
    transformers = pytest.importorskip('transformers')
    backbone, path = saved(tmp_path, 'vit')
    done = export(path, tmp_path / 'model', 'hf')
    model = transformers.AutoModel.from_pretrained(done.path, add_pooling_layer=False)
    images = torch.rand(3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in STATISTICS.values())
    expected = backbone.eval()(((255 * images - mean) / std)[None])
    prepare = json.loads((tmp_path / 'model/preprocessor_config.json').read_text())
    mean, std = (
        torch.tensor(prepare[key]).view(3, 1, 1) for key in ('image_mean', 'image_std')
    )
    with torch.no_grad():
        found = model.eval()(((images - mean) / std)[None]).last_hidden_state
    torch.testing.assert_close(found[:, 1:], expected.patches, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, 0], expected.cls, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('target', ['timm', 'torchvision-resnet'])
def test_networks_in_training_are_compared_as_they_will_be_used(target):
    backbone = MODELS.build(BACKBONES['resnet'])  # batch norm differs in training
    there = twin(backbone, target)
    module = there.build()
    module.load_state_dict(there.keymap.there(there.state), strict=False)
    assert largest_difference(there, module.train(), backbone.train()) < 1e-5


def test_swin_is_built_for_a_comparison_alone(monkeypatch):
    backbone = MODELS.build(BACKBONES['swin_windows'])
    built = []

    def build(*args, **options):
        built.append(options['img_size'])
        return type(backbone)(*args, **options)

    monkeypatch.setattr('densessl.interop.twins.swin.SwinTransformer', build)
    there = twin(backbone, 'timm')
    assert not built
    module = there.build()
    module.load_state_dict(there.keymap.there(there.state))
    assert largest_difference(there, module, backbone) < 1e-5 and built == [64]


def test_a_name_that_stays_unfilled_stops_it(tmp_path, monkeypatch):
    _, path = saved(tmp_path, 'vit')

    def torn(backbone, target):
        there = twin(backbone, target)
        state = {k: v for k, v in there.state.items() if k != 'blocks.1.norm2.bias'}
        return replace(there, state=state)

    monkeypatch.setattr(export_module, 'twin', torn)
    with pytest.raises(DenseSSLError, match=r'1 missing \(blocks\.1\.norm2\.bias\)'):
        export(path, tmp_path / 'out.pth', 'timm')
    assert not (tmp_path / 'out.pth').exists()


def test_features_that_differ_stop_it(tmp_path, monkeypatch, capsys):
    _, path = saved(tmp_path, 'vit')

    def shuffled(backbone, target):  # keys of the first block exchanged for values
        there = twin(backbone, target)
        key = 'blocks.0.attn.qkv.weight'
        q, k, v = there.state[key].chunk(3)
        return replace(there, state=there.state | {key: torch.cat([q, v, k])})

    monkeypatch.setattr(export_module, 'twin', shuffled)
    code = main(['export', path, str(tmp_path / 'out.pth'), '--to', 'timm'])
    assert code == 2
    assert 'differ by' in capsys.readouterr().err
    assert not (tmp_path / 'out.pth').exists()


def test_without_the_package_nothing_is_claimed(tmp_path, monkeypatch, capsys):
    _, path = saved(tmp_path, 'vit')
    monkeypatch.setattr(export_module, 'installed', lambda target: None)
    assert main(['export', path, str(tmp_path / 'o.pth'), '--to', 'mmpretrain']) == 0
    said = capsys.readouterr().out
    assert 'not compared: mmpretrain is not installed' in said
    assert 'every name filled' not in said


def test_command_line_says_what_was_done(tmp_path, capsys):
    _, path = saved(tmp_path, 'resnet')
    target = str(tmp_path / 'r.pth')
    assert main(['export', path, target, '--to', 'torchvision-resnet']) == 0
    said = capsys.readouterr().out
    assert 'every name filled, none left over' in said
    assert 'torchvision.models.resnet18()' in said


def test_twice_the_same_content(tmp_path):
    _, path = saved(tmp_path, 'vit')
    contents = []
    for name in ('a.safetensors', 'b.safetensors'):
        done = export(path, tmp_path / name, 'timm')
        with safe_open(done.path, 'pt') as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            contents.append((file.metadata(), fingerprint(state)))
    assert contents[0] == contents[1]
    assert contents[0][1] == done.fingerprint


WRONG = [
    ('vit_no_cls', 'hf', 'model', 'this backbone no class token'),
    ('vit', 'torchvision-resnet', 'o.pth', 'choose from mmseg, mmdet, mmpretrain'),
    ('resnet', 'hf', 'model', 'choose from mmseg, mmdet, mmpretrain, timm, torchvis'),
    ('swin_windows', 'mmseg', 'o.pth', r'one window for all stages.*\[8, 8, 4\]'),
    ('vit', 'mmseg', 'o.safetensors', 'ends in .pth'),
    ('vit', 'timm', 'o.bin', 'neither .pth nor .safetensors'),
    ('vit', 'hf', 'o.pth', 'a folder'),
]


@pytest.mark.parametrize(('name', 'target', 'file', 'line'), WRONG)
def test_wrong_input_ends_in_one_line(tmp_path, capsys, name, target, file, line):
    _, path = saved(tmp_path, name)
    with pytest.raises(DenseSSLError, match=line):
        export(path, tmp_path / file, target)
    assert main(['export', path, str(tmp_path / file), '--to', target]) == 2
    assert capsys.readouterr().err.count('\n') == 1


def test_networks_no_one_else_has_are_refused(tmp_path):
    cvt = MODELS.build(dict(type='CvT'))
    for target in TARGETS:
        with pytest.raises(DenseSSLError, match='use it through densessl'):
            twin(cvt, target)
    plain = MODELS.build(dict(VIT, pos_embed=False))
    with pytest.raises(DenseSSLError, match='without position embeddings'):
        twin(plain, 'timm')


def test_unknown_checkpoint_is_refused(tmp_path, capsys):
    code = main(['export', str(tmp_path / 'no.pth'), 'x.pth', '--to', 'timm'])
    assert code == 2
    assert 'no such file' in capsys.readouterr().err

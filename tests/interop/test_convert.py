"""The command line, in and out again."""

from __future__ import annotations

import timm
import torch

from densessl import load_backbone
from densessl.interop.convert import main


def save(folder):
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=5
    )
    torch.save(model.state_dict(), folder / 'vit.pth')
    return model


def run_import(folder, *more):
    files = [str(folder / name) for name in ('vit.pth', 'vit.safetensors')]
    return main(['import', *files, *more])


def test_in_and_out_again_is_the_same_file(tmp_path, capsys):
    model = save(tmp_path)
    assert run_import(tmp_path, '--from', 'timm', '--num-heads', '2') == 0
    said = capsys.readouterr().out
    assert 'head' in said  # the classifier, left out
    assert '--init-from' in said
    path = str(tmp_path / 'vit.safetensors')
    images = torch.randn(2, 3, 32, 32)
    found = load_backbone(path)(images).patches
    expected = model.eval().forward_features(images)[:, 1:]
    torch.testing.assert_close(found, expected)
    assert main(['export', path, str(tmp_path / 'back.pth'), '--to', 'timm']) == 0
    back = torch.load(tmp_path / 'back.pth', weights_only=True)
    for key, value in model.state_dict().items():
        if not key.startswith('head.'):
            assert torch.equal(back.pop(key), value), key
    assert not back


def test_wrong_input_ends_in_one_line(tmp_path, capsys):
    save(tmp_path)
    for arguments, line in (
        (['import', 'x.pth', 'x.safetensors', '--from', 'dino'], 'no such file'),
        (
            ['import', str(tmp_path / 'vit.pth'), 'x.pth', '--from', 'timm'],
            'does not end in .safetensors',
        ),
        (
            [
                'import',
                str(tmp_path / 'vit.pth'),
                str(tmp_path / 'x.safetensors'),
                '--from',
                'selfpatch',
            ],
            'vit.pth: not of layout selfpatch',
        ),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert line in error and error.count('\n') == 1
    assert not (tmp_path / 'x.safetensors').exists()

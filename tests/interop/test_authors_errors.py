"""Files that cannot be imported end in one line that says what they are."""

import sys
import types

import numpy as np
import pytest
import torch
from authors_checkpoints import (
    SWINS,
    VITS,
    densedino_file,
    dino_file,
    dinov2_file,
    esvit_file,
    loca_file,
    mmpretrain_vit,
    moby_file,
    save,
    selfpatch_file,
)
from authors_files import Draw, flax_bytes, flax_loca, named, resnet, swin, vit

from densessl.errors import DenseSSLError
from densessl.interop import save_weights
from densessl.interop.authors import LAYOUTS, export_checkpoint, import_checkpoint


def refused(path, layout='dino', **options) -> str:
    """The one line of an import that fails, after the file's name."""
    with pytest.raises(DenseSSLError) as error:
        import_checkpoint(path, layout, **options)
    line = str(error.value)
    assert '\n' not in line
    assert line.startswith(str(path))
    return line.removeprefix(str(path))


FILES = dict(
    dino=lambda: dino_file(Draw(0), VITS[0]),
    selfpatch=lambda: selfpatch_file(Draw(0), VITS[0]),
    esvit=lambda: esvit_file(Draw(0), SWINS[0]),
    densedino=lambda: densedino_file(Draw(0), VITS[0]),
    moby=lambda: moby_file(Draw(0), SWINS[0]),
    dinov2=lambda: dinov2_file(Draw(0), (64, 1, 14, 2)),
    mmpretrain=lambda: dict(state_dict=mmpretrain_vit(vit(Draw(0), *VITS[0]))),
)


@pytest.mark.parametrize('written', FILES)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_each_layout_knows_the_others(tmp_path, written, layout):
    path = save(tmp_path, FILES[written]())
    if layout == written or {layout, written} == {'esvit', 'glsd'}:
        assert import_checkpoint(path, layout).state
    else:
        likely = 'esvit or glsd' if written == 'esvit' else written
        assert refused(path, layout) == (
            f': not of layout {layout}; it seems to be {likely}, give --from {written}'
        )


def test_flax_file_is_known(tmp_path):
    path = tmp_path / 'loca'
    path.write_bytes(flax_bytes(loca_file(Draw(0), VITS[0], 2)))
    assert 'it seems to be loca' in refused(path, 'dino')
    tree = flax_loca(Draw(0), *VITS[1], 2)
    np.savez(tmp_path / 'loca.npz', **{'encoder_norm/scale': np.ones(3)})
    assert 'names of no layout that is known' in refused(tmp_path / 'loca.npz', 'loca')
    del tree['encoderblock_2']['MultiHeadDotProductAttention_0']
    path.write_bytes(flax_bytes(tree))
    assert 'is not whole: 4 missing' in refused(path, 'loca')


def test_unknown_layout():
    with pytest.raises(DenseSSLError, match="unknown layout 'dyno'; choose from"):
        import_checkpoint('x.pth', 'dyno')


def test_no_file(tmp_path):
    assert refused(tmp_path / 'x.pth').startswith(': no such file')
    assert refused(tmp_path).startswith(': a folder')


@pytest.mark.parametrize(
    'written', ['file.pth', 'old.pth', 'loca', 'a.npz', 'a.safetensors']
)
@pytest.mark.parametrize('share', [0.3, 0.9])
def test_torn_files(tmp_path, written, share):
    path = tmp_path / written
    weights = vit(Draw(0), *VITS[0])
    if written == 'old.pth':
        torch.save(weights, path, _use_new_zipfile_serialization=False)
    elif written == 'loca':
        path.write_bytes(flax_bytes(flax_loca(Draw(0), *VITS[0], 2)))
    elif written == 'a.npz':
        np.savez(path, **{name: value.numpy() for name, value in weights.items()})
    elif written == 'a.safetensors':
        from safetensors.torch import save_file

        save_file(weights, path)
    else:
        torch.save(weights, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert 'torn' in refused(path, 'loca' if written == 'loca' else 'dino')


def test_other_files(tmp_path):
    text = tmp_path / 'notes.txt'
    text.write_text('weights: see the drive')
    assert 'torn' in refused(text)
    (tmp_path / 'empty').write_bytes(b'')
    assert 'torn' in refused(tmp_path / 'empty')
    assert 'holds a list instead of a dict' in refused(save(tmp_path, [1, 2]))
    assert 'no tensors in it' in refused(save(tmp_path, dict(epoch=3)))
    whole_model = save(tmp_path, torch.nn.Linear(2, 2))
    line = refused(whole_model)
    assert 'holds an object of class torch.nn.modules.linear.Linear' in line


def test_settings_of_yacs_do_no_harm_and_are_not_run(tmp_path, monkeypatch):
    """MoBY's training saves its settings; yacs need not be installed to read them."""
    module = types.ModuleType('yacs.config')

    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    settings = CfgNode(MODEL=CfgNode(TYPE='moby'), EPOCHS=300)
    settings.__dict__['__immutable__'] = True
    path = save(tmp_path, moby_file(Draw(0), SWINS[0]) | dict(config=settings))
    monkeypatch.undo()
    imported = import_checkpoint(path, 'moby')
    assert any('config' in note for note in imported.notes if 'left out' in note)


def test_code_in_a_file_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (sys.exit, ())

    path = save(tmp_path, dino_file(Draw(0), VITS[0]) | dict(args=Harm()))
    assert 'could run any code' in refused(path)


def test_missing_msgpack_is_named(tmp_path, monkeypatch):
    path = tmp_path / 'loca'
    path.write_bytes(flax_bytes(loca_file(Draw(0), VITS[0], 2)))
    monkeypatch.setitem(sys.modules, 'msgpack', None)
    assert refused(path, 'loca').endswith('pip install msgpack')


def test_our_own_files(tmp_path):
    state = named('teacher.backbone', vit(Draw(0), *VITS[0]))
    path = tmp_path / 'weights.safetensors'
    save_weights(path, state, {}, mean=[0] * 3, std=[1] * 3, source='here')
    assert "densessl's own weights need no import" in refused(path)
    run = save(tmp_path, dict(kind='densessl-run', state_dict=state))
    assert "densessl's own checkpoint needs no import" in refused(run)


def test_unknown_and_missing_names(tmp_path):
    whole = dino_file(Draw(0), VITS[1])
    more = dict(whole, teacher=whole['teacher'] | {'backbone.mystery': torch.ones(2)})
    line = refused(save(tmp_path, more))
    assert ', as dino: 1 of 102 names are unknown' in line
    assert 'teacher.backbone.mystery' in line
    for part, name, found in (
        ('teacher', 'backbone.blocks.1.mlp.fc2.bias', 'blocks.1.mlp.fc2.bias'),
        ('teacher', 'backbone.patch_embed.proj.weight', 'patch_embed.proj.weight'),
        ('student', 'module.backbone.norm.bias', 'norm.bias'),
        ('student', 'module.head.mlp.4.bias', 'mlp.4.bias'),
        ('student', 'module.head.last_layer.weight_v', 'last_layer.weight_v'),
    ):
        less = {key: value for key, value in whole[part].items() if key != name}
        line = refused(save(tmp_path, whole | {part: less}))
        assert found in line, line
        assert 'incomplete' in line


@pytest.mark.parametrize('layout', ['dino', 'densedino', 'selfpatch'])
def test_a_norm_that_is_lost_is_missed(tmp_path, layout):
    file = FILES[layout]()
    for part in ('student', 'teacher'):
        if layout == 'selfpatch':  # has none
            prefix = 'module.' if part == 'student' else ''
            file[part] |= named(f'{prefix}backbone', Draw(0).norm('norm', 32))
        else:
            weights = file[part].items()
            file[part] = {k: v for k, v in weights if 'backbone.norm.' not in k}
    line = refused(save(tmp_path, file), layout)
    has = layout == 'selfpatch'
    assert f'would have final_norm={has}, and those of this layout have' in line


def test_parts_of_split_weights(tmp_path):
    file = selfpatch_file(Draw(0), VITS[0])
    del file['teacher']['ca_head.cls_blocks.0.attn.k.bias']
    line = refused(save(tmp_path, file), 'selfpatch')
    assert 'parts of teacher.neck.blocks.0.kv.bias are missing' in line


def test_another_variant(tmp_path):
    file = dino_file(Draw(0), VITS[0])
    file['teacher']['head.mlp.1.running_mean'] = torch.zeros(48)  # batch norm in it
    line = refused(save(tmp_path, file))
    assert 'teacher.projectors.view of DINOProjector is not whole: 1 beyond it' in line
    file = dino_file(Draw(0), VITS[0])
    file['dino_loss']['center'] = torch.zeros(1, 19)
    assert 'the centre of head view has 19 values' in refused(save(tmp_path, file))
    file = dino_file(Draw(0), VITS[0])
    file['student']['module.backbone.norm.bias'] = torch.zeros(5)
    line = refused(save(tmp_path, file))
    assert '1 of another shape (norm.bias (5,) for (32,))' in line


def test_tables_and_heads_that_do_not_fit(tmp_path):
    weights = vit(Draw(0), *VITS[0])
    path = save(tmp_path, weights | dict(pos_embed=torch.zeros(1, 1 + 6, 32)))
    assert 'of no square grid' in refused(path)
    path = save(tmp_path, weights)
    assert import_checkpoint(path, 'dino', num_heads=4).config['arch']['num_heads'] == 4
    assert 'does not divide among 5 heads' in refused(path, num_heads=5)
    weights['patch_embed.proj.weight'] = torch.zeros(32, 3, 8, 4)
    assert 'only square ones' in refused(save(tmp_path, weights))


def test_torn_stages(tmp_path):
    weights = swin(Draw(0), *SWINS[0])
    del weights['layers.3.blocks.0.attn.relative_position_bias_table']
    line = refused(save(tmp_path, weights), 'esvit')
    assert 'relative_position_bias_table' in line
    weights = resnet(Draw(0), [1, 1, 1, 1])
    del weights['layer4.0.bn3.running_var']
    assert 'layer4.0.bn3.running_var' in refused(save(tmp_path, weights))


def test_export_to_a_layout_without_these_names(tmp_path):
    path = save(tmp_path, FILES['dinov2']())
    imported = import_checkpoint(path, 'dinov2')
    with pytest.raises(DenseSSLError, match='no names for a TimmBackbone') as error:
        export_checkpoint(imported.state, imported.config, 'dino')
    assert '\n' not in str(error.value)
    imported = import_checkpoint(save(tmp_path, FILES['selfpatch']()), 'selfpatch')
    with pytest.raises(DenseSSLError, match='dino: this layout has no place for'):
        export_checkpoint(imported.state, imported.config, 'dino')

"""``tools/evaluate.py``: checkpoints, what it writes, the page's commands, mistakes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shlex
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import ROOT, build_model, model_config, optim_wrapper
from mmengine.config import Config
from test_image_protocols import make_tree

from densessl.engine.checkpoint import save_run
from densessl.errors import DenseSSLError
from densessl.evaluation import FeatureExtractor, fewshot
from densessl.evaluation.loading import load_extractor
from densessl.evaluation.main import main, table
from densessl.evaluation.progress import progress
from densessl.evaluation.protocol import Scores
from densessl.interop import save_backbone
from densessl.interop.fingerprint import fingerprint
from densessl.models.features import Tokens
from densessl.registry import EVALUATORS, MODELS

PAGE = ROOT / 'docs/evaluation.md'
KNN = str(ROOT / 'configs/evaluation/knn.py')
SMALL = ['protocol.ks=[2]', 'protocol.resize=16', 'protocol.crop=16']
SMALL += ['protocol.num_workers=0']
TIMM = 'vit_tiny_patch16_224'


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder with the configs, data and runs that commands of the page name."""
    home = tmp_path_factory.mktemp('home')
    (home / 'configs').symlink_to(ROOT / 'configs')
    make_tree(home / 'data/tinyimagenet40', train=6, val=3)
    (home / 'data/imagenet').symlink_to(home / 'data/tinyimagenet40')
    (home / 'data/ade20k/images').mkdir(parents=True)
    (home / 'data/ade20k/images/training').symlink_to(
        make_tree(home / 'ade', train=11) / 'train'
    )
    make_tree(home / 'data/linear_suite/pets', train=6, test=3)
    save(home / 'work_dirs/selfpatch_vit-t8_demo')
    arch = dict(embed_dims=8, depths=[1] * 4, num_heads=[1] * 4)
    write(home / 'work_dirs/esvit_swin_demo', type='SwinTransformer', arch=arch)
    arch = dict(embed_dims=16, depth=4, num_heads=2)
    point = home / 'work_dirs/point'
    write(point, type='VisionTransformer', arch=arch, patch_size=8, img_size=32)
    return home


def write(folder, **config):
    """A backbone's file alone."""
    folder.mkdir(parents=True)
    backbone, path = MODELS.build(config), folder / 'backbone.safetensors'
    save_backbone(path, backbone, config, mean=[128] * 3, std=[64] * 3)


def save(folder):
    """A run, its teacher unlike its student."""
    model = build_model()
    for parameter in model.teacher.parameters():  # no longer the student's
        parameter.data.add_(0.01)
    batches = SimpleNamespace(global_batch_size=32)
    runner = SimpleNamespace(
        train_loop=SimpleNamespace(steps_per_epoch=62),
        train_dataloader=SimpleNamespace(batch_sampler=batches),
        seed=0,
        cfg=Config(dict(model=model_config())),
        model=model,
        optim_wrapper=optim_wrapper(model),
    )
    save_run(runner, 372, folder)


def run(home, monkeypatch, *words):
    """``metrics.json`` of a command in ``home``; it must succeed."""
    monkeypatch.chdir(home)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main([str(word) for word in words])
    assert code == 0, out.getvalue()
    return json.loads((home / out.getvalue().split()[-1]).read_text())


# Checkpoints


def test_teacher_student_and_file_are_what_the_run_holds(home):
    folder = home / 'work_dirs/selfpatch_vit-t8_demo'
    state = torch.load(folder / 'step_00000372.pth', weights_only=True)['state_dict']
    for path, student, prefix in (
        ('step_00000372.pth', False, 'teacher.backbone.'),
        ('step_00000372.pth', True, 'backbone.'),
        ('backbone.safetensors', False, 'teacher.backbone.'),
    ):
        extractor, about = load_extractor(str(folder / path), student=student)
        for name, value in extractor.backbone.state_dict().items():
            assert value.equal(state[prefix + name])
        digest = hashlib.sha256((folder / path).read_bytes()).hexdigest()
        assert about['sha256'] == digest
        assert about['role'] == ('student' if student else 'teacher')
        assert about['weights_sha256'] == fingerprint(extractor.backbone.state_dict())
        assert extractor.settings['mean'] == pytest.approx([123.675, 116.28, 103.53])


def test_hash_of_weights_sees_values_and_names():
    state = dict(a=torch.zeros(3), b=torch.ones(2, dtype=torch.int64))
    same = dict(reversed(state.items()))
    assert fingerprint(state) == fingerprint(same)
    others = dict(state, a=torch.tensor([0, 0, 1e-9])), dict(state, c=torch.zeros(0))
    assert len({fingerprint(each) for each in (state, *others)}) == 3


def test_timm_weights_of_a_file(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(TIMM, num_classes=7)
    path = tmp_path / 'weights.pth'
    torch.save(model.state_dict(), path)
    extractor, about = load_extractor(f'timm:{TIMM}@{path}', layers=3)
    assert about['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert extractor.settings['mean'] == pytest.approx([127.5] * 3)  # timm's for this
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    assert extractor(images).patches.shape == (2, 6, 3 * 192)
    for name, value in extractor.backbone.model.state_dict().items():
        assert value.equal(model.state_dict()[name])


def test_untrained_is_the_config_s_own_start(home):
    config = str(ROOT / 'configs/quickstart/dino_vit-t8_demo.py')
    first, about = load_extractor(f'untrained:{config}')
    torch.manual_seed(7)
    again, also = load_extractor(f'untrained:{config}')
    assert about == also and about['sha256'] is None
    assert type(first.backbone).__name__ == type(again.backbone).__name__


# Layers and pools


def vit(**options):
    torch.manual_seed(0)
    arch = dict(embed_dims=16, depth=3, num_heads=2)
    return MODELS.build(
        dict(type='VisionTransformer', arch=arch, patch_size=8, img_size=32) | options
    )


def door(backbone, **options):
    return FeatureExtractor(backbone, (128,) * 3, (64,) * 3, **options)


IMAGES = torch.randint(
    0,
    256,
    (3, 3, 24, 40),
    dtype=torch.uint8,
    generator=torch.Generator().manual_seed(0),
)


@pytest.mark.parametrize('name', ['ours', 'timm'])
@pytest.mark.parametrize('norm', [True, False])
def test_layers_lie_side_by_side_the_last_at_the_end(name, norm):
    if name == 'ours':
        backbone = vit().eval()
        blocks, final = backbone.blocks, backbone.norm
    else:
        options = dict(embed_dim=16, depth=3, num_heads=2, img_size=32)
        backbone = MODELS.build(dict(type='TimmBackbone', name=TIMM, **options)).eval()
        blocks, final = backbone.model.blocks, backbone.model.norm
    for parameter in final.parameters():
        torch.nn.init.normal_(parameter)
    seen = []
    hooks = [b.register_forward_hook(lambda *io: seen.append(io[2])) for b in blocks]
    size = backbone.patch_size
    images = IMAGES.repeat(1, 1, size // 8, size // 8)
    tokens = door(backbone, layers=2, norm=norm)(images)
    expected = torch.cat([final(x) if norm else x for x in seen[-2:]], 2)
    assert tokens.grid == (3, 5) and tokens.patches.shape == (3, 15, 32)
    torch.testing.assert_close(tokens.patches, expected[:, 1:])
    torch.testing.assert_close(tokens.cls, expected[:, 0])
    for hook in hooks:
        hook.remove()
    last = door(backbone)(images)
    torch.testing.assert_close(door(backbone, layers=1)(images).cls, last.cls)
    if norm:
        torch.testing.assert_close(tokens.patches[:, :, 16:], last.patches)


def test_pools_are_what_they_say():
    backbone = vit()
    tokens: Tokens = door(backbone, layers=2)(IMAGES)
    cls, mean = tokens.cls, tokens.patches.mean(1)
    for pool, expected in (
        ('auto', cls),
        ('cls', cls),
        ('mean', mean),
        ('cls+mean', torch.cat([cls, mean], 1)),
    ):
        found = door(backbone, layers=2, pool=pool, batch_size=2).pooled(IMAGES)
        torch.testing.assert_close(found, expected)
    plain = vit(cls_token=False)
    mean = door(plain)(IMAGES).patches.mean(1)
    torch.testing.assert_close(door(plain).pooled(IMAGES), mean)


def swin():
    arch = dict(embed_dims=12, depths=[2, 2], num_heads=[1, 2])
    return MODELS.build(
        dict(type='SwinTransformer', arch=arch, img_size=64, window_size=4)
    )


SQUARES = IMAGES[:, :, :, :24].repeat(1, 1, 2, 2)  # 48 px: 12 x 12 and 6 x 6 tokens


@pytest.mark.parametrize('norm', [True, False])
def test_layers_of_swin_cross_stages_where_they_are_pooled(norm):
    backbone = swin().eval()
    seen = []
    blocks = [b for stage in backbone.model.stages for b in stage.blocks]
    hooks = [b.register_forward_hook(lambda *io: seen.append(io[2])) for b in blocks]
    final = backbone.model.norm1
    torch.nn.init.normal_(final.weight)
    pooled = door(backbone, layers=3, norm=norm).pooled(SQUARES)
    _, before, *last = seen
    last = [final(x) if norm else x for x in last]
    means = [before.mean(1), *(x.mean(1) for x in last)]
    assert [m.shape[1] for m in means] == [12, 24, 24]
    torch.testing.assert_close(pooled, torch.cat(means, 1))
    for hook in hooks:
        hook.remove()
    tokens = door(backbone, layers=2, norm=norm)(SQUARES)
    assert tokens.grid == (6, 6)
    torch.testing.assert_close(tokens.patches, torch.cat(last, 2))
    if norm:
        one = door(backbone)(SQUARES)
        torch.testing.assert_close(tokens.patches[..., 24:], one.patches)


def test_wrong_layers_and_pools_are_one_line():
    plain = torch.nn.Identity()
    resnet = MODELS.build(dict(type='TimmBackbone', name='resnet10t'))
    for call, words in (
        (lambda: door(plain, layers=4), 'last, normed layer only'),
        (lambda: door(plain, norm=False), 'last, normed layer only'),
        (lambda: door(swin(), layers=3)(SQUARES), 'give layers=2 or fewer'),
        (lambda: door(swin(), layers=5)(SQUARES), '4 blocks'),
        (
            lambda: door(resnet, layers=2)(IMAGES[:, :, :, :32].repeat(1, 1, 4, 1)),
            'only',
        ),
        (lambda: door(vit(), layers=4)(IMAGES), '3 blocks'),
        (lambda: door(vit(), layers=0), 'give 1 layer or more'),
        (lambda: door(vit(), pool='max'), "pool 'max' is unknown"),
        (
            lambda: door(vit(cls_token=False), pool='cls').pooled(IMAGES),
            'no class token',
        ),
    ):
        with pytest.raises(DenseSSLError, match=words) as caught:
            call()
        assert '\n' not in str(caught.value)


# The command


def test_metrics_file_tells_what_the_score_depends_on(home, monkeypatch, tmp_path):
    path = 'work_dirs/selfpatch_vit-t8_demo/step_00000372.pth'
    options = ['--out', tmp_path / 'new/out', '--precision', 'bf16', '--student']
    options += ['--cfg-options', *SMALL, 'extractor.layers=2']
    found = run(home, monkeypatch, KNN, path, '--data', 'data/imagenet', *options)
    assert found == json.loads((tmp_path / 'new/out/metrics.json').read_text())
    assert found['protocol'] == 'KNN' and list(found['metrics']) == ['top1_2nn']
    expected = dict(ks=[2], temperature=0.07, resize=16, crop=16, num_train=18)
    assert found['settings'] | expected == found['settings']
    extractor = found['extractor']
    assert (extractor['layers'], extractor['precision']) == (2, 'bf16')
    assert found['checkpoint']['role'] == 'student'
    assert found['versions']['torch'] == torch.__version__
    assert found['versions']['device'] == 'cpu' or torch.cuda.is_available()


def test_default_folder_is_beside_the_checkpoint(home, monkeypatch):
    folder = home / 'work_dirs/selfpatch_vit-t8_demo'
    for name, options in (('backbone', []), ('step_00000372_student', ['--student'])):
        path = folder / ('backbone.safetensors' if not options else 'step_00000372.pth')
        run(home, monkeypatch, KNN, path, *options, '--cfg-options', *SMALL)
        assert (folder / 'evaluation/knn' / name / 'metrics.json').is_file()
    start = 'configs/quickstart/dino_vit-t8_demo.py'
    run(home, monkeypatch, KNN, f'untrained:{start}', '--cfg-options', *SMALL)
    out = home / 'work_dirs/evaluation/knn/untrained_dino_vit-t8_demo/metrics.json'
    assert out.is_file()


def test_not_a_number_is_null_and_pictures_are_named(home, monkeypatch, tmp_path):
    class Drawing:
        def run(self, extractor, data, out):
            (out / 'a.png').write_text('x')
            return Scores(dict(one=float('nan')), dict(size=(3, 4)), [out / 'a.png'])

    monkeypatch.setitem(EVALUATORS._module_dict, 'Drawing', Drawing)
    config = tmp_path / 'drawing.py'
    config.write_text("protocol = dict(type='Drawing')\ndata_root = 'data/imagenet'\n")
    path = 'work_dirs/selfpatch_vit-t8_demo/backbone.safetensors'
    found = run(home, monkeypatch, config, path, '--out', tmp_path)
    assert found['metrics'] == dict(one=None)
    assert found['settings'] == dict(size=[3, 4])


def test_table_and_progress():
    assert table(dict(a=0.5, bcd=12.25)) == 'a        0.5000\nbcd     12.2500'
    plain, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    for stream in (plain, terminal):
        assert list(progress('abc', 3, 'letters', stream)) == ['a', 'b', 'c']
    assert plain.getvalue() == 'letters: 3/3, 0 s\n'
    assert terminal.getvalue().endswith(f'[{"#" * 30}] letters: 3/3, 0 s\n')


# Mistakes


def error_of(capsys, *words):
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith('error: ')]) == 1
    assert lines[-1].startswith('error: ') and 'Traceback' not in '\n'.join(lines)
    return lines[-1]


def test_mistakes_are_one_line(home, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(home)
    run = 'work_dirs/selfpatch_vit-t8_demo'
    good = f'{run}/backbone.safetensors'
    torch.save(dict(a=1), tmp_path / 'step_1.pth')
    torch.save(timm.create_model(TIMM, depth=1).state_dict(), tmp_path / 'w.pth')
    data = ('--data', 'data/imagenet')
    options = ('--cfg-options', *SMALL)
    (tmp_path / 'file').write_text('')
    empty = tmp_path / 'empty.py'
    empty.write_text('')
    for words, found in (
        (['none.py', good], 'no such file'),
        ([empty, good], 'no protocol.type'),
        ([KNN, 'none.pth', *data], 'none.pth: no such file'),
        ([KNN, tmp_path / 'step_1.pth', *data], 'not a checkpoint of a run'),
        ([KNN, tmp_path / 'file', *data], 'not a checkpoint of a run'),
        ([KNN, 'timm:vit_tinny', *data], "no model 'vit_tinny'"),
        ([KNN, f'timm:{TIMM}@none.pth', *data], 'no such file none.pth'),
        (
            [KNN, f'timm:{TIMM}@{tmp_path / "w.pth"}', *data],
            'of another architecture: 132 missing',
        ),
        ([KNN, f'timm:{TIMM}@{tmp_path / "file"}', *data], 'holds no weights'),
        ([KNN, 'untrained:none.py', *data], 'no such config'),
        ([KNN, f'untrained:{KNN}', *data], 'no model.backbone'),
        ([KNN, good, '--student', *data], 'one network only'),
        ([KNN, good, '--data', 'nowhere'], 'nowhere: no such folder'),
        ([KNN, good, *data, '--batch-size', '0'], '--batch-size 0'),
        ([KNN, good, *data, '--device', 'gpu9'], '--device gpu9'),
        ([KNN, good, *data, '--out', tmp_path / 'file/x'], 'choose another folder'),
        ([KNN, good, *data, '--cfg-options', 'protocol.k=3'], "argument 'k'"),
        ([KNN, good, *data, '--cfg-options', 'protocol.type=Knn'], 'Knn'),
        ([KNN, good, *data, '--cfg-options', 'protocl.ks=[3]'], "'protocol'"),
        ([KNN, good, *data, '--cfg-options', 'extractor.layer=3'], "argument 'layer'"),
        ([KNN, good, *data, '--cfg-options', 'data=3'], "nothing reads the key 'data'"),
        ([KNN, good, *data, *options, 'protocol.ks=[99]'], 'k=99 of 18'),
        (
            [
                KNN,
                good,
                *data,
                *options,
                'protocol.num_workers=1',
                'protocol.crop=9',
                'protocol.resize=9',
            ],
            'patches of 8 px',
        ),
    ):
        line = error_of(capsys, *words)
        assert found in line, line


def test_unreadable_picture_in_a_worker_is_one_line(
    monkeypatch, capsys, home, tmp_path
):
    make_tree(tmp_path, train=2, val=1)
    (tmp_path / 'val/red/0.png').write_text('no')
    path = home / 'work_dirs/selfpatch_vit-t8_demo/backbone.safetensors'
    options = ['--cfg-options', *SMALL, 'protocol.num_workers=1']
    words = [KNN, path, '--data', tmp_path, '--out', tmp_path / 'out', *options]
    line = error_of(capsys, *words)
    assert 'val/red/0.png' in line and 'no picture' in line


def test_timm_weights_without_a_net_are_one_line(monkeypatch, capsys, home, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    data = home / 'data/imagenet'
    line = error_of(capsys, KNN, f'timm:{TIMM}', '--data', data, '--out', tmp_path)
    assert f'timm:{TIMM}@FILE' in line


def test_a_protocol_of_one_process_refuses_torchrun(
    monkeypatch, capsys, home, tmp_path
):
    monkeypatch.setitem(EVALUATORS._module_dict, 'Alone', SimpleNamespace)
    monkeypatch.setattr('densessl.evaluation.main.init_process_group', lambda: True)
    monkeypatch.setattr('densessl.evaluation.main.get_dist_info', lambda: (0, 2))
    config = tmp_path / 'alone.py'
    config.write_text(f"protocol = dict(type='Alone')\ndata_root = {str(home)!r}\n")
    path = home / 'work_dirs/selfpatch_vit-t8_demo/backbone.safetensors'
    assert 'start it without torchrun' in error_of(capsys, config, path)


# The page

SECTIONS = ('The command', 'k-NN', 'Linear classification', 'Linear suite')


def commands(*sections):
    text = PAGE.read_text().replace('\\\n', ' ')
    for title in sections:
        block = text.split(f'\n## {title}\n')[1].split('\n## ')[0]
        yield from re.findall(r'^(?:python|torchrun \S+) (tools/.+)$', block, re.M)


def test_commands_of_the_page_run(home, monkeypatch, capsys):
    """At a small size: 16 px, few neighbours, one epoch."""
    found = list(commands(*SECTIONS))
    assert len(found) >= 10
    found.sort(key=lambda command: 'fewshot' not in command)  # lists come first
    monkeypatch.chdir(home)
    for command in found:
        tool, *words = shlex.split(command)
        if tool == 'tools/fewshot_lists.py':
            assert fewshot.main(words) == 0
            continue
        small = ['protocol.resize=32', 'protocol.crop=32', 'protocol.num_workers=0']
        if 'knn' in words[0]:
            small.append('protocol.ks=[2]')
        if 'imagenet.py' in words[0]:
            small += ['protocol.epochs=1', 'protocol.batch_size=6']
        if words[1].startswith('timm:'):
            assert timm.is_model(words[1].removeprefix('timm:').partition('.')[0])
            words[1] = 'work_dirs/point/backbone.safetensors'
        if '--cfg-options' not in words:
            words.append('--cfg-options')
        assert main([*words, *small]) == 0, (command, capsys.readouterr().err)


def test_published_figures_have_commands_that_parse():
    block = PAGE.read_text().split('## Check the protocols against published')[1]
    found = re.findall(r'`python (tools/evaluate\.py [^`]+)`', block)
    assert len(found) >= 6
    for command in found:
        _, config, checkpoint, *_ = shlex.split(command)
        cfg = Config.fromfile(ROOT / config)
        EVALUATORS.build(cfg.protocol)
        assert timm.is_model_pretrained(checkpoint.removeprefix('timm:'))


def test_page_names_every_set():
    from densessl.evaluation.linear_suite import SETS

    block = PAGE.read_text().split('\n## Linear suite\n')[1].split('\n## ')[0]
    words = dict(
        accuracy='accuracy',
        mean_per_class='mean per class',
        map_11_point='11-point mAP',
        roc_auc='ROC-AUC',
    )
    rows = [line for line in block.splitlines() if line.startswith('| `')]
    listed = {
        name: row.split('|')[3].strip()
        for row in rows
        for name in re.findall(r'`(\w+)`', row.split('|')[1])
    }
    assert listed == {name: words[metric] for name, metric in SETS.items()}

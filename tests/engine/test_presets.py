"""Presets: what is chosen, how it is fitted to a machine, and that it trains."""

import copy
import re
import shlex
from functools import cache
from itertools import product

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config

from densessl.engine.launch import main, parse_args
from densessl.engine.presets import (
    GIB,
    NAMES,
    PROCESSES,
    Machine,
    Pictures,
    choose,
    fit_preset,
    preset_path,
)
from densessl.engine.sizing import fit_sides, image_bytes, images_at_once, split_batch
from densessl.models.heads import PointHead, RegionHead, SelfPatchHead
from densessl.registry import MODELS

PAGE = (ROOT / 'docs/presets.md').read_text()
CPU = Machine(gpus=0, processes=1, local_processes=1, memory=8 * GIB, cores=2.0)


def machine(gpus: int, processes: int, gib: float = 24, cores: float = 16) -> Machine:
    return Machine(gpus, processes, min(processes, gpus), int(gib * GIB), cores)


def large(count: int = 5000) -> Pictures:
    return Pictures(count, ('photos',), 480.0)


@cache
def parsed(name: str) -> Config:
    return Config.fromfile(preset_path(name))


def config(name: str) -> Config:
    return copy.deepcopy(parsed(name))


def crops(cfg: Config) -> list:
    return next(s for s in cfg.train_dataloader.dataset.pipeline if 'views' in s).views


def images_of_a_step(name: str) -> int:
    processes = PROCESSES.get(name.split('_')[-1], 1)
    return parsed(name).train_dataloader.batch_size * processes


@pytest.fixture
def photos(tmp_path):
    """40 pictures of 64 x 80 pixels, in two folders."""
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / 'photos' / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 256, (64, 80, 3), np.uint8)
        cv2.imwrite(str(folder / f'{i}.{("jpg", "png")[i % 3 == 0]}'), image)
    return tmp_path / 'photos'


def test_the_files_are_the_names():
    files = {path.stem for path in (ROOT / 'configs/presets').glob('*.py')}
    assert files == set(NAMES) and len(NAMES) == 9


@pytest.mark.parametrize(
    ('count', 'size'),
    [
        (1, '1k'),
        (999, '1k'),
        (1000, '1k'),
        (2999, '1k'),
        (3000, '10k'),
        (9999, '10k'),
        (10_000, '10k'),
        (29_999, '10k'),
        (30_000, '100k'),
        (299_999, '100k'),
        (300_000, '1m'),
        (14_000_000, '1m'),
    ],
)
def test_size_follows_from_the_number_of_pictures(count, size):
    assert choose(count, machine(1, 1)) == f'{size}-pictures_1gpu'
    assert choose(count, machine(8, 8)) == f'{size}-pictures_8gpu'
    assert choose(count, CPU) == 'cpu'


def test_hardware_follows_from_the_processes_not_the_gpus():
    found = [choose(1000, machine(8, n)).split('_')[-1] for n in (1, 2, 3, 4, 8, 16)]
    assert found == ['1gpu'] * 3 + ['8gpu'] * 3


@given(
    images=st.integers(1, 2048), processes=st.integers(1, 64), fits=st.integers(1, 600)
)
def test_parts_are_equal_fit_and_are_the_fewest(images, processes, fits):
    each, parts = split_batch(images, processes, fits)
    assert each % parts == 0 and each // parts <= fits
    for fewer in range(1, parts):
        assert each % fewer or each // fewer > fits
    if images % processes == 0:
        assert each * processes == images
    else:  # a multiple of 8, at most half of one off
        assert each == 1 or each % 8 == 0
        assert abs(each * processes - images) <= max(4, images / processes) * processes


@pytest.mark.parametrize('name', NAMES)
def test_images_of_a_step_are_the_presets_on_any_machine(name):
    for gib, processes in product((6, 24, 141), (1, 2, 8, 16)):
        cfg = config(name)
        lines = fit_preset(cfg, large(), machine(8, processes, gib))
        each, parts = cfg.train_dataloader.batch_size, cfg.model.accumulate
        assert each * processes == images_of_a_step(name)
        assert each % parts == 0
        part = each // parts
        assert f'x {parts} part(s) of {part},' in '\n'.join(lines)
        need = image_bytes(cfg.model.backbone, crops(cfg), 'cuda')
        assert part <= images_at_once(gib * GIB, need, each, crops(cfg))


@pytest.mark.parametrize('name', NAMES)
def test_configs_are_written_for_24_gib(name):
    cfg = config(name)
    processes = PROCESSES.get(name.split('_')[-1], 1)
    written = cfg.train_dataloader.batch_size, cfg.model.get('accumulate', 1)
    fit_preset(cfg, large(), machine(processes, processes))
    assert (cfg.train_dataloader.batch_size, cfg.model.accumulate) == written


def saved_bytes(backbone: dict, side: int, bf16: bool) -> float:
    """What autograd keeps of one view in a ViT or Swin, without the cast weights."""
    torch.manual_seed(0)
    model = MODELS.build(backbone).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = []
    for batch in (1, 3):
        kept = {}

        def pack(tensor, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage  # alive, so no address comes twice
            return tensor

        views = torch.randn(batch, 3, side, side)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast('cpu', torch.bfloat16, enabled=bf16),
        ):
            model(views)
        sizes.append(sum(storage.nbytes() for storage in kept.values()))
    return (sizes[1] - sizes[0]) / 2


@pytest.mark.parametrize('device', ['cuda', 'cpu'])
@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='VisionTransformer', arch='tiny', patch_size=16, cls_token=False),
        dict(type='SwinTransformer', arch='tiny', window_size=7),
    ],
    ids=['vit', 'swin'],
)
def test_memory_of_a_view_against_what_autograd_keeps(backbone, device):
    for side in (96, 224):
        estimate = image_bytes(backbone, [dict(size=side)], device)
        saved = saved_bytes(backbone, side, bf16=device == 'cuda')
        counted = dict(cuda=48, cpu=80)[device]
        values = estimate / counted
        print(f'{side} px, {device}: {saved / values:.0f} of {counted} bytes a value')
        assert saved < estimate < 2.2 * saved


def test_memory_of_other_backbones_is_not_made_up():
    cfg = config('1k-pictures_1gpu')
    cfg.model.backbone = dict(type='CvT')
    line = '\n'.join(fit_preset(cfg, large(), machine(1, 1, 4)))
    assert cfg.model.accumulate == 1 and 'memory of an image is not known' in line


@pytest.mark.parametrize(
    ('sides', 'picture', 'stride', 'expected'),
    [
        ([224, 224, 96], 480, 16, [224, 224, 96]),
        ([224, 224, 96], 224, 32, [224, 224, 96]),
        ([224, 224, 96], 223, 16, [208, 208, 96]),  # 96 x 208 / 224 = 89.1
        ([224, 224, 96], 223, 32, [192, 192, 96]),
        ([224, 224, 96], 128, 16, [128, 128, 64]),  # 54.9
        ([224, 224, 96], 64, 16, [96, 96, 48]),  # 41.1, and the least of 3 x 3 patches
        ([224, 224, 96], 64, 32, [96, 96, 64]),
        ([64], 32, 8, [64]),
    ],
)
def test_views_of_small_pictures(sides, picture, stride, expected):
    assert fit_sides(sides, picture, stride) == expected


def test_options_of_the_command_line_stay():
    cfg = config('10k-pictures_8gpu')
    cfg.train_dataloader.batch_size, cfg.train_dataloader.num_workers = 24, 13
    options = ('train_dataloader.batch_size', 'train_dataloader.num_workers')
    small = Pictures(5000, ('x',), 64.0)
    mine = 'train_dataloader.dataset.pipeline.1.views.0.flip'
    fit_preset(cfg, small, machine(4, 4, 8), (*options, mine))
    assert cfg.train_dataloader.batch_size == 24  # of each process
    assert cfg.train_dataloader.num_workers == 13
    assert crops(cfg)[0]['size'] == 224
    assert cfg.model.accumulate > 1  # follows the batch
    fit_preset(cfg, small, machine(4, 4, 8), (*options, mine, 'model.accumulate'))
    cfg.model.accumulate = 12
    fit_preset(cfg, small, machine(4, 4, 8), (*options, mine, 'model.accumulate'))
    assert cfg.model.accumulate == 12


def test_workers_share_the_cores():
    for cores, processes, expected in ((16, 1, 10), (16, 8, 2), (0.5, 1, 1), (2, 8, 1)):
        cfg = config('1k-pictures_1gpu')
        fit_preset(cfg, large(), machine(8, processes, cores=cores))
        assert cfg.train_dataloader.num_workers == expected


def test_advice():
    def advice(name, count, where) -> str:
        return '\n'.join(fit_preset(config(name), large(count), where))

    line = advice('1k-pictures_1gpu', 299, machine(8, 1))
    assert 'few pictures' in line and 'configs/methods/continue' in line
    assert '7 of 8 stay idle' in line and '--preset=auto 8' in line
    line = advice('1k-pictures_8gpu', 300, machine(8, 8))
    assert 'few pictures' not in line and 'idle' not in line and 'no GPU' not in line
    for name in ('cpu', '1m-pictures_1gpu'):
        line = advice(name, 300, CPU)
        assert 'no GPU' in line and 'quickstart' in line and 'fewer than one' in line


TINY_VIT = ['model.backbone.arch._delete_=True', 'model.backbone.arch.embed_dims=32']
TINY_VIT += ['model.backbone.arch.depth=1', 'model.backbone.arch.num_heads=2']
TWO_STEPS = [
    'train_dataloader.batch_size=4',
    'train_dataloader.num_workers=0',
    'train_dataloader.sampler.length=8',
    'train_cfg.max_epochs=1',
    'default_hooks.report.probe=False',
    'default_hooks.report.size=64',
]


def small(*heads: str) -> list[str]:
    options = []
    for head in heads:
        base = f'model.heads.{head}'
        options += [f'{base}.out_dims=16', f'{base}.projector.hidden_dims=16']
        options += [f'{base}.projector.bottleneck_dims=8']
    return options


def test_auto_trains_on_40_small_pictures(photos, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Machine, 'look', classmethod(lambda cls: CPU))
    work = tmp_path / 'run'
    options = [*small('view', 'points'), *TWO_STEPS]
    options += ['model.backbone.arch.embed_dims=48', 'model.backbone.arch.depth=1']
    words = ['--preset', 'auto', '--data', photos, '--work-dir', work]
    assert main([str(w) for w in (*words, '--cfg-options', *options)]) == 0
    out = capfd.readouterr().out
    for part in (
        'preset cpu',
        f'40 in {photos}, shorter side 64 px',
        'few pictures',
        'no GPU',
        '4 images a step = 1 process(es) x 1 part(s) of 4, 2 steps',
        'workers: 0 a process',
    ):
        assert part in out
    assert (work / 'step_00000002.pth').exists()
    assert (work / 'backbone.safetensors').exists()


@pytest.mark.parametrize(
    ('name', 'options', 'sides'),
    [
        (
            '1k-pictures_1gpu',
            [
                *small('view', 'region'),
                'model.backbone.arch._delete_=True',
                'model.backbone.arch.embed_dims=8',
                'model.backbone.arch.depths=[1,1,1,1]',
                'model.backbone.arch.num_heads=[1,1,2,2]',
            ],
            '96 + 64',
        ),
        (
            '100k-pictures_1gpu',
            [*small('view', 'selfpatch'), *TINY_VIT, 'model.neck.num_heads=2'],
            '96 + 48',
        ),
    ],
)
def test_named_presets_train(name, options, sides, photos, tmp_path, capfd):
    work = tmp_path / 'run'
    words = ['--preset', name, '--data', photos, '--work-dir', work]
    options = [*options, *TWO_STEPS, 'model.accumulate=2']
    assert main([str(w) for w in (*words, '--cfg-options', *options)]) == 0
    out = capfd.readouterr().out
    assert f'preset {name}' in out and f'views: {sides} px in place of 224 + 96' in out
    assert 'x 2 part(s) of 2, 2 steps' in out
    assert (work / 'step_00000002.pth').exists()


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        (['--preset', 'auto'], ['--preset auto', '--data DIR']),
        (
            ['--preset', '10k-picture_1gpu', '--data', 'x'],
            ["did you mean '10k-pictures_1gpu'", 'choose auto'],
        ),
        (['--preset', 'fast', '--data', 'x'], ['no such preset; choose auto, cpu']),
        (['--preset', 'auto', '--data', 'empty'], ["'empty' holds no picture", 'jpg']),
        (['--preset', 'auto', '--data', 'gone'], ["'gone' is no folder"]),
        (
            ['configs/x.py', '--preset', 'auto', '--data', 'x'],
            ['configs/x.py', '--preset auto', 'give one of them'],
        ),
        ([], ['give one of them', '--preset auto --data DIR']),
    ],
)
def test_wrong_input_ends_in_one_line(words, expected, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'notes.txt').write_text('none')
    assert main(words) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith('error: ')
    for part in expected:
        assert part in line


def test_unreadable_headers_are_passed_over(photos):
    for path in list((photos / '0').iterdir()):
        path.write_bytes(b'no picture')
    found = Pictures.look([str(photos)])
    assert (found.count, found.side) == (40, 64)
    for path in list((photos / '1').iterdir()):
        path.write_bytes(b'')
    assert Pictures.look([str(photos)]).side is None


def test_arrays_and_several_folders(photos, tmp_path):
    (tmp_path / 'bands').mkdir()
    for i in range(60):
        np.save(tmp_path / 'bands' / f'{i}.npy', np.zeros((30, 50, 5), np.uint16))
    folders = [str(photos), str(tmp_path / 'bands')]
    found = Pictures.look(folders, ('jpg', 'png', 'npy'))
    assert (found.count, found.side) == (100, 30)


def described(name: str) -> list[str]:
    """The table's row for a preset, from its config."""
    cfg = config(name)
    loader, heads, backbone = cfg.train_dataloader, cfg.model.heads, cfg.model.backbone
    methods = {RegionHead: 'GLSD', SelfPatchHead: 'SelfPatch', PointHead: 'DenseDINO'}
    (method,) = [
        m for c, m in methods.items() if MODELS.get(heads[list(heads)[1]].type) is c
    ]
    arch = backbone.arch
    arch = {'tiny': 'T', 'small': 'S'}[arch] if isinstance(arch, str) else 3
    if backbone.type == 'SwinTransformer':
        network = f'Swin-{arch}/{backbone.window_size}'
    elif arch == 3:
        network = f'ViT/{backbone.patch_size}, 3 blocks of 96'
    else:
        arch = 'Ti' if arch == 'T' else arch
        network = f'ViT-{arch}/{backbone.patch_size}'
    counts, scales = {}, {}
    for view in crops(cfg):
        counts[view['size']] = counts.get(view['size'], 0) + view.get('count', 1)
        scales[view['size']] = '{:g}-{:g}'.format(*view['scale'])
    processes = PROCESSES.get(name.split('_')[-1], 1)
    images = loader.batch_size * processes
    batch = f'{processes} x {loader.batch_size}' if processes > 1 else f'{images}'
    length, epochs = loader.sampler.length, cfg.train_cfg.max_epochs
    dims = [head.out_dims for head in heads.values()]
    return [
        f'`{name}`',
        method,
        network,
        ' + '.join(f'{n} x {size}' for size, n in counts.items()),
        ', '.join(scales.values()),
        f'{length:,}',
        f'{epochs}',
        batch,
        f'{epochs * (length // images):,}',
        ', '.join(map(str, dims)),
        f'{cfg.model.teacher_momentum:g}',
        f'{cfg.model.get("accumulate", 1)}',
    ]


def test_the_table_of_the_page_is_the_configs():
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in PAGE.splitlines()
        if line.startswith(('| `cpu', *(f'| `{name}`' for name in NAMES)))
    ]
    rows = [row for row in rows if len(row) == 12]
    assert rows == [described(name) for name in (*NAMES[1:], 'cpu')]


def test_commands_of_the_page_name_presets():
    commands = re.findall(r'^python tools/train\.py (.+)$', PAGE, re.MULTILINE)
    presets = [parse_args(shlex.split(c)).preset for c in commands if 'preset' in c]
    assert 'auto' in presets and set(presets) <= {'auto', *NAMES}
    for launcher in re.findall(r'^bash tools/dist_train\.sh (.+)$', PAGE, re.MULTILINE):
        first, processes, *rest = shlex.split(launcher)
        assert processes.isdigit() and parse_args([first, *rest]).preset == 'auto'

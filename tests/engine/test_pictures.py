"""Folders of pictures of any channels and depth train, resume and are looked at."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import small_config as make_small_config
from mmengine.config import Config

import densessl
from densessl.datasets import channel_statistics, collate_views
from densessl.engine.launch import load_config, main, parse_args
from densessl.engine.pictures import use_pictures
from densessl.errors import DenseSSLError
from densessl.evaluation.main import main as evaluate
from densessl.interop.backbone import save_backbone
from densessl.registry import DATASETS, MODELS
from densessl.visualization.main import main as visualize

SIDE = 40
FAST = (
    '--cfg-options',
    'train_dataloader.num_workers=0',
    'train_cfg.max_epochs=2',
    'default_hooks.checkpoint.interval_steps=2',
)


def write_tiff(path, image):
    tifffile = pytest.importorskip('tifffile')
    options = dict(photometric='minisblack', planarconfig='contig')
    tifffile.imwrite(path.with_suffix('.tif'), image, **options)


def write_png(path, image):
    cv2.imwrite(str(path.with_suffix('.png')), image)


def write_npy(path, image):
    np.save(path.with_suffix('.npy'), np.moveaxis(image, 2, 0))


KINDS = dict(
    tiff_of_5=(5, 16, write_tiff),
    grey_of_16_bits=(1, 16, write_png),
    rgba=(4, 8, write_png),
    npy_of_2=(2, 8, write_npy),
    rgb_of_16_bits=(3, 16, write_png),
)


def make_folder(folder, channels, bits, write, count=16):
    """Pictures with edges; each channel has a level of its own."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(channels)
    for i in range(count):
        coarse = rng.integers(0, 2**bits, (4, 4, channels)) / np.arange(1, channels + 1)
        planes = [
            cv2.resize(plane, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
            for plane in np.moveaxis(coarse, 2, 0)
        ]
        write(folder / f'{i:02d}', np.stack(planes, -1).astype(f'uint{bits}'))
    return folder


@pytest.fixture(scope='module', params=KINDS)
def run(request, tmp_path_factory):
    """A finished run on a folder of one kind: its config, data and options."""
    folder = tmp_path_factory.mktemp(request.param)
    channels, bits, write = KINDS[request.param]
    data = make_folder(folder / 'data', channels, bits, write)
    config = make_small_config.__wrapped__(folder)
    options = channel_statistics(data).options.split()
    command = [str(config), '--data', str(data)]
    common = [*command, *FAST, *options]
    assert main([*common, '--work-dir', str(folder / 'run')]) == 0
    return folder, common, channels, bits


def final(work_dir):
    return torch.load(work_dir / 'step_00000008.pth', weights_only=True)


def test_trains_and_resumes_exactly(run, tmp_path):
    folder, common, channels, _ = run
    wanted = final(folder / 'run')
    shutil.copy(folder / 'run' / 'step_00000006.pth', tmp_path)  # in an epoch
    assert main([*common, '--work-dir', str(tmp_path), '--resume']) == 0
    found = final(tmp_path)
    for part in ('state_dict', 'optim_wrapper'):
        assert flat(found[part]) == flat(wanted[part])
    weight = wanted['state_dict']['backbone.patch_embed.proj.weight']
    assert weight.shape[1] == channels
    first = torch.load(folder / 'run' / 'step_00000002.pth', weights_only=True)
    before = first['state_dict']['backbone.patch_embed.proj.weight']
    assert (weight - before).abs().amax((0, 2, 3)).min() > 0  # every channel learns


def flat(value):
    """Nested values with tensors as bytes, to be compared at once."""
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [flat(item) for item in value]
    return value.numpy().tobytes() if torch.is_tensor(value) else value


def test_the_run_says_what_it_was_trained_on(run):
    folder, _, channels, bits = run
    statistics = channel_statistics(folder / 'data')
    backbone = densessl.load_backbone(folder / 'run' / 'backbone.safetensors')
    np.testing.assert_allclose(backbone.mean, statistics.mean, rtol=1e-5)
    np.testing.assert_allclose(backbone.std, statistics.std, rtol=1e-5)
    assert max(backbone.mean) > 255 or bits == 8
    tokens = backbone(torch.zeros(1, channels, 32, 32))
    assert tokens.grid == (4, 4)
    assert (folder / 'run' / 'features.png').stat().st_size > 1000


def test_views_of_the_run_are_normalised(run):
    _, common, channels, _ = run
    cfg = load_config(parse_args(common))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    plain = dict(jitter=0.0, blur=0.0)
    for recipe in dataset.transforms[1].views:
        for key, value in plain.items():
            object.__setattr__(recipe, key, value)
    batch = collate_views([dataset[i] for i in range(16)])
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    views = preprocessor(batch)['inputs']['global']
    assert views.shape[2] == channels
    assert views.mean((0, 1, 3, 4)).abs().max() < 0.5
    assert (views.std((0, 1, 3, 4)) - 1).abs().max() < 0.5


def test_frozen_features_are_drawn(run, tmp_path):
    folder, *_ = run
    weights = str(folder / 'run' / 'backbone.safetensors')
    pictures = [str(path) for path in sorted((folder / 'data').iterdir())[:2]]
    for command in ('pca', 'similarity', 'attention'):
        out = ['--size', '32', '--out', str(tmp_path)]
        assert visualize([command, weights, *pictures, *out]) == 0
    assert (tmp_path / 'pca.png').is_file()


def test_labelled_masks_are_learnt_on_such_pictures(run, tmp_path, capsys):
    folder, _, channels, bits = run
    write = next(w for c, b, w in KINDS.values() if (c, b) == (channels, bits))
    for split in ('train', 'val'):
        make_folder(tmp_path / 'images' / split, channels, bits, write, count=4)
        masks = tmp_path / 'annotations' / split
        masks.mkdir(parents=True)
        for i in range(4):
            mask = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) % 2
            cv2.imwrite(str(masks / f'{i:02d}.png'), mask)
    config, out = tmp_path / 'protocol.py', tmp_path / 'out'
    weights = str(folder / 'run' / 'backbone.safetensors')
    head = 'head=dict(epochs=1, batch_size=2, train_mask_size=16)'
    for name, more in (
        ('LinearSegmentationProtocol', head),
        ('KMeansSegmentation', ''),
    ):
        config.write_text(f'protocol = dict(type={name!r}, classes=2, size=32, {more})')
        arguments = [str(config), weights, '--data', str(tmp_path)]
        assert evaluate([*arguments, '--out', str(out)]) == 0
        found = max(out.rglob('*.json'), key=lambda path: path.stat().st_mtime_ns)
        assert 'miou' in json.dumps(json.loads(found.read_text()))


def test_workers_hand_on_16_bits_and_name_the_odd_picture(tmp_path, capsys):
    data = make_folder(tmp_path / 'data', *KINDS['tiff_of_5'])
    config = make_small_config.__wrapped__(tmp_path)  # 2 workers
    options = [*channel_statistics(data).options.split(), 'train_cfg.max_epochs=1']
    command = [str(config), '--data', str(data), '--cfg-options', *options]
    assert main([*command, '--work-dir', str(tmp_path / 'a')]) == 0
    assert (tmp_path / 'a' / 'step_00000004.pth').is_file()
    write_tiff(data / '07.tif', np.zeros((SIDE, SIDE, 4), np.uint16))
    capsys.readouterr()
    assert main([*command, '--work-dir', str(tmp_path / 'b')]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"'{data / '07.tif'}' has 4 channels of 16 bits, and 5 channels" in line


def test_rgb_weights_start_it_where_asked_for(run, tmp_path, capsys):
    _, common, channels, _ = run
    backbone = load_config(parse_args(common)).model.backbone.to_dict()
    torch.manual_seed(5)
    rgb = MODELS.build(backbone | dict(in_channels=3))
    weights = tmp_path / 'rgb.safetensors'
    about = dict(mean=[120.0] * 3, std=[60.0] * 3)
    save_backbone(weights, rgb, backbone | dict(in_channels=3), **about)
    still = ['optim_wrapper.optimizer.lr=0.0', 'train_cfg.max_epochs=1']
    command = [*common, *still, '--work-dir', str(tmp_path / 'run')]
    start = ['--init-from', str(weights)]
    if channels != 3:
        assert main([*command, *start]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f'in_channels={channels}; spread' in line
    assert main([*command, *start, '--inflate-channels']) == 0
    found = densessl.load_backbone(tmp_path / 'run' / 'backbone.safetensors')
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        wanted = rgb.eval()(grey.expand(-1, 3, -1, -1)).patches
        answer = found(grey.expand(-1, channels, -1, -1)).patches
    torch.testing.assert_close(answer, wanted, rtol=1e-3, atol=1e-4)


def config_of(**pictures):
    cfg = Config.fromfile('configs/quickstart/selfpatch_vit-t8_demo.py')
    cfg.pictures = pictures
    return cfg


@pytest.mark.parametrize(
    ('pictures', 'match'),
    [
        (dict(channels='rgb', bits=16), 'makes RGB of 8 bits'),
        (dict(channels='grey'), "give 'rgb' or a number"),
        (dict(channels=0), "channels=0, bits=8; give 'rgb'"),
        (dict(channels=2, bits=12), 'bits=12'),
        (dict(channels=2, bits=16), 'channel_statistics finds them'),
        (dict(channels=2, mean=[1, 2], std=[1]), 'give 2 numbers in each'),
        (dict(channels=2, mean=[1, 256], std=[1, 1]), r'mean in 0\.\.255'),
        (dict(channels=2, mean=[1, 2], std=[1, 0.5]), 'std from 1'),
        (dict(channel=2), "nothing reads the key 'channel'"),
    ],
)
def test_wrong_pictures_end_in_one_line(pictures, match, monkeypatch):
    monkeypatch.chdir(densessl.__path__[0] + '/..')
    with pytest.raises(DenseSSLError, match=match) as error:
        use_pictures(config_of(**pictures))
    assert '\n' not in str(error.value)


def test_rgb_is_left_as_it_is_and_others_reach_all_parts(monkeypatch, tmp_path):
    monkeypatch.chdir(densessl.__path__[0] + '/..')
    path = 'configs/methods/esvit_resnet50.py'
    plain, rgb = Config.fromfile(path), Config.fromfile(path)
    use_pictures(rgb)
    assert rgb.to_dict() == plain.to_dict()
    rgb.pictures = dict(channels=4, mean=[1, 2, 3, 4], std=[5, 6, 7, 8])
    for _ in range(2):  # twice changes nothing more
        use_pictures(rgb)
        reader, crop = rgb.train_dataloader.dataset.pipeline
        assert reader == dict(type='LoadChannels', channels=4, bits=8)
        assert crop == plain.train_dataloader.dataset.pipeline[1]
        assert rgb.model.backbone.in_channels == 4
        normalization = dict(mean=[1, 2, 3, 4], std=[5, 6, 7, 8])
        found = rgb.model.data_preprocessor.to_dict()
        assert found == dict(type='ViewPreprocessor', **normalization)


def test_what_is_rgb_only_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(densessl.__path__[0] + '/..')
    cfg = config_of(channels=1, bits=16, mean=300.0, std=20.0)
    cfg.default_hooks.probe = dict(type='ProbeHook', knn='labelled')
    with pytest.raises(DenseSSLError, match=r'probe\.knn: labelled pictures are'):
        use_pictures(cfg)
    # the built-in scenes: told by the first batch
    config = make_small_config.__wrapped__(tmp_path)
    with config.open('a') as file:
        file.write('pictures = dict(channels=1, mean=[100], std=[50])\n')
    assert main([str(config), '--work-dir', str(tmp_path / 'a'), *FAST]) == 2
    found = capsys.readouterr().err
    assert 'mean and std are of 1 channels and the pictures have 3' in found

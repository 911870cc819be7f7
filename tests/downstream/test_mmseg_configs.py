"""Configs for MMSegmentation: each builds, learns and is what its name says."""

from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config, utils
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData

pytest.importorskip('mmseg', reason='MMSegmentation is not installed')

from densessl.interop import mmcv_ops

FOLDER = ROOT / 'configs/downstream/mmseg'
LEAVES = sorted(FOLDER.glob('*.py'))
SETS = dict(  # classes, steps; the height and width of a crop
    ade20k=(150, 160_000, (512, 512)),
    pascal_context=(60, 80_000, (480, 480)),
    voc2012=(21, 80_000, (512, 512)),
    cityscapes=(19, 80_000, (512, 1024)),
    bdd100k=(19, 80_000, (512, 1024)),
    camvid=(11, 20_000, (512, 512)),
    idd=(26, 80_000, (512, 1024)),
    kitti=(19, 20_000, (512, 512)),
    sunrgbd=(37, 80_000, (512, 512)),
    potsdam=(6, 80_000, (512, 512)),
    suim=(8, 40_000, (512, 512)),
)
NETS = {  # millions of parameters of the classifiers, less the classifier's own
    'vit-ti16': 5.5,  # arXiv:2012.12877, Table 1: 5, 22 and 86
    'vit-s16': 21.7,
    'vit-b16': 85.8,
    'swin-t': 27.5,  # arXiv:2103.14030, Table 1: 29, 50 and 88, with 1000 classes
    'swin-s': 48.8,
    'swin-b': 86.7,
}
STEPS = {'semantic-fpn': 40_000, 'upernet': 160_000}
PARAMETERS = ('weight', 'bias')
WIDTHS = {'embed_dims', 'in_channels', 'channels', 'out_channels'}


READ_ONCE = cache(utils.load)  # else 50 files of mmseg are read for each base


@pytest.fixture(autouse=True)
def inside_mmseg(monkeypatch):
    """As in its own tools: its scope, and mmcv with ops or what stands in for them."""
    mmcv_ops.install()
    import mmseg.datasets
    import mmseg.engine
    import mmseg.evaluation
    import mmseg.models  # noqa: F401

    monkeypatch.setattr(utils, 'load', READ_ONCE)
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def parts(path: Path) -> tuple[str, str, str]:
    """Decoder, network and data set, of the name."""
    return tuple(path.stem.split('_', 2))


def shrink(node, factor: int):
    """Every width of a model an eighth; what belongs together stays so."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, dict) or (isinstance(value, list) and key not in WIDTHS):
            shrink(value, factor)
        elif key in WIDTHS:
            many = isinstance(value, list)
            node[key] = [n // factor for n in value] if many else value // factor


def quick(path: Path):
    """One ViT with all decoders and sets, one Swin with all decoders; slow: all."""
    names = ('vit-s16', 'swin-t_ade', 'fpn_swin-t', 'small')
    marks = () if any(name in path.stem for name in names) else pytest.mark.slow
    return pytest.param(path, marks=marks, id=path.stem)


def test_every_decoder_network_and_set_has_its_config():
    expected = {f'linear_{net}_{data}' for net in NETS for data in SETS}
    expected |= {f'{decoder}_{net}_ade20k' for decoder in STEPS for net in NETS}
    expected |= {'semantic-fpn_swin-t_camvid'}  # docs/guide.md
    names = {path.stem for path in LEAVES}
    assert expected <= names
    assert all(name.startswith('camvid_small') for name in names - expected)


@pytest.mark.parametrize('path', [quick(path) for path in LEAVES])
def test_config_builds_and_gives_a_loss(path):
    from mmseg.registry import DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS
    from mmseg.structures import SegDataSample

    cfg = Config.fromfile(path)
    assert cfg.custom_imports['imports'] == ['densessl']
    assert not cfg.custom_imports['allow_failed_imports']
    assert [hook.type for hook in cfg.custom_hooks] == [
        'densessl.WeightFingerprintHook'
    ]
    for hook in (*cfg.default_hooks.values(), *cfg.custom_hooks):
        assert HOOKS.get(hook.type) is not None
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for step in datasets(loader)[0]['pipeline']:
            TRANSFORMS.build(step)
        for dataset in datasets(loader):
            found = dataset.get('metainfo') or DATASETS.get(dataset.type).METAINFO
            assert len(found['classes']) == cfg.model.decode_head.num_classes
    METRICS.build(cfg.val_evaluator)

    assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin
    assert cfg.param_scheduler[1].end == cfg.train_cfg.max_iters
    assert cfg.train_cfg.max_iters % cfg.train_cfg.val_interval == 0
    size = cfg.model.data_preprocessor.size
    assert size == cfg.crop_size
    if 'small' not in path.stem:
        decoder, net, data = parts(path)
        classes, steps, crop = SETS[data]
        assert cfg.model.decode_head.num_classes == classes and size == crop
        if data == 'ade20k':
            steps = STEPS.get(decoder, steps)
        assert cfg.train_cfg.max_iters == steps
        assert cfg.param_scheduler[0].end == 1500
        shrink(cfg.model, 8)
        if net.startswith('swin'):
            cfg.model.backbone.depths = (2, 2, 2, 2)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    check_decay(model, optimizer)

    void = cfg.model.decode_head.get('ignore_index', 255)
    masks = torch.randint(0, cfg.model.decode_head.num_classes, (2, 64, 96))
    masks[:, :9] = void
    samples = [SegDataSample(metainfo=dict(img_shape=(64, 96))) for _ in masks]
    for sample, mask in zip(samples, masks, strict=True):
        sample.gt_sem_seg = PixelData(data=mask[None])
    images = torch.randn(2, 3, 64, 96)
    losses = model.loss(images, samples)
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    expected = set()
    if path.stem.startswith('linear_swin'):
        assert cfg.find_unused_parameters  # else several processes stop
        expected = {f'backbone.norm{i}.{p}' for i in range(3) for p in PARAMETERS}
    assert unused == expected


def datasets(loader) -> list[dict]:
    """Data sets of a loader, also those that are joined in one."""
    return loader.dataset.get('datasets') or [loader.dataset]


def check_decay(model, optimizer):
    """No decay on norms, class token, positions and relative tables; else 0.01."""
    decay = {
        id(p): group['weight_decay']
        for group in optimizer.param_groups
        for p in group['params']
    }
    free = {'cls_token', 'pos_embed', 'relative_position_bias_table'}
    norms = (torch.nn.LayerNorm, torch.nn.modules.batchnorm._BatchNorm)
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            without = name in free or isinstance(module, norms)
            assert decay[id(parameter)] == (0 if without else 0.01), name
            seen.add(without)
    assert seen == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize('net', NETS)
def test_backbone_has_the_published_number_of_parameters(net):
    from mmseg.registry import MODELS

    cfg = Config.fromfile(FOLDER / f'_base_/backbones/{net}.py')
    backbone = MODELS.build(cfg.backbone)
    count = sum(p.numel() for p in backbone.parameters()) / 1e6
    assert count == pytest.approx(NETS[net], abs=0.06)
    if net.startswith('vit'):
        assert cfg.backbone.num_heads * 64 == cfg.backbone.embed_dims
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert [x.shape[1] for x in maps] == cfg.channels


LAYOUTS = dict(  # files of a picture and its mask, labels there, what they become
    camvid=('images/train/a.jpg', 'annotations/train/a.png', (0, 10, 11), (0, 10, 11)),
    kitti=('images/train/a.png', 'annotations/train/a.png', (0, 18, 255), (0, 18, 255)),
    suim=('images/train/a.jpg', 'annotations/train/a.png', (0, 7, 255), (0, 7, 255)),
    sunrgbd=('images/train/a.jpg', 'annotations/train/a.png', (0, 1, 37), (255, 0, 36)),
    idd=(
        'leftImg8bit/train/001/a_leftImg8bit.png',
        'gtFine/train/001/a_gtFine_labellevel3Ids.png',
        (0, 25, 255),
        (0, 25, 255),
    ),
)


@pytest.mark.parametrize('data', LAYOUTS)
def test_folders_are_read(data, tmp_path):
    from mmseg.registry import DATASETS

    picture, mask, labels, expected = LAYOUTS[data]
    for name, content in (
        (picture, np.full((40, 60, 3), 99, np.uint8)),
        (mask, np.repeat(np.array(labels, np.uint8), 20)[None].repeat(40, 0)),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), content)
    cfg = Config.fromfile(FOLDER / f'linear_vit-s16_{data}.py')
    assert Path(cfg.train_dataloader.dataset.data_root) == Path('data') / data
    dataset = DATASETS.build(
        dict(cfg.train_dataloader.dataset, data_root=str(tmp_path), pipeline=[])
    )
    assert len(dataset) == 1
    dataset = DATASETS.build(
        dict(
            cfg.train_dataloader.dataset,
            data_root=str(tmp_path),
            pipeline=[
                *cfg.train_dataloader.dataset.pipeline[:2],
                dict(type='PackSegInputs'),
            ],
        )
    )
    sample = dataset[0]
    assert sample['inputs'].shape == (3, 40, 60)
    found = sample['data_samples'].gt_sem_seg.data[0, 0, [0, 30, 59]]
    assert tuple(found.tolist()) == expected
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == cfg.train_dataloader.dataset.data_root
        assert 'val' in loader.dataset.data_prefix['img_path']


def test_void_of_camvid_counts_nowhere():
    cfg = Config.fromfile(FOLDER / 'linear_swin-t_camvid.py')
    assert cfg.model.decode_head.ignore_index == 11
    assert cfg.model.data_preprocessor.seg_pad_val == 11
    assert cfg.val_evaluator.ignore_index == cfg.test_evaluator.ignore_index == 11

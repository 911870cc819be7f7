"""The fine-tuning configs for MMDetection: each builds, trains and is what it says."""

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

pytest.importorskip('mmdet', reason='MMDetection is not installed')

from densessl.interop import mmcv_ops

FOLDER = ROOT / 'configs/downstream/mmdet'
NETS = {  # millions of parameters, less the classifier's; lr, pictures a step
    'mask-rcnn_vit-ti16_coco': (5.5, 5e-5, 8),  # arXiv:2012.12877, Table 1
    'mask-rcnn_vit-s16_coco': (21.7, 5e-5, 8),
    'mask-rcnn_swin-t_coco': (27.5, 1e-4, 16),  # arXiv:2103.14030, Table 1
}
DEMOS = ['demo_mask-rcnn_swin', 'demo_mask-rcnn_vit']


@pytest.fixture(autouse=True)
def inside_mmdet():
    """As in its own tools: its scope, and mmcv with ops or what stands in for them."""
    mmcv_ops.install()
    import mmdet.datasets
    import mmdet.engine
    import mmdet.evaluation
    import mmdet.models  # noqa: F401

    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def build(name: str) -> tuple[Config, nn.Module]:
    from mmdet.registry import MODELS

    cfg = Config.fromfile(FOLDER / f'{name}.py')
    cfg.model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=30)  # to be quick
    cfg.model.train_cfg.rcnn.sampler.num = 16
    cfg.model.backbone.drop_path_rate = 0.0  # by which a block may get no gradient
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for layer in model.modules():
        if isinstance(layer, nn.SyncBatchNorm):  # as mmengine does with one process
            layer.__class__ = nn.BatchNorm2d
    return cfg, model


def samples(height: int, width: int, classes: int) -> list:
    """Two pictures' worth of two boxes each, with their masks."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    boxes = torch.tensor([[8.0, 8, 40, 44], [30, 20, 90, 60]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    found = []
    for _ in range(2):
        shape = (height, width)
        sample = DetDataSample(
            metainfo=dict(
                img_shape=shape,
                batch_input_shape=shape,
                pad_shape=shape,
                ori_shape=shape,
                scale_factor=(1.0, 1.0),
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=boxes,
            labels=torch.tensor([0, classes - 1]),
            masks=BitmapMasks(masks.numpy(), height, width),
        )
        found.append(sample)
    return found


def test_every_network_has_its_config():
    assert {path.stem for path in FOLDER.glob('*.py')} == {*NETS, *DEMOS}


@pytest.mark.parametrize('name', [*NETS, *DEMOS])
def test_config_builds_and_gives_a_loss(name):
    from mmdet.registry import DATASETS, HOOKS, TRANSFORMS

    cfg, model = build(name)
    assert cfg.custom_imports['imports'] == ['densessl']
    assert not cfg.custom_imports['allow_failed_imports']
    (hook,) = cfg.custom_hooks
    assert type(HOOKS.build(hook)).__name__ == 'WeightFingerprintHook'
    classes = cfg.model.roi_head.bbox_head.num_classes
    assert cfg.model.roi_head.mask_head.num_classes == classes
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for step in loader.dataset.pipeline:
            TRANSFORMS.build(step)
        dataset = DATASETS.build(dict(loader.dataset, lazy_init=True, pipeline=[]))
        assert len(dataset.metainfo['classes']) == classes

    images = torch.randn(2, 3, 96, 128)  # neither square nor of pretraining's size
    model.train()
    losses = model.loss(images, samples(96, 128, classes))
    assert {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask'} <= {
        *losses
    }
    total = 0.0
    for key, value in losses.items():
        if 'loss' in key:
            total = total + sum(value if isinstance(value, list) else [value])
    assert total.isfinite()
    total.backward()
    for key, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    levels = model.extract_feat(images)
    strides = cfg.model.rpn_head.anchor_generator.strides
    assert [96 // stride for stride in strides[:4]] == [x.shape[2] for x in levels[:4]]
    assert len(levels) == len(strides)


@pytest.mark.parametrize('name', NETS)
def test_full_recipe(name):
    cfg, model = build(name)
    size, lr, batch = NETS[name]
    count = sum(p.numel() for p in model.backbone.parameters()) / 1e6
    # Swin: a norm after each stage; ViT: as published
    assert count == pytest.approx(size, abs=0.06)
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    assert cfg.optim_wrapper.optimizer.lr == lr
    assert cfg.optim_wrapper.optimizer.weight_decay == 0.05
    assert cfg.auto_scale_lr.base_batch_size == batch
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.param_scheduler[1].milestones == [8, 11]
    assert cfg.load_from is None and not cfg.model.backbone.get('init_cfg')
    if 'vit' in name:
        backbone = cfg.model.backbone
        assert [i + 1 for i in backbone.out_indices] == [4, 6, 8, 12]
        assert backbone.arch.embed_dims // backbone.arch.num_heads == 64
        assert model.backbone.layers[0].attn.num_heads == backbone.arch.num_heads
        for layer in model.backbone.modules():
            assert not isinstance(layer, nn.LayerNorm) or layer.eps == 1e-6


@pytest.mark.parametrize('name', [*NETS, *DEMOS])
def test_norms_and_tables_do_not_decay(name):
    cfg, model = build(name)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {
        id(parameter): group['weight_decay']
        for group in optimizer.param_groups
        for parameter in group['params']
    }
    spared = {'cls_token', 'pos_embed', 'relative_position_bias_table'}
    seen = set()
    for prefix, module in model.named_modules():
        norm = isinstance(module, nn.LayerNorm | nn.BatchNorm2d)
        for key, parameter in module.named_parameters(prefix, recurse=False):
            table = key.rpartition('.')[2] in spared
            assert decay[id(parameter)] == (0 if norm or table else 0.05), key
            seen.add(norm + 2 * table)
    assert seen == {0, 1, 2}


def test_vit_pads_pictures_to_whole_patches():
    cfg, _ = build('mask-rcnn_vit-s16_coco')
    patch = cfg.model.backbone.patch_size
    assert cfg.model.data_preprocessor.pad_size_divisor % patch == 0


def test_features_at_another_size_are_ours():
    """But for the 0.1 of DINO's code, position embeddings are resized in one way."""
    from densessl.interop.layouts import VIT_MMPRETRAIN
    from densessl.models.backbones import VisionTransformer

    ours = VisionTransformer(
        arch=dict(embed_dims=96, depth=4, num_heads=3),
        patch_size=8,
        img_size=64,
        cls_token=False,
        final_norm=True,
        pos_embed_offset=0.0,
    ).eval()
    nn.init.normal_(ours.pos_embed)
    _, model = build('demo_mask-rcnn_vit')
    backbone = model.backbone
    backbone.eval()
    backbone.load_state_dict(VIT_MMPRETRAIN.there(ours.state_dict()))
    images = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        expected, found = ours(images).patches, backbone(images)[-1]
    assert found.shape == (2, 96, 12, 20)
    torch.testing.assert_close(found.flatten(2).mT, expected, rtol=0, atol=1e-4)

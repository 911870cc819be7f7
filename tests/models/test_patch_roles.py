"""Patch tokens that no head reads are left out of the last block, and nothing else."""

import pytest
import torch
from conftest import (
    build_model,
    keep_gradients,
    model_config,
    optim_wrapper,
    point_config,
    views,
)
from torch import nn

from densessl.models.algorithms import self_distillation
from densessl.models.algorithms.encoding import Branch, patch_roles
from densessl.models.backbones import VisionTransformer
from densessl.models.heads import Head
from densessl.models.necks import AveragePoolNeck, ClassTokenNeck
from densessl.schedules import Progress

HEAD = dict(projector=dict(hidden_dims=48, bottleneck_dims=16))
VIT = model_config()['backbone'] | dict(cls_token=True, final_norm=True)
CLASS_TOKEN = dict(backbone=VIT, neck=dict(type='ClassTokenNeck'))
DINO = CLASS_TOKEN | dict(heads=dict(view=dict(type='ViewHead', out_dims=64, **HEAD)))
POINTS = point_config()
METHODS = dict(
    dino=DINO,
    drop_path=DINO | dict(backbone=VIT | dict(drop_path_rate=0.5)),
    low_memory=DINO | dict(backbone=VIT | dict(drop_path_rate=0.5), low_memory=True),
    densedino=POINTS | dict(backbone=VIT | dict(drop_path_rate=0.5)),
    dropped=DINO | dict(drop=dict(local=dict(type='PatchDrop', keep=5))),
    moby=CLASS_TOKEN
    | dict(heads=dict(view=dict(type='ContrastiveHead', queue_length=8, out_dims=16))),
)


def step(options):
    """Log, gradients, the rest of the state; rows through each backbone's MLPs."""
    model = build_model(**options).train()
    wrapper = optim_wrapper(model)
    grads, rows = keep_gradients(model, wrapper), []
    for branch in (model.teacher, model):
        for block in branch.backbone.blocks:
            block.mlp.register_forward_hook(
                lambda module, args, out: rows.append(out.shape[1])
            )
    model.progress = Progress(10, 100, 10)
    torch.manual_seed(0)
    log = model.train_step(views(), wrapper)
    state = {k: v for k, v in model.state_dict().items() if k not in grads}
    return log, grads, state, rows


@pytest.mark.parametrize('method', METHODS)
def test_step_is_that_of_all_tokens(method, double, monkeypatch):
    found = step(METHODS[method])
    monkeypatch.setattr(self_distillation, 'patch_roles', lambda *args: None)
    expected = step(METHODS[method])
    for a, b in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert any(grad.any() for grad in expected[1].values())
    assert sum(found[3]) < sum(expected[3])


def test_last_block_does_the_class_token_alone():
    rows = step(DINO)[3]  # teacher: global views; student: global, then local
    assert rows == [17, 1, 17, 1, 10, 1]


def test_patches_that_a_head_reads_are_there(double):
    heads = DINO['heads'] | dict(
        region=dict(type='RegionHead', matching='similarity', out_dims=40, **HEAD)
    )
    options = DINO | dict(heads=heads)
    assert step(options)[3] == [17, 17, 17, 17, 10, 10]
    resting = dict(end=1.0, start_epoch=5)  # a head that rests does not read
    heads['region']['loss_weight'] = resting
    assert step(options)[3] == [17, 1, 17, 1, 10, 1]


def test_all_tokens_for_whoever_asks_the_model():
    model = build_model(**DINO)
    data = model.data_preprocessor(views())
    features = model(**data, mode='tensor')
    assert features.tokens['global'].shape == (2, 4, 16, 32)


class Reader(Head):
    def __init__(self, student=None, teacher=None, reads=True):
        super().__init__()
        self.student_roles, self.teacher_roles = student, teacher
        self.needs_patches = reads


def test_roles_whose_patches_are_read():
    small = dict(embed_dims=16, depth=1, num_heads=2)
    branch = Branch(VisionTransformer(small), ClassTokenNeck(16), nn.ModuleDict())
    heads = dict(
        a=Reader(('x',), ('y',)), b=Reader(('z',), None), c=Reader(None, ('w',), False)
    )
    assert patch_roles(branch, heads, student=True) == {'x', 'z'}
    assert patch_roles(branch, heads, student=False) is None
    assert patch_roles(branch, dict(c=heads['c']), student=True) == set()
    branch.neck = AveragePoolNeck(16)
    assert patch_roles(branch, heads, student=True) is None
    branch.neck = nn.Identity()  # says nothing
    assert patch_roles(branch, dict(c=heads['c']), student=True) is None


@pytest.mark.parametrize('references', [None, 3])
def test_outputs_and_gradients_of_the_backbone(references):
    torch.manual_seed(0)
    model = VisionTransformer(
        dict(embed_dims=16, depth=2, num_heads=2), 8, img_size=32, drop_path_rate=0.4
    )
    model = model.double().train()
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    extra = None
    if references:
        extra = torch.randn(5, references, 16, dtype=torch.float64)
    results = []
    for patches in (True, False):
        torch.manual_seed(1)
        out = model(images, references=extra, patches=patches)
        asked = [x for x in (out.cls, out.references) if x is not None]
        loss = sum((x * x.sin()).sum() for x in asked)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        results.append([*asked, *grads, torch.rand(())])
        assert out.patches.shape == (5, 16 if patches else 0, 16)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

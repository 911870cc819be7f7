"""Parts of one's own, from outside the package: they train and do what they say."""

import copy
import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    build_model,
    model_config,
    optim_wrapper,
    view_geometry,
    views,
)

import densessl
from densessl.engine.checkpoint import list_runs
from densessl.models import Tokens
from densessl.models.heads import Head
from densessl.registry import MODELS, TRANSFORMS
from densessl.schedules import Progress

FOLDER = ROOT / 'examples/plugins'
PAGE = ROOT / 'docs/plugins.md'


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    importlib.import_module('place_regression')
    return importlib.import_module('parts')  # registers its parts, once a process


def test_page_shows_the_examples_as_they_are():
    blocks = re.findall(r'```python\n(.+?)```', PAGE.read_text(), re.DOTALL)
    for name in ('place_regression', 'parts', 'place_regression_demo'):
        assert (FOLDER / f'{name}.py').read_text() in blocks, name


def test_a_head_with_its_own_loss_fits_in_sixty_lines():
    assert len((FOLDER / 'place_regression.py').read_text().splitlines()) <= 60


def test_page_lists_all_that_a_head_may_say():
    table = PAGE.read_text().split('| `Head` | Says |')[1].split('\n\n')[0]
    rows = re.findall(r'^\| `(\w+)', table, re.MULTILINE)
    public = {name for name in vars(Head) if not name.startswith('_')}
    assert sorted(rows) == sorted(public | {'loss_weight'})


def test_command_of_the_page_trains_from_elsewhere(tmp_path):
    (command,) = re.findall(r'`(PYTHONPATH=examples/plugins .+?)`', PAGE.read_text())
    setting, python, tool, config = shlex.split(command)
    assert (setting, python) == ('PYTHONPATH=examples/plugins', 'python')
    # as after an installation: the package is found, and nothing else of the root
    (tmp_path / 'installed').mkdir()
    (tmp_path / 'installed/densessl').symlink_to(ROOT / 'densessl')
    paths = os.pathsep.join([str(FOLDER), str(tmp_path / 'installed')])
    options = [
        *('train_cfg.max_epochs=1', 'train_dataloader.batch_size=2'),
        *('train_dataloader.num_workers=0', 'train_dataloader.sampler.length=6'),
        *('model.backbone.embed_dims=16', 'custom_hooks.0.interval=1'),
        *('default_hooks.report.probe=False', 'default_hooks.report.size=64'),
        *('default_hooks.logger.interval=1', 'default_hooks.health.interval=1'),
    ]
    work_dir = tmp_path / 'run'
    result = subprocess.run(
        [
            *(sys.executable, ROOT / tool, ROOT / config, '--work-dir', work_dir),
            *('--cfg-options', *options),
        ],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': paths, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert [path.name for path in list_runs(work_dir)] == ['step_00000003.pth']
    (scalars,) = work_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    found = {key: [line[key] for line in lines if key in line] for key in EXPECTED}
    assert all(len(values) == 3 for values in found.values()), found
    assert min(found['loss_place']) > 0 and min(found['place/matched']) > 0
    assert found['teacher_gap'][-1] > 0
    backbone = densessl.load_backbone(work_dir / 'backbone.safetensors')
    tokens = backbone(torch.zeros(1, 3, 24, 40))
    assert tokens.grid == (3, 5) and tokens.patches.shape == (1, 15, 16)


EXPECTED = ('loss_view', 'loss_place', 'place/matched', 'teacher_gap')


def test_loss_is_the_equation_on_views_of_flips_and_crops():
    torch.manual_seed(0)
    heads = dict(place=dict(type='PlaceRegressionHead', hidden_dims=8))
    model = build_model(heads=heads, neck=dict(type='AveragePoolNeck'))
    for parameter in model.teacher.parameters():  # no longer the student's
        parameter.data.add_(0.02 * torch.randn(parameter.shape))
    batch = model.data_preprocessor(views(seed=3))
    head, places = model.heads['place'], batch['geometry']
    own, other = model.projectors['place'], model.teacher.projectors['place']
    crops = batch['inputs']['global']
    terms, tokens = [], 0
    with torch.no_grad():
        for v, i in ((0, 1), (1, 0)):
            f_s = model.backbone(crops[v]).patches
            f_t = model.teacher.backbone(crops[i]).patches
            for b in range(4):
                e, e_t = (places[b, k].token_centers((4, 4)) for k in (v, i))
                limit = max(float(places[b, k].token_diagonal((4, 4))) for k in (v, i))
                for m in range(16):
                    tokens += 1
                    distance = (e_t - e[m]).norm(dim=-1)
                    if distance.min() < limit / 2:
                        q = head.predictor(own(f_s[b, m]))
                        k = other(f_t[b, distance.argmin()])
                        terms.append(2 - 2 * torch.cosine_similarity(q, k, dim=0))
    out = model(**batch)
    assert 0 < len(terms) < tokens
    torch.testing.assert_close(out['loss_place'], sum(terms) / len(terms))
    assert out['place/matched'].item() == pytest.approx(len(terms) / tokens)


def test_the_head_trains_beside_others_and_every_parameter_moves():
    heads = model_config()['heads'] | dict(place=dict(type='PlaceRegressionHead'))
    model = build_model(heads=heads)
    before = copy.deepcopy(dict(model.named_parameters()))
    model.progress = Progress(10, 100, 10)
    log = model.train_step(views(), optim_wrapper(model))
    assert {'loss_view', 'loss_selfpatch', 'loss_place'} < log.keys()
    for name, parameter in model.named_parameters():
        fixed = name.endswith('weight_g')
        assert parameter.equal(before[name]) == fixed, name


def test_views_apart_give_a_loss_of_zero():
    heads = dict(place=dict(type='PlaceRegressionHead', hidden_dims=8))
    model = build_model(heads=heads, neck=dict(type='AveragePoolNeck'))
    batch = model.data_preprocessor(views())
    geometry = view_geometry(4, torch.Generator().manual_seed(0))
    geometry.box[:, 0] = torch.tensor([0.0, 0, 9, 9]).double()
    geometry.box[:, 1] = torch.tensor([70.0, 50, 9, 9]).double()
    out = model(batch['inputs'], geometry)
    out['loss'].backward()
    assert out['loss'] == 0 and out['place/matched'] == 0


@pytest.mark.parametrize('share', [0.0, 0.5, 1.0])
def test_erased_blocks_have_their_size_and_follow_the_generator(share):
    erase = TRANSFORMS.build(dict(type='EraseBlock', share=share))

    def one(seed):
        inputs = {'global': torch.zeros(3, 3, 8, 12, dtype=torch.uint8)}
        results = dict(inputs=inputs, rng=np.random.default_rng(seed))
        return erase(results)['inputs']['global']

    found = one(0)
    assert found.ne(0).sum((1, 2, 3)).tolist() == [3 * int(96 * share**2)] * 3
    assert set(found.unique().tolist()) <= {0, 127}
    assert found.equal(one(0))
    assert share != 0.5 or not all(found.equal(one(seed)) for seed in range(1, 5))


def test_tokens_of_the_backbone_are_in_raster_order():
    torch.manual_seed(0)
    backbone = MODELS.build(dict(type='PatchMixer', embed_dims=6, depth=0))
    images = torch.randn(2, 3, 16, 24)
    tokens = backbone(images)
    assert isinstance(tokens, Tokens) and tokens.grid == (2, 3)
    for row in range(2):
        for column in range(3):
            area = images[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            patch = backbone.norm(backbone.stem(area)[..., 0, 0])
            torch.testing.assert_close(tokens.patches[:, 3 * row + column], patch)

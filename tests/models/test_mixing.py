"""Heads of all methods in pairs, and heads that begin late or fade in."""

import ast
import copy
import itertools
import re

import pytest
import torch
from conftest import ROOT, build_model, model_config, optim_wrapper, views
from torch import nn

from densessl.engine.launch import main
from densessl.engine.loop import step_seed
from densessl.errors import DenseSSLError
from densessl.models.heads import Head
from densessl.models.necks import AveragePoolNeck
from densessl.registry import MODELS
from densessl.schedules import Progress

SMALL = dict(projector=dict(hidden_dims=16, bottleneck_dims=8))
QUERIES = dict(reference_role='global', query_roles=['global', 'local'])
# A new head joins by a line here: its config, and whether student and teacher see all
# views or the global ones alone ('some': with the queries).
HEADS = dict(
    view=(dict(type='ViewHead', out_dims=20, **SMALL), 'all', 'global'),
    selfpatch=(dict(type='SelfPatchHead', out_dims=20, **SMALL), 'all', 'all'),
    similarity=(
        dict(type='RegionHead', out_dims=20, matching='similarity', **SMALL),
        'all',
        'global',
    ),
    geometric=(
        dict(type='RegionHead', out_dims=20, matching='geometric', **SMALL),
        'all',
        'global',
    ),
    points=(dict(type='PointHead', out_dims=20, **SMALL), 'all', 'global'),
    position=(dict(type='PositionHead', grid=4, **QUERIES), 'some', 'global'),
    cluster=(
        dict(type='ClusterHead', out_dims=20, **SMALL, **QUERIES),
        'some',
        'global',
    ),
    contrastive=(
        dict(type='ContrastiveHead', out_dims=8, hidden_dims=16, queue_length=12),
        'global',
        'global',
    ),
    contrastive_patches=(
        dict(type='ContrastiveSelfPatchHead', out_dims=8, hidden_dims=16),
        'all',
        'all',
    ),
)
BACKBONES = dict(
    vit=model_config()['backbone'] | dict(final_norm=True),
    swin=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2]),
        img_size=32,
        window_size=4,
    ),
)
SIZES = dict(zip(('global', 'local', 'extra'), (32, 24, 24), strict=True))
SEEN = {'global': ['global'], 'some': ['global', 'local'], 'all': list(SIZES)}


def three_roles(seed=0):
    """2 x 32, 2 x 24 and, as a role of its own, 1 x 24 pixels."""
    batch = views(seed=seed)
    local = batch['inputs']['local']
    batch['inputs'].update(local=local[:, :2], extra=local[:, 2:])
    return batch


def model_of(names, backbone='vit', changes=None, neck='AveragePoolNeck'):
    heads = {n: HEADS[n][0] | (changes or {}).get(n, {}) for n in names}
    return build_model(backbone=BACKBONES[backbone], neck=dict(type=neck), heads=heads)


def checked_step(model):
    """The log of a step in which every trained parameter has a finite gradient."""
    wrapper = optim_wrapper(model)
    step = wrapper.step

    def check():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
        assert all(p.grad.any() for p in model.backbone.parameters() if p.ndim > 1)
        step()

    wrapper.step = check
    model.progress = Progress(10, 100, 10)
    return model.train_step(three_roles(), wrapper)


PAIRS = [
    pytest.param(backbone, pair, id='-'.join((backbone, *pair)))
    for backbone in BACKBONES
    for pair in [*itertools.combinations(HEADS, 2), tuple(HEADS)]
    if backbone == 'vit' or 'points' not in pair
]


@pytest.mark.parametrize(('backbone', 'names'), PAIRS)
def test_heads_train_together_on_one_forward(backbone, names):
    model = model_of(names, backbone)
    calls = {'student': 0, 'teacher': 0}
    for side, branch in (('student', model), ('teacher', model.teacher)):

        def count(module, args, out, side=side):
            calls[side] += 1

        branch.backbone.register_forward_hook(count)
    log = checked_step(model)
    assert all(value.isfinite().all() for value in log.values())
    total = sum(model.heads[n].loss_weight * log[f'loss_{n}'] for n in names)
    torch.testing.assert_close(log['loss'], total)
    for place, side in enumerate(calls, 1):  # one forward for each size that is seen
        roles = {role for n in names for role in SEEN[HEADS[n][place]]}
        assert calls[side] == len({SIZES[role] for role in roles}), side


def test_every_registered_head_is_in_the_matrix():
    heads = {
        name
        for name, part in MODELS.module_dict.items()
        if issubclass(part, Head) and part.__module__.startswith('densessl.')
    }
    assert heads == {config['type'] for config, *_ in HEADS.values()}


FADE = dict(end=0.6, start_epoch=2, fade_epochs=1)  # steps 4 and 5 of 2 an epoch


@pytest.mark.parametrize('name', HEADS)
def test_weight_of_any_head_follows_its_schedule(name):
    other = 'view' if name != 'view' else 'cluster'
    head = model_of([other, name], changes={name: dict(loss_weight=FADE)}).heads[name]
    assert head.loss_weight == 0
    found = []
    for step in (0, 3, 4, 5, 6, 9):
        head.start_step(Progress(step, 10, 2))
        found.append(head.loss_weight)
    assert found == pytest.approx([0, 0, 0, 0.3, 0.6, 0.6])


def run(model, steps, wrapper=None):
    wrapper = wrapper or optim_wrapper(model)
    logs = []
    for step in steps:
        model.progress = Progress(step, 10, 2)
        torch.manual_seed(step_seed(0, step, 0))
        logs.append(model.train_step(three_roles(step), wrapper))
    return logs


@pytest.mark.parametrize('late', [name for name in HEADS if name != 'view'])
def test_before_its_start_a_head_changes_nothing(late):
    """Random numbers included: dropped paths are those of a model without the head."""
    common = dict(
        backbone=BACKBONES['vit'] | dict(drop_path_rate=0.5),
        neck=dict(type='AveragePoolNeck'),
        average_losses=True,
    )
    heads = dict(view=HEADS['view'][0] | dict(student_views='target'))
    alone = build_model(**common, heads=heads)
    added = {late: HEADS[late][0] | dict(loss_weight=FADE)}
    both = build_model(**common, heads=heads | added)
    both.load_state_dict(alone.state_dict(), strict=False)
    before = copy.deepcopy(both.state_dict())
    wrapper = optim_wrapper(both)
    logs = run(both, range(5), wrapper), run(alone, range(5))
    for mine, theirs in zip(*logs, strict=True):
        assert mine['loss'] == theirs['loss'] and mine[f'{late}/weight'] == 0
        assert f'loss_{late}' not in mine
    for key, value in both.state_dict().items():
        expected = alone.state_dict().get(key, before[key])
        assert value.equal(expected), key
    (log,) = run(both, [5], wrapper)
    assert log[f'{late}/weight'] == pytest.approx(0.3)
    weighted = log['loss_view'] + 0.3 * log[f'loss_{late}']
    torch.testing.assert_close(log['loss'], weighted / 1.3)
    moved = {k for k, v in both.state_dict().items() if not v.equal(before[k])}
    assert any(re.match(rf'(heads|projectors)\.{late}\.', key) for key in moved)


def test_a_run_resumes_exactly_in_the_middle_of_a_fade(small_config, tmp_path):
    weight = 'model.heads.selfpatch.loss_weight'
    options = [
        *('--cfg-options', 'train_dataloader.num_workers=0', f'{weight}._delete_=True'),
        *(f'{weight}.end=0.5', f'{weight}.start_epoch=1', f'{weight}.fade_epochs=1.5'),
        'default_hooks.checkpoint.interval_steps=2',
    ]
    start = [str(small_config), '--work-dir']
    assert main([*start, str(tmp_path / 'whole'), *options]) == 0
    middle = tmp_path / 'whole/step_00000006.pth'  # the fade: steps 4 to 10
    resume = ['--resume', str(middle)]
    assert main([*start, str(tmp_path / 'rest'), *resume, *options]) == 0
    states = [
        torch.load(tmp_path / d / 'step_00000012.pth', weights_only=True)
        for d in ('whole', 'rest')
    ]
    for key, value in states[0]['state_dict'].items():
        assert value.equal(states[1]['state_dict'][key]), key
    for name in ('whole', 'rest'):
        (scalars,) = (tmp_path / name).glob('*/vis_data/scalars.json')
        logged = re.findall(r'"selfpatch/weight": ([\d.e-]+)', scalars.read_text())
        expected = [0.5 * max(0, min(1, (step - 4) / 6)) for step in range(12)]
        expected = expected[6:] if name == 'rest' else expected
        assert [float(x) for x in logged] == pytest.approx(expected)


def test_only_heads_that_train_are_looked_at():
    late = dict(similarity=dict(loss_weight=FADE))
    model = model_of(['view', 'similarity'], changes=late)
    run(model, [0])
    assert set(model.monitored) == {'view'}
    run(model, [6])
    assert set(model.monitored) == {'view', 'similarity'}


class Plain(nn.Module):
    """A neck without a way to represent sets of patches."""

    def __init__(self, embed_dims):
        super().__init__()

    pool, normalize = AveragePoolNeck.pool, AveragePoolNeck.normalize
    norm = nn.Identity()


MODELS.register_module(name='NeckWithoutSets', module=Plain, force=True)


@pytest.mark.parametrize(
    ('heads', 'options', 'words'),
    [
        (['view', 'points'], dict(backbone='swin'), r"'points' uses .* need a ViT"),
        (
            ['selfpatch'],
            dict(neck='NeckWithoutSets'),
            r"'selfpatch' needs .* Plain has no method aggregate; use ClassAttention",
        ),
        (
            ['view'],
            dict(changes=dict(view=dict(loss_weight=FADE))),
            r'loss_weight of view is 0 in step 0.*let one of them begin',
        ),
        (
            ['view', 'selfpatch'],
            dict(changes={n: dict(loss_weight=0) for n in ('view', 'selfpatch')}),
            'loss_weight of view, selfpatch is 0',
        ),
    ],
)
def test_parts_that_do_not_go_together(heads, options, words):
    with pytest.raises(DenseSSLError, match=words) as caught:
        model_of(heads, **options)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('name', 'change'),
    [
        ('view', dict(target_role='whole', center_views='all')),
        ('points', dict(target_role='whole')),
        ('similarity', dict(target_role='whole')),
        ('cluster', dict(query_roles=['whole'])),
        ('similarity', dict(target_role='whole', loss_weight=FADE)),  # at once, too
    ],
)
def test_roles_that_the_recipe_lacks(name, change):
    model = model_of(['selfpatch', name], changes={name: change})
    with pytest.raises(DenseSSLError, match=r'name whole, but the views are glo') as e:
        model(**model.data_preprocessor(views()))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['view', 'similarity', 'points'])
def test_targets_come_first(name):
    model = model_of([name], changes={name: dict(target_role='local')})
    with pytest.raises(DenseSSLError, match=r'the local views, and .* after others'):
        model(**model.data_preprocessor(views()))


@pytest.mark.parametrize('name', ['geometric', 'points', 'position', 'cluster'])
@pytest.mark.parametrize('weight', [1.0, FADE])
def test_a_transform_that_does_not_track_places(name, weight):
    model = model_of(['view', name], changes={name: dict(loss_weight=weight)})
    batch = model.data_preprocessor(views() | dict(geometry=None))
    with pytest.raises(DenseSSLError, match=r'where each view lies.*MultiCrop'):
        model(**batch)


def test_two_heads_of_points():
    heads = dict.fromkeys(('points', 'more'), HEADS['points'][0])
    with pytest.raises(DenseSSLError, match='points and more both ask for reference'):
        build_model(heads=heads, neck=dict(type='AveragePoolNeck'))


def test_the_algorithm_names_no_method():
    """Docstrings cite papers; the code knows heads by what they ask for."""
    methods = {'dino', 'selfpatch', 'esvit', 'glsd', 'densedino', 'loca', 'moby'}
    heads = {config['type'].lower() for config, *_ in HEADS.values()}
    for path in (ROOT / 'densessl/models/algorithms').glob('*.py'):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            documented = ast.Module | ast.ClassDef | ast.FunctionDef
            if isinstance(node, documented) and ast.get_docstring(node):
                node.body[0] = ast.Pass()
        words = set(re.split(r'[\W_]+', ast.unparse(tree).lower()))
        assert not words & (methods | heads), path

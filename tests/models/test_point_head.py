"""Reference points: their places, their tokens, and the loss, against oracles."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from conftest import build_model, model_config, optim_wrapper, point_config, views

from densessl.datasets.transforms import MultiCrop
from densessl.engine.loop import step_seed
from densessl.errors import DenseSSLError
from densessl.geometry import ViewGeometry
from densessl.models import ViewFeatures
from densessl.models.heads import PointHead
from densessl.models.necks import AveragePoolNeck
from densessl.schedules import Progress

PLACES = {'global': slice(0, 2), 'local': slice(2, 5)}
SMALL = dict(projector=dict(hidden_dims=5, bottleneck_dims=4, norm_last_layer=False))


def point_head(**options):
    return PointHead(6, 7, **(SMALL | options))


def test_points_of_a_pair_show_the_same_place_of_the_picture():
    # Red is 2 x and green is 2 y of the source, so a view tells where it was cut.
    y, x = np.mgrid[:100, :120] + 0.5
    picture = np.stack([2 * x, 2 * y, 0 * x], -1).astype(np.uint8)
    plain = dict(size=64, jitter=0.0, grayscale=0.0, scale=(0.2, 0.9))
    crop = MultiCrop(
        [dict(role='global', count=2, **plain), dict(role='local', count=3, **plain)],
        min_overlap=(0.1, 0.05),
    )
    torch.manual_seed(0)
    seen = 0
    for seed in range(6):
        sample = crop(dict(img=picture, rng=np.random.default_rng(seed)))
        geometry = ViewGeometry.stack([sample['geometry']])
        student, teacher = point_head(points=9).place_points(geometry, PLACES)
        assert {r: p.shape[2] for r, p in student.items()} == {'global': 9, 'local': 18}
        assert teacher['global'].shape == (2, 1, 36, 2)
        stacks = sample['inputs']
        for i in range(2):
            others = [v for v in range(5) if v != i]
            for k, v in enumerate(others):
                role = 'global' if v < 2 else 'local'
                w = v - PLACES[role].start
                slot = i if v >= 2 else 0
                ours = student[role][w, 0, 9 * slot : 9 * slot + 9]
                theirs = teacher['global'][i, 0, 9 * k : 9 * k + 9]
                for p, q in zip(ours.tolist(), theirs.tolist(), strict=True):
                    both = [
                        colour_at(stack, place)
                        for stack, place in (
                            (stacks[role][w], p),
                            (stacks['global'][i], q),
                        )
                    ]
                    if None not in both:  # a resampled border is not straight
                        assert max(abs(a - b) for a, b in zip(*both, strict=True)) < 5
                        seen += 1
    assert seen > 200


def colour_at(view, place):
    """Red and green at a place in the fractions of a view, by its nearest pixel."""
    size = view.shape[-1]
    column, row = (int(share * size) for share in place)
    if not all(4 <= side < size - 4 for side in (column, row)):
        return None
    return view[:2, row, column].tolist()


def test_grid_points_are_the_centres_of_cells_of_the_overlap():
    boxes = [(0, 0, 40, 40), (20, 10, 40, 50)]  # in common: (20, 10), 20 x 30
    geometry = ViewGeometry.from_lists(
        [boxes], [[False, True]], [[(32, 32)] * 2], [[(100, 100)] * 2]
    )
    head = point_head(points=4, sampling='grid')
    student, teacher = head.place_points(geometry, {'global': slice(0, 2)})
    source = [(25, 17.5), (35, 17.5), (25, 32.5), (35, 32.5)]
    first = torch.tensor([(x / 40, y / 40) for x, y in source])
    second = torch.tensor([(1 - (x - 20) / 40, (y - 10) / 50) for x, y in source])
    for side in (student, teacher):
        found = side['global'][:, 0].float()
        torch.testing.assert_close(found, torch.stack([first, second]))


def test_random_points_fill_the_overlap_alone():
    torch.manual_seed(0)
    box = torch.tensor([30.0, 5.0, 10.0, 20.0])
    points = point_head(points=4000).draw(box)
    share = (points - box[:2]) / box[2:]
    assert ((share >= 0) & (share < 1)).all()
    for axis in range(2):
        rank = share[:, axis].sort().values - torch.linspace(0, 1, 4000)
        assert rank.abs().max() < 0.035  # Kolmogorov-Smirnov, p = 1e-4
    again = point_head(points=4000).draw(box)
    assert not again.equal(points)


def setting(head, seed=0):
    """Student and teacher of 2 images: 2 global and 1 local views that overlap."""
    torch.manual_seed(seed)
    boxes = [(0, 0, 40, 40), (20, 10, 40, 40), (10, 10, 20, 20)]
    one = ViewGeometry.from_lists(boxes, [0, 1, 0], [(32, 32)] * 3, [(99, 99)] * 3)
    m, places = head.points, {'global': slice(0, 2), 'local': slice(2, 3)}
    counts = ({'global': m, 'local': 2 * m}, {'global': 2 * m})
    sides = []
    for count in counts:
        references = {
            role: torch.randn(stop_of(places[role]), 2, n, 6).double()
            for role, n in count.items()
        }
        projector = head.build_projector().double()
        sides.append(
            ViewFeatures(
                torch.zeros(3, 2, 6),
                {},
                {},
                AveragePoolNeck(6),
                {'p': projector},
                references=references,
                places=places,
            )
        )
    return ViewGeometry.stack([one, one]), *sides


def stop_of(part):
    return part.stop - part.start


def expected_loss(head, student, teacher, counted=lambda b, i, v: True):
    """The equation by loops, and the teacher's logits of pairs of global views."""
    m, own, other = head.points, student.projectors['p'], teacher.projectors['p']
    terms, centered = [], []
    for b in range(2):
        for i in range(2):
            for v in range(3):
                if v == i:
                    continue
                at = (v - (v > i)) * m  # teacher: all views but i, in order
                targets = teacher.references['global'][i, b, at : at + m]
                role, w, at = ('local', 0, i * m) if v == 2 else ('global', v, 0)
                sources = student.references[role][w, b, at : at + m]
                z_t = other(targets).detach()
                p_t = ((z_t - head.center) / head.teacher_temp).softmax(-1)
                log_p = (own(sources) / head.student_temp).log_softmax(-1)
                terms.append(counted(b, i, v) * -(p_t * log_p).sum(-1).mean())
                if v < 2:
                    centered.append(z_t)
    return sum(terms) / len(terms), torch.cat(centered)


def end_step(head, teacher):
    teacher.projectors['p'].float()  # ranks exchange float32
    head.float().end_step()


@pytest.mark.parametrize('points', [1, 4])
def test_loss_and_centre_are_the_equations(points):
    head = point_head(points=points, student_temp=0.3, teacher_temp=0.2).double()
    geometry, student, teacher = setting(head)
    head.center.normal_()
    expected, logits = expected_loss(head, student, teacher)
    got = head.loss(student, teacher, geometry, 'p')
    torch.testing.assert_close(got['loss'], expected, rtol=1e-10, atol=0)
    assert got['overlap'] == 1
    parameters = list(student.projectors['p'].parameters())
    wanted = torch.autograd.grad(expected, parameters)
    for a, b in zip(torch.autograd.grad(got['loss'], parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    before = head.center.clone()
    end_step(head, teacher)
    torch.testing.assert_close(
        head.center, (0.9 * before + 0.1 * logits.mean(0)).float()
    )


def test_centre_of_all_pairs():
    head = point_head(center_views='all').double()
    geometry, student, teacher = setting(head)
    head.loss(student, teacher, geometry, 'p')
    logits = teacher.projectors['p'](teacher.references['global']).flatten(0, -2)
    end_step(head, teacher)
    torch.testing.assert_close(head.center, (0.1 * logits.mean(0)).float())


def test_views_without_overlap_count_as_nothing():
    head = point_head(student_temp=0.3).double()
    geometry, student, teacher = setting(head)
    geometry.box[1, 2] = torch.tensor([80.0, 80, 10, 10])  # the local view of image 1
    expected, _ = expected_loss(
        head, student, teacher, lambda b, i, v: float((b, v) != (1, 2))
    )
    got = head.loss(student, teacher, geometry, 'p')
    torch.testing.assert_close(got['loss'], expected, rtol=1e-10, atol=0)
    assert got['overlap'].item() == pytest.approx(6 / 8)
    points, _ = head.place_points(geometry, student.places)
    assert all(((p >= 0) & (p <= 1)).all() for p in points.values())


def test_alpha_weights_the_two_losses():
    model = build_model(**point_config())
    out = model(**model.data_preprocessor(views()))
    torch.testing.assert_close(
        out['loss'], 0.5 * out['loss_view'] + 0.5 * out['loss_points']
    )


@pytest.mark.parametrize('which', ['all', 'target'])
def test_class_loss_over_all_views_or_the_global_ones(which):
    config = point_config(sampling='grid')
    config['heads']['view']['student_views'] = which
    model = build_model(**config).eval()
    batch = model.data_preprocessor(views())
    crops = [x for role in batch['inputs'].values() for x in role]
    terms = []
    for i in range(2):
        for v in range(5 if which == 'all' else 2):
            if v != i:
                z_t = model.teacher.projectors['view'](
                    model.teacher.backbone(crops[i]).cls
                )
                log_p = model.projectors['view'](model.backbone(crops[v]).cls) / 0.1
                p_t = (z_t / 0.04).softmax(-1)
                terms.append(-(p_t * log_p.log_softmax(-1)).sum(-1).mean())
    expected = sum(terms) / len(terms)
    torch.testing.assert_close(model(**batch)['loss_view'], expected.detach())


def test_class_loss_alone_over_global_views_spares_the_student_the_others():
    config = point_config()
    heads = dict(view=config['heads']['view'] | dict(student_views='target'))
    model = build_model(**config | dict(heads=heads))
    calls = []
    model.backbone.register_forward_hook(
        lambda m, args, out: calls.append(len(args[0]))
    )
    model(**model.data_preprocessor(views(batch=3)))
    assert calls == [6]


def test_references_leave_the_rest_of_a_step_as_it_is():
    config = point_config()
    model = build_model(**config)
    vanilla = build_model(**config | dict(heads={'view': config['heads']['view']}))
    vanilla.load_state_dict(model.state_dict(), strict=False)
    batch = model.data_preprocessor(views())
    assert model(**batch)['loss_view'] == vanilla(**batch)['loss_view']


def test_exported_backbone_is_a_plain_vit():
    model = build_model(**point_config(content=True)).eval()
    model.progress = Progress(30, 100, 10)
    model.train_step(views(), optim_wrapper(model))
    model.eval()
    plain = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
    ).eval()
    plain.load_state_dict(model.teacher.backbone.state_dict())
    images = torch.randn(2, 3, 32, 32)
    out = model.teacher.backbone(images)
    torch.testing.assert_close(out.cls, plain.forward_features(images)[:, 0])


@pytest.mark.parametrize('content', [True, False])
@pytest.mark.parametrize('detach', [True, False])
def test_options_of_reference_tokens(content, detach):
    config = point_config(content=content, detach=detach)
    config['heads'].pop('view')
    # without patches' own gradient the table moves through the references alone
    model = build_model(**config)
    model.backbone.pos_embed.data[:, 1:].normal_()
    points = torch.rand(2, 3, 2)
    tokens = model.heads['points'].reference_tokens(
        model.backbone, model.projectors['points'], points, (4, 4)
    )
    assert tokens.requires_grad == (content or not detach)
    names = dict(model.projectors['points'].named_parameters())
    assert ('content' in names) == content
    if tokens.requires_grad:
        tokens.square().sum().backward()
    assert (model.backbone.pos_embed.grad is None) == detach
    if content:
        model.projectors['points'].content.data.fill_(0.5)
        moved = model.heads['points'].reference_tokens(
            model.backbone, model.projectors['points'], points, (4, 4)
        )
        torch.testing.assert_close(moved, tokens + 0.5)


def test_every_trained_parameter_moves_with_points_beside_selfpatch():
    config = point_config(content=True)
    base = build_model()  # SelfPatch
    heads = {name: cfg for name, cfg in config['heads'].items() if name == 'points'}
    model = build_model(heads=model_config()['heads'] | heads)
    assert set(base.state_dict()) < set(model.state_dict())
    model.progress = Progress(10, 100, 10)
    before = {n: p.clone() for n, p in model.named_parameters()}
    log = model.train_step(views(), optim_wrapper(model))
    assert {'loss_view', 'loss_selfpatch', 'loss_points'} < set(log)
    for name, parameter in model.named_parameters():
        fixed = name.endswith('weight_g')
        assert parameter.equal(before[name]) == fixed, name


def test_resumed_steps_are_those_of_an_uninterrupted_run():
    def steps(model, wrapper, numbers):
        for step in numbers:
            model.progress = Progress(step + 4, 20, 4)
            torch.manual_seed(step_seed(0, step, 0))
            model.train_step(views(seed=step), wrapper)

    model = build_model(**point_config())
    wrapper = optim_wrapper(model)
    steps(model, wrapper, range(2))
    left = copy.deepcopy((model.state_dict(), wrapper.state_dict()))
    steps(model, wrapper, range(2, 4))
    resumed = build_model(seed=1, **point_config())
    resumed_wrapper = optim_wrapper(resumed)
    resumed.load_state_dict(left[0])
    resumed_wrapper.load_state_dict(left[1])
    torch.rand(17)
    steps(resumed, resumed_wrapper, range(2, 4))
    for name, value in resumed.state_dict().items():
        assert value.equal(model.state_dict()[name]), name


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(points=0), 'points=0; give 1 point'),
        (dict(points=5, sampling='grid'), 'no square grid'),
        (dict(sampling='corner'), "unknown sampling 'corner'"),
    ],
)
def test_wrong_settings(options, words):
    with pytest.raises(DenseSSLError, match=words) as caught:
        point_head(**options)
    assert '\n' not in str(caught.value)


def test_backbones_and_views_that_cannot_carry_points():
    swin = dict(
        type='SwinTransformer',
        arch=dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2]),
        img_size=32,
        window_size=4,
    )
    average = dict(type='AveragePoolNeck')
    with pytest.raises(DenseSSLError, match=r'need a ViT.*SwinTransformer'):
        build_model(**point_config() | dict(backbone=swin, neck=average))
    heads = point_config()['heads']
    with pytest.raises(DenseSSLError, match='both ask for reference tokens'):
        build_model(**point_config() | dict(heads=heads | dict(more=heads['points'])))
    model = build_model(**point_config())
    batch = model.data_preprocessor(views())
    with pytest.raises(DenseSSLError, match=r'where each view lies.*MultiCrop'):
        model(batch['inputs'], None)
    one = {'global': batch['inputs']['global'][:1]}
    with pytest.raises(DenseSSLError, match='add a view'):
        model(one, batch['geometry'][:, :1])


def test_one_target_view_is_enough():
    model = build_model(**point_config())
    batch = model.data_preprocessor(views())
    batch['inputs']['global'] = batch['inputs']['global'][:1]
    out = model(batch['inputs'], batch['geometry'][:, [0, 2, 3, 4]])
    assert out['loss_points'].isfinite() and math.isfinite(out['points/overlap'])

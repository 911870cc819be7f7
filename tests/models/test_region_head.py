"""The region task against its equations, on hand-made geometry and in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model, optim_wrapper, region_config, views

from densessl.errors import DenseSSLError
from densessl.geometry import ViewGeometry
from densessl.models import ViewFeatures, ViewTokens
from densessl.models.heads import RegionHead
from densessl.models.necks import AveragePoolNeck
from densessl.registry import MODELS
from densessl.schedules import Progress

WIDTH, OUT = 6, 7
GRIDS = {'global': (2, 2), 'local': (1, 2)}


def geometry(boxes, flips):
    sizes = [(32, 32), (32, 32), (16, 32)]
    one = ViewGeometry.from_lists(boxes, flips, sizes, [(100, 100)] * 3)
    return ViewGeometry.stack([one, one])


def setting(matching, seed=0):
    """Head, student and teacher for 2 images of 2 global and 1 local views."""
    torch.manual_seed(seed)
    head = RegionHead(
        WIDTH,
        OUT,
        matching=matching,
        student_temp=0.3,
        teacher_temp=0.2,
        projector=dict(hidden_dims=5, bottleneck_dims=4, norm_last_layer=False),
    ).double()
    head.center.normal_()
    neck = AveragePoolNeck(WIDTH)
    sides = []
    for roles in (('global', 'local'), ('global',)):
        counts = {'global': 2, 'local': 1}
        tokens = {
            role: torch.randn(counts[role], 2, math.prod(GRIDS[role]), WIDTH).double()
            for role in roles
        }
        pooled = torch.cat([x.mean(2) for x in tokens.values()])
        projector = head.build_projector().double()
        places = {'global': slice(0, 2), 'local': slice(2, 3)}
        sides.append(
            ViewFeatures(pooled, tokens, GRIDS, neck, {'r': projector}, places=places)
        )
    return head, *sides


def expected_loss(head, student, teacher, partner):
    """Eq. 3 by loops; ``partner(v, m, i, b)`` is a token of teacher view i, or None."""
    crops = [view for role in student.tokens.values() for view in role]
    own, other = student.projectors['r'], teacher.projectors['r']
    total, pairs = 0.0, 0
    for i in range(2):
        z_t = other(teacher.tokens['global'][i])
        p_t = ((z_t - head.center) / 0.2).softmax(-1).detach()
        for v, tokens in enumerate(crops):
            if v == i:
                continue
            log_p = (own(tokens) / 0.3).log_softmax(-1)
            pairs += 1
            for b in range(2):
                for m in range(tokens.shape[1]):
                    n = partner(v, m, i, b)
                    if n is not None:
                        cross_entropy = -(p_t[b, n] * log_p[b, m]).sum()
                        total = total + cross_entropy / (2 * tokens.shape[1])
    return total / pairs


def compare(head, student, teacher, places, partner):
    expected = expected_loss(head, student, teacher, partner)
    got = head.loss(student, teacher, places, 'r')
    torch.testing.assert_close(got['loss'], expected, rtol=1e-10, atol=0)
    parameters = [p for p in student.projectors['r'].parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, parameters)
    for a, b in zip(torch.autograd.grad(got['loss'], parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    return got


def test_similarity_loss_is_the_equation():
    head, student, teacher = setting('similarity')
    crops = [view for role in student.tokens.values() for view in role]

    def partner(v, m, i, b):
        cosine = F.cosine_similarity(
            crops[v][b, m], teacher.tokens['global'][i, b], dim=-1
        )
        return int(cosine.argmax())

    compare(head, student, teacher, None, partner)


def test_geometric_loss_is_the_equation_on_places_known_by_hand():
    # View 0: cells of 20 at (0, 0), so centres at 10 and 30 both ways. View 1: the
    # same cells one to the right, mirrored. View 2, local: two cells of 20 that are
    # view 1's upper two, as seen from the left.
    places = geometry(
        [(0, 0, 40, 40), (20, 0, 40, 40), (20, 0, 40, 20)], [False, True, False]
    )
    # limit: half of 20 sqrt(2) = 14.1, so only equal centres match (next are 20 away)
    matches = {
        (0, 1): {1: 1, 3: 3},  # view 0's right column is view 1's left in the source
        (1, 0): {1: 1, 3: 3},
        (2, 0): {0: 1},
        (2, 1): {0: 1, 1: 0},
    }
    head, student, teacher = setting('geometric')

    def partner(v, m, i, b):
        return matches[v, i].get(m)

    got = compare(head, student, teacher, places, partner)
    # in overlap: 2 of 4 tokens in both global pairs, 1 and 2 of 2 local tokens
    assert math.isclose(got['overlap'], 7 / 12, rel_tol=1e-6)
    assert got['match_distance'] == 0
    # teacher view 0 is matched at 1 (twice) and 3, view 1 at 0, 1 (twice), 3
    entropies = [
        sum(-p * math.log(p) for p in shares)
        for shares in ((2 / 3, 1 / 3), (1 / 4, 1 / 2, 1 / 4))
    ]
    expected = sum(map(math.exp, entropies)) / 2
    assert math.isclose(got['match_perplexity'], expected, rel_tol=1e-6)


def test_match_distance_is_in_teacher_tokens():
    # Similarity sends every student token to teacher token 0, whatever its place.
    head, student, teacher = setting('similarity')
    teacher.tokens['global'][:, :, 1:] = -1.0
    teacher.tokens['global'][:, :, 0] = 1.0
    for tokens in student.tokens.values():
        tokens.fill_(1.0)
    places = geometry([(0, 0, 40, 20)] * 3, [False] * 3)
    got = head.loss(student, teacher, places, 'r')
    # 2 x 2 cells of 20 x 10: centres of a global view are 0, 1, 1 and sqrt(2) tokens
    # from token 0. The local view's two cells of 20 x 20 lie between the rows.
    globally = [0, 1, 1, math.sqrt(2)]
    locally = [0.5, math.hypot(1, 0.5)]
    mean = (2 * sum(globally) + 2 * sum(locally)) / (2 * 4 + 2 * 2)
    assert math.isclose(got['match_distance'], mean, rel_tol=1e-6)
    assert got['overlap'] == 1 and math.isclose(
        got['match_perplexity'], 1, rel_tol=1e-6
    )


def test_locality_is_one_by_place_and_zero_by_chance():
    places = geometry(
        [(0, 0, 40, 40), (10, 5, 40, 40), (5, 0, 30, 20)], [False, True, False]
    )
    head, student, teacher = setting('similarity')
    views = [
        ViewTokens(tokens.transpose(0, 1), GRIDS[role], places[:, part])
        for (role, tokens), part in zip(
            student.tokens.items(), (slice(0, 2), slice(2, 3)), strict=True
        )
    ]
    target = ViewTokens(teacher.tokens['global'].transpose(0, 1), (2, 2), places[:, :2])
    index, _, monitors = head.match(views, target)

    def square(b, i, m, n):  # in teacher tokens of 20 x 20
        ours = torch.cat(
            [v.geometry[b].token_centers(v.grid).flatten(0, 1) for v in views]
        )
        theirs = target.geometry[b, i].token_centers((2, 2))
        return float(((ours[m] - theirs[n]) / 20).square().sum())

    matched, chance = 0.0, 0.0
    for b in range(2):
        for i, (boxes, rows) in enumerate(
            (((0, 40, 0, 40), range(4, 10)), ((10, 50, 5, 45), [*range(4), 8, 9]))
        ):
            left, right, top, bottom = boxes
            points = torch.cat(
                [v.geometry[b].token_centers(v.grid).flatten(0, 1) for v in views]
            )
            for m in rows:
                x, y = points[m].tolist()
                if not (left <= x < right and top <= y < bottom):
                    continue
                matched += square(b, i, m, int(index[b, m, i]) % 4)
                groups = (range(4, 8), (8, 9)) if i == 0 else (range(4), (8, 9))
                group = groups[0] if m in groups[0] else groups[1]
                others = [int(index[b, k, i]) % 4 for k in group]
                chance += sum(square(b, i, m, n) for n in others) / len(others)
    assert math.isclose(monitors['match_locality'], 1 - matched / chance, rel_tol=1e-6)

    by_place, student, teacher = setting('geometric')
    _, _, monitors = by_place.match([target], target)
    assert monitors['match_locality'] > 0.7


def test_views_apart_cost_nothing_and_give_finite_gradients():
    places = geometry([(0, 0, 20, 20), (60, 60, 20, 20), (80, 0, 20, 20)], [False] * 3)
    head, student, teacher = setting('geometric')
    got = head.loss(student, teacher, places, 'r')
    got['loss'].backward()
    assert got['loss'] == 0 and got['overlap'] == 0
    assert all(value.isfinite() for value in got.values())
    for parameter in student.projectors['r'].parameters():
        assert parameter.grad is None or parameter.grad.eq(0).all()


def test_needs_tracked_geometry():
    model = build_model(**region_config('geometric'))
    batch = model.data_preprocessor(views()) | dict(geometry=None)
    with pytest.raises(DenseSSLError, match=r"'region' .* each view lies.*MultiCrop"):
        model(**batch)
    assert build_model(**region_config('similarity'))(**batch)['loss'].isfinite()


def test_grid_that_does_not_fit_the_view():
    head, student, teacher = setting('geometric')
    places = geometry([(0, 0, 40, 40)] * 3, [False] * 3)
    places.size[:, 2] = torch.tensor([20, 40])  # tokens of 20 px, the others' are 16
    with pytest.raises(
        DenseSSLError, match=r'grids do not fit.*local 20 x 20 px.*stride'
    ):
        head.loss(student, teacher, places, 'r')


def test_matching_none_leaves_the_vanilla_method():
    options = region_config(None)
    model = build_model(**options)
    assert set(model.heads) == set(model.projectors) == {'view'}
    vanilla = build_model(
        **options | dict(heads={'view': options['heads']['view']}, average_losses=False)
    )
    for step in range(2):
        for one in (model, vanilla):
            one.progress = Progress(step + 4, 20, 4)
        logs = [
            one.train_step(views(seed=step), optim_wrapper(one))
            for one in (model, vanilla)
        ]
        assert logs[0]['loss'] == logs[1]['loss'] == logs[0]['loss_view']
    for name, value in model.state_dict().items():
        assert value.equal(vanilla.state_dict()[name]), name
    heads = dict(region=options['heads']['region'])
    with pytest.raises(DenseSSLError, match='no heads'):
        build_model(**options | dict(heads=heads))


@pytest.mark.parametrize('patches', [False, True])
def test_heads_of_vits_work_on_swin(patches):
    torch.manual_seed(0)
    head = dict(out_dims=32, projector=dict(hidden_dims=16, bottleneck_dims=8))
    heads = dict(view=dict(type='ViewHead', center_views='all', **head))
    if patches:
        heads['selfpatch'] = dict(type='SelfPatchHead', **head)
    model = MODELS.build(
        dict(
            type='SelfDistillation',
            backbone=dict(
                type='SwinTransformer',
                arch=dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2]),
                img_size=32,
                window_size=4,
            ),
            neck=dict(type='ClassAttentionNeck', num_heads=2),
            heads=heads,
        )
    )
    model.progress = Progress(4, 20, 4)
    before = {n: p.clone() for n, p in model.backbone.named_parameters()}
    log = model.train_step(views(), optim_wrapper(model))
    assert log['loss'].isfinite()
    assert all(not p.equal(before[n]) for n, p in model.backbone.named_parameters())

"""LOCA's heads against their equations, on geometry known by hand and in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_model, loca_config, model_config, optim_wrapper, views
from torch import nn

from densessl.datasets import collate_views
from densessl.errors import DenseSSLError
from densessl.geometry import ViewGeometry
from densessl.models import ViewFeatures
from densessl.models.heads import ClusterHead, PositionHead
from densessl.models.necks import AveragePoolNeck
from densessl.registry import MODELS, TRANSFORMS
from densessl.schedules import Progress

WIDTH, CLUSTERS = 6, 7
GRIDS = {'reference': (2, 2), 'random': (2, 2), 'focal': (1, 2)}
PLACES = {'reference': slice(0, 1), 'random': slice(1, 2), 'focal': slice(2, 4)}
# The reference has four cells of 20 from (0, 0). The random query is one cell to the
# right of it and lost its last patch. Focal views: the reference's upper right cell in
# two columns, and one far away.
BOXES = [(0, 0, 40, 40), (20, 0, 40, 40), (20, 0, 20, 20), (60, 60, 20, 20)]
KEPT = [0, 1, 2]
# h(j) of the kept tokens of each query: all images the same
PARTNERS = {
    False: {'random': [[1, -1, 3]], 'focal': [[1, 1], [-1, -1]]},
    True: {'random': [[0, -1, 2]], 'focal': [[0, 0], [-1, -1]]},  # reference flipped
}
QUERY_FLIPPED = {'random': [[-1, 1, -1]], 'focal': [[1, 1], [-1, -1]]}


def geometry(flips=(False,) * 4, boxes=BOXES, images=2):
    sizes = [(32, 32), (32, 32), (16, 32), (16, 32)]
    one = ViewGeometry.from_lists(boxes, flips, sizes, [(100, 100)] * 4)
    return ViewGeometry.stack([one] * images)


def features(head, seed=0):
    """Student and teacher for 2 images, of random tokens."""
    torch.manual_seed(seed)
    counts = {'reference': (1, 4), 'random': (1, 3), 'focal': (2, 2)}
    sides = []
    for roles in (('random', 'focal'), ('reference',)):
        tokens = {
            role: torch.randn(counts[role][0], 2, counts[role][1], WIDTH).double()
            for role in roles
        }
        kept = torch.tensor(KEPT).expand(1, 2, -1)
        sides.append(
            ViewFeatures(
                torch.cat([x.mean(2) for x in tokens.values()]),
                tokens,
                {role: GRIDS[role] for role in roles},
                AveragePoolNeck(WIDTH),
                {'h': head.build_projector().double()},
                kept={'random': kept} if 'random' in roles else {},
                places=PLACES,
            )
        )
    return sides


def position_head(**options):
    torch.manual_seed(1)
    head = PositionHead(WIDTH, **(dict(grid=2, mask_ratio=0.5, num_heads=2) | options))
    for parameter in head.parameters():
        parameter.data.normal_()
    return head.double()


def cluster_head(**options):
    torch.manual_seed(1)
    options = dict(projector=dict(hidden_dims=5, bottleneck_dims=4)) | options
    return ClusterHead(WIDTH, CLUSTERS, **options)


def norm(x, layer):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * layer.weight + layer.bias


def attended(block, token, context):
    """One token after the block, head by head with softmax written out."""
    c = WIDTH // 2
    q = block.q(norm(token, block.norm_q))
    k, v = block.kv(norm(context, block.norm_kv)).split(WIDTH, -1)
    heads = []
    for part in (slice(0, c), slice(c, 2 * c)):
        scores = (k[:, part] @ q[part]) / math.sqrt(c)
        heads.append(scores.exp() @ v[:, part] / scores.exp().sum())
    token = token + block.proj(torch.cat(heads))
    mlp = block.mlp
    return token + mlp.fc2(F.gelu(mlp.fc1(norm(token, block.norm2))))


def tokens_with_partners(student, partners):
    """``(image, query number, token, h)`` one by one."""
    number = 0
    for role, views_of_role in partners.items():
        for view, indices in enumerate(views_of_role):
            for place, h in enumerate(indices):
                for b in range(2):
                    yield b, number, student.tokens[role][view, b, place], h
            number += 1


def mean_over_omega(terms, average):
    """``terms``: ``(image, query, value)``; three queries an image."""
    if average == 'token':
        return sum(value for *_, value in terms) / len(terms)
    total = 0.0
    for b in range(2):
        for query in range(3):
            mine = [value for i, q, value in terms if (i, q) == (b, query)]
            total = total + (sum(mine) / len(mine) if mine else 0.0)
    return total / 6


@pytest.mark.parametrize('average', ['query', 'token'])
@pytest.mark.parametrize(
    ('flips', 'partners'),
    [
        ((False,) * 4, PARTNERS[False]),
        ((True, False, False, False), PARTNERS[True]),
        ((False, True, True, True), QUERY_FLIPPED),
    ],
    ids=['plain', 'reference flipped', 'queries flipped'],
)
def test_position_loss_is_the_equation(average, flips, partners):
    head = position_head(average=average)
    student, teacher = features(head)
    torch.manual_seed(5)
    (visible,) = head.visible((2, 2), 1).tolist()
    assert len(visible) == 2
    terms, right, distances = [], [], []
    for b, query, token, h in tokens_with_partners(student, partners):
        if h < 0:
            continue
        seen = attended(head.block, token, teacher.tokens['reference'][0, b, visible])
        logits = head.predictor(norm(seen, head.norm))
        terms.append((b, query, logits.exp().sum().log() - logits[h]))
        found = int(logits.argmax())
        right.append(found == h)
        distances.append(math.hypot(found // 2 - h // 2, found % 2 - h % 2))
    expected = mean_over_omega(terms, average)
    torch.manual_seed(5)
    got = head.loss(student, teacher, geometry(flips), 'h')
    torch.testing.assert_close(got['loss'], expected, rtol=1e-6, atol=0)
    parameters = list(head.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    for a, b in zip(torch.autograd.grad(got['loss'], parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
    assert math.isclose(got['accuracy'], sum(right) / len(right), rel_tol=1e-6)
    assert math.isclose(got['distance'], sum(distances) / len(terms), rel_tol=1e-6)
    assert math.isclose(got['omega'], len(terms) / (2 * 7), rel_tol=1e-6)
    assert math.isclose(got['missed'], 1 / 3, rel_tol=1e-6)


@pytest.mark.parametrize('average', ['query', 'token'])
def test_cluster_loss_is_the_equation(average):
    head = cluster_head(average=average, teacher_temp=0.2, student_temp=0.3)
    student, teacher = features(head)
    own, other = student.projectors['h'], teacher.projectors['h']

    q = (other(teacher.tokens['reference'][0].flatten(0, 1)) / 0.2).softmax(-1).detach()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    terms, predictions = [], []
    for b, query, token, h in tokens_with_partners(student, PARTNERS[False]):
        log_p = (own(token[None])[0] / 0.3).log_softmax(-1)
        predictions.append(log_p.exp())
        if h >= 0:
            terms.append((b, query, -(q[4 * b + h] * log_p).sum()))
    p = torch.stack(predictions).mean(0)
    assert len(predictions) == 14  # all query patches, not those of Omega alone
    expected = mean_over_omega(terms, average) + (p * p.log()).sum()

    got = head.loss(student, teacher, geometry(), 'h')
    torch.testing.assert_close(got['loss'], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(got['prediction_entropy'], -(p * p.log()).sum())
    assert got['used_prototypes'] == len(set(q.argmax(1).tolist()))
    parameters = [x for x in own.parameters() if x.requires_grad]
    wanted = torch.autograd.grad(expected, parameters)
    for a, b in zip(torch.autograd.grad(got['loss'], parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_clusters_of_images():
    head = cluster_head(level='image', sinkhorn=0)
    student, teacher = features(head)
    own, other = student.projectors['h'], teacher.projectors['h']
    target = (other(teacher.pooled[0]) / 0.05).softmax(-1)  # (B, K)
    log_p = (own(student.pooled) / 0.1).log_softmax(-1)  # (3, B, K)
    p = log_p.exp().mean((0, 1))
    expected = -(target * log_p).sum(-1).mean() + (p * p.log()).sum()
    got = head.loss(student, teacher, None, 'h')  # wherever the views lie
    torch.testing.assert_close(got['loss'], expected, rtol=1e-5, atol=0)
    assert got['missed'] == 0 and got['omega'] == 1


@pytest.mark.parametrize('change', [dict(sinkhorn=0), dict(me_max=False)])
def test_sinkhorn_and_me_max_can_be_turned_off(change):
    losses = []
    for options in ({}, change):
        head = cluster_head(**options)
        losses.append(head.loss(*features(head), geometry(), 'h'))
    plain, changed = losses
    assert plain['loss'] != changed['loss']
    same = (plain['cross_entropy'] == changed['cross_entropy']).item()
    assert same == ('me_max' in change)
    if same:
        torch.testing.assert_close(changed['loss'], changed['cross_entropy'])


def test_only_the_patch_nearest_the_centre():
    head = position_head(task='center')
    student, teacher = features(head)
    # of four patches at the same distance the first, of those kept: places 0, 0, 0
    indices = head._targets(student, teacher, geometry()).index[0, :, 0].tolist()
    assert indices == [1, -1, -1, 1, -1, -1, -1]
    focal = student.kept | {'random': torch.tensor([1, 2, 3]).expand(1, 2, -1)}
    object.__setattr__(student, 'kept', focal)
    indices = head._targets(student, teacher, geometry()).index[0, :, 0].tolist()
    assert indices[:3] == [-1] * 3  # patch 1 is the nearest kept; it lies outside


def test_place_in_the_query_itself():
    head = position_head(task='own', query_roles=['random'])
    student, teacher = features(head)
    got = head.loss(student, teacher, None, 'h')
    logits = head.predictor(norm(student.tokens['random'][0], head.norm))
    expected = F.cross_entropy(logits.flatten(0, 1), torch.tensor(KEPT * 2))
    torch.testing.assert_close(got['loss'], expected, rtol=1e-6, atol=0)
    assert head.block is None and got['omega'] == 1


@pytest.mark.parametrize('flip', [False, True])
def test_boxes_of_what_is_shared(flip):
    head = position_head(task='box')
    student, teacher = features(head)
    torch.manual_seed(5)
    (visible,) = head.visible((2, 2), 1).tolist()
    places = geometry((flip, False, True, False))
    # the random query shares the right half, the first focal one the upper right cell
    x = 0.25 if flip else 0.75
    boxes = [(x, 0.5, 0.5, 1.0), (x, 0.25, 0.5, 0.5)]
    total, ious = 0.0, []
    for b in range(2):
        for box, tokens in zip(
            boxes,
            (student.tokens['random'][0, b], student.tokens['focal'][0, b]),
            strict=True,
        ):
            context = teacher.tokens['reference'][0, b, visible]
            mean = torch.stack([attended(head.block, t, context) for t in tokens])
            cx, cy, w, h = head.predictor(norm(mean.mean(0), head.norm)).sigmoid()
            l1 = sum((p - t).abs() for p, t in zip((cx, cy, w, h), box, strict=True))
            low = [max(cx - w / 2, box[0] - box[2] / 2), max(cy - h / 2, 0.0)]
            top = box[1] + box[3] / 2
            high = [min(cx + w / 2, box[0] + box[2] / 2), min(cy + h / 2, top)]
            shared = max(high[0] - low[0], 0) * max(high[1] - low[1], 0)
            union = w * h + box[2] * box[3] - shared
            hull_w = max(cx + w / 2, box[0] + box[2] / 2) - min(
                cx - w / 2, box[0] - box[2] / 2
            )
            hull = hull_w * (max(cy + h / 2, top) - min(cy - h / 2, 0.0))
            ious.append((shared / union).item())
            total = total + l1 + 1 - shared / union + (hull - union) / hull
    torch.manual_seed(5)
    got = head.loss(student, teacher, places, 'h')
    torch.testing.assert_close(got['loss'], total / 6, rtol=1e-6, atol=0)
    assert math.isclose(got['missed'], 1 / 3, rel_tol=1e-6)
    assert math.isclose(got['iou'], sum(ious) / 4, rel_tol=1e-6, abs_tol=1e-12)
    assert flip == (got['iou'] > 0)  # random boxes: one case overlaps, one does not


@pytest.mark.parametrize('task', ['patch', 'center', 'box'])
@pytest.mark.parametrize('average', ['query', 'token'])
def test_queries_that_never_meet_the_reference_cost_nothing(task, average):
    apart = geometry(boxes=[(0, 0, 40, 40)] + [(60, 60, 20, 20)] * 3)
    head = position_head(task=task, average=average)
    student, teacher = features(head)
    for tokens in student.tokens.values():
        tokens.requires_grad_()
    got = head.loss(student, teacher, apart, 'h')
    got['loss'].backward()
    assert got['loss'] == 0 and got['missed'] == 1 and got['omega'] == 0
    assert all(value.isfinite() for value in got.values())
    for x in (*head.parameters(), *student.tokens.values()):
        assert x.grad is None or x.grad.eq(0).all()


@pytest.mark.parametrize('average', ['query', 'token'])
def test_clusters_of_queries_apart_leave_me_max(average):
    apart = geometry(boxes=[(0, 0, 40, 40)] + [(60, 60, 20, 20)] * 3)
    head = cluster_head(average=average)
    got = head.loss(*features(head), apart, 'h')
    got['loss'].backward()
    assert got['cross_entropy'] == 0 and got['missed'] == 1
    torch.testing.assert_close(got['loss'], -got['prediction_entropy'])
    assert all(value.isfinite() for value in got.values())


def test_with_everything_masked_the_reference_is_not_seen():
    head = position_head(mask_ratio=1)
    student, teacher = features(head)
    got = head.loss(student, teacher, geometry(), 'h')
    assert head.block is None
    teacher.tokens['reference'].normal_()
    assert head.loss(student, teacher, geometry(), 'h')['loss'] == got['loss']
    got['loss'].backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    head = position_head(mask_ratio=0.75)  # one patch of four
    assert head.block is not None and head.visible.count((2, 2)) == 1


@pytest.mark.parametrize('seen', [0, 1, 3, 4])
def test_predictions_with_any_share_of_the_reference(seen):
    head = position_head()
    student, teacher = features(head)
    queries = student.by_image(('random', 'focal'))  # (2, 7, D)
    references = teacher.tokens['reference'][:, :, :seen]
    got = head.predict(queries, references)
    assert got.shape == (2, 7, 1, 4)
    for b in range(2):
        for token in range(7):
            if seen:
                z = attended(head.block, queries[b, token], references[0, b])
            else:  # an empty sum of values
                z = queries[b, token] + head.block.proj.bias
                mlp = head.block.mlp
                z = z + mlp.fc2(F.gelu(mlp.fc1(norm(z, head.block.norm2))))
            expected = head.predictor(norm(z, head.norm))
            torch.testing.assert_close(got[b, token, 0], expected)


def test_at_the_start_a_patch_attends_to_what_looks_like_it():
    torch.manual_seed(0)
    tokens = F.layer_norm(torch.randn(1, 1, 8, 64), (64,))
    found = {}
    for alike in (0, 4):
        block = PositionHead(64, grid=(2, 4), num_heads=2, alike=alike).block
        weight = torch.eye(64)  # values: the tokens themselves
        block.kv.weight.data[64:] = block.proj.weight.data[:] = weight
        nn.init.zeros_(block.mlp.fc2.weight)
        added = block(tokens[0], tokens[0])[0] - tokens[0, 0]
        found[alike] = torch.cosine_similarity(added, tokens[0, 0], dim=-1)
    assert found[4].min() > 0.99 and found[0].max() < 0.9


def test_what_is_visible_changes_with_every_step():
    head = position_head(mask='random', per_image=True)
    student, teacher = features(head)
    losses = {head.loss(student, teacher, geometry(), 'h')['loss'] for _ in range(8)}
    assert len(losses) > 1


@pytest.mark.parametrize('name', ['position', 'cluster'])
def test_two_references_are_the_mean_of_one_and_the_other(name):
    """Views that are references and queries at once; a view never meets itself."""
    options = loca_config(drop=None)
    config = options['heads'][name]
    if name == 'cluster':  # both see the whole batch
        config.update(sinkhorn=0, me_max=False)
    model = build_model(**options)
    batch = model.data_preprocessor(views())

    def loss(head, inputs, *roles):
        student = model._features(model, inputs, None)
        teacher = model._features(model.teacher, inputs, set(roles))
        torch.manual_seed(0)
        return head.loss(student, teacher, batch['geometry'], name)['loss']

    got = loss(model.heads[name], batch['inputs'], 'global')
    parts = dict(zip(('one', 'other'), batch['inputs']['global'].split(1), strict=True))
    parts['local'] = batch['inputs']['local']
    expected = []
    for reference, rest in (('one', 'other'), ('other', 'one')):
        roles = dict(reference_role=reference, query_roles=[rest, 'local'])
        head = MODELS.build(config | roles | dict(embed_dims=32))
        head.load_state_dict(model.heads[name].state_dict())
        expected.append(loss(head, parts, reference))
    torch.testing.assert_close(got, sum(expected) / 2)


def loca_views(batch=3):
    """Views as LOCA cuts them, by the transform: 32, 32 and three of 16 pixels."""
    crop = TRANSFORMS.build(
        dict(
            type='MultiCrop',
            views=[
                dict(role='reference', size=32, scale=(0.32, 1.0), flip=0.0),
                dict(role='random', size=32, scale=(0.32, 1.0)),
                dict(role='focal', size=16, scale=(0.05, 0.32), count=3),
            ],
        )
    )
    torch.manual_seed(0)
    image = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8).numpy()
    rng = np.random.default_rng(0)
    samples = [crop(dict(img=image, path='a.jpg', rng=rng)) for _ in range(batch)]
    return collate_views(samples)


def loca_model(**options):
    heads = loca_config()['heads']
    for head in heads.values():
        head.pop('reference_role'), head.pop('query_roles')
    drop = dict(random=dict(type='PatchDrop', keep=6))
    return build_model(**loca_config(heads=heads, drop=drop) | options)


def test_each_view_is_encoded_once_and_focal_ones_together():
    model, data = loca_model(), loca_views()
    assert not data['geometry'].flip[:, 0].any()
    calls = []
    for name, backbone in (('s', model.backbone), ('t', model.teacher.backbone)):
        backbone.register_forward_hook(
            lambda module, args, out, name=name: calls.append(
                (name, len(args[0]), args[0].shape[-1], out.patches.requires_grad)
            )
        )
    model.progress = Progress(4, 20, 4)
    log = model.train_step(data, optim_wrapper(model))
    assert calls == [('t', 3, 32, False), ('s', 3, 32, True), ('s', 9, 16, True)]
    monitors = {'accuracy', 'distance', 'omega', 'missed'}
    assert {f'position/{key}' for key in monitors} <= log.keys()
    assert {'cluster/prediction_entropy', 'cluster/used_prototypes'} <= log.keys()


def test_position_head_has_no_copy_in_the_teacher():
    model = loca_model()
    keys = model.state_dict().keys()
    assert any(key.startswith('heads.position.block') for key in keys)
    assert not any('projectors.position' in key for key in keys)
    assert any(key.startswith('teacher.projectors.cluster') for key in keys)


def test_every_trained_parameter_moves():
    model = loca_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.progress = Progress(10, 100, 10)
    model.train_step(loca_views(), optim_wrapper(model))
    for name, parameter in model.named_parameters():
        fixed = name.endswith('weight_g')
        assert parameter.equal(before[name]) == fixed, name


def test_positions_alone_as_in_the_authors_code():
    """The reference goes through the student, and queries have no positions."""
    heads = dict(type='PositionHead', grid=4, mask_ratio=0.0, encoder='student')
    model = loca_model(
        heads=dict(position=heads, cluster=None),
        no_positions=['random', 'focal'],
        drop=dict(reference=dict(type='PatchDrop', keep=0.5, kind='run')),
    )
    assert set(model.heads) == {'position'}
    batch = model.data_preprocessor(loca_views())
    model(**batch)['loss'].backward()
    assert model.backbone.pos_embed.grad.abs().sum() > 0  # by the reference alone
    keys = []
    model.heads['position'].block.register_forward_hook(
        lambda module, args, out: keys.append(args[1])
    )
    model(**batch)
    assert keys[0].shape[1] == 8 and keys[0].requires_grad


@pytest.mark.parametrize(
    ('build', 'words'),
    [
        (lambda: ClusterHead(8, 1), 'out_dims=1; clusters are at least 2'),
        (lambda: ClusterHead(8, 4, level='pixel'), "level='pixel'; choose patch"),
        (lambda: ClusterHead(8, 4, sinkhorn=-1), 'sinkhorn=-1'),
        (lambda: ClusterHead(8, 4, average='all'), "average='all'; choose query"),
        (lambda: ClusterHead(8, 4, query_roles='focal'), 'give a list of roles'),
        (lambda: PositionHead(8, mask_ratio=1.2), 'mask_ratio=1.2; give a share'),
        (lambda: PositionHead(8, task='row'), "task='row'; choose from patch"),
        (lambda: PositionHead(8, encoder='both'), "encoder='both'"),
        (lambda: PositionHead(8, mask='all'), "unknown kind 'all'"),
        (lambda: PositionHead(8, alike=-1), 'alike=-1; give 0 or more'),
    ],
)
def test_wrong_options(build, words):
    with pytest.raises(DenseSSLError, match=words):
        build()


def test_reference_of_another_grid():
    heads = loca_config()['heads']
    heads['position']['grid'] = 5
    model = build_model(**loca_config(heads=heads))
    with pytest.raises(
        DenseSSLError, match=r"'global' have 4 x 4 .* is for 5 x 5; set"
    ):
        model(**model.data_preprocessor(views()))


def test_needs_tracked_geometry():
    model = build_model(**loca_config())
    batch = model.data_preprocessor(views())
    with pytest.raises(DenseSSLError, match=r'where each view lies.*MultiCrop'):
        model(**batch | dict(geometry=None))


def test_other_methods_train_beside_loca():
    heads = loca_config()['heads'] | dict(view=model_config()['heads']['view'])
    model = build_model(**loca_config(heads=heads))
    model.progress = Progress(10, 100, 10)
    log = model.train_step(views(), optim_wrapper(model))
    assert {'loss_view', 'loss_position', 'loss_cluster'} <= log.keys()
    torch.testing.assert_close(
        log['loss'], log['loss_view'] + log['loss_position'] + log['loss_cluster']
    )


def test_under_autocast_losses_are_made_in_float32():
    model = loca_model()
    batch = model.data_preprocessor(loca_views())
    torch.manual_seed(0)
    plain = model(**batch)
    torch.manual_seed(0)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = model(**batch)
    mixed['loss'].backward()
    for key in ('loss_position', 'loss_cluster', 'cluster/prediction_entropy'):
        assert mixed[key].dtype == torch.float32
        torch.testing.assert_close(mixed[key], plain[key], rtol=0.03, atol=0.03)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

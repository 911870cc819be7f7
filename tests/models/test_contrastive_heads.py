"""MoBY's view task and SelfPatch on it, against their equations."""

import copy
from collections import deque

import pytest
import torch
from conftest import build_model, moby_config, optim_wrapper, views
from hypothesis import given
from hypothesis import strategies as st

from densessl.errors import DenseSSLError
from densessl.matching import neighbour_index
from densessl.models.features import Tokens
from densessl.models.heads import ContrastiveHead, ContrastiveSelfPatchHead
from densessl.schedules import Progress


def moby(seed=0, **options):
    """A model whose teacher, statistics and queues differ from what they start as."""
    model = build_model(seed, **moby_config(**options))
    generator = torch.Generator().manual_seed(7)
    for parameter in model.teacher.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if 'running' in name:  # in training nobody looks at these
            buffer.add_(torch.rand(buffer.shape, generator=generator))
    return model


def mlp(layers, x):
    """Linear, batch norm over the rows, ReLU, linear, unit length: written out."""
    x = x @ layers[0].weight.T + layers[0].bias
    x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    x = (x * layers[1].weight + layers[1].bias).clamp_min(0)
    return x @ layers[3].weight.T + layers[3].bias


def unit(x):
    return (x / x.norm(dim=-1, keepdim=True)).double()


def contrast(query, key, negatives, temp=0.2):
    """InfoNCE of one query."""
    logits = torch.stack([query @ key, *(query @ n for n in negatives)]) / temp
    return -logits.log_softmax(0)[0]


@torch.no_grad()
def encode(model, data):
    """Tokens of each view, by student and teacher."""
    crops = [view for role in data['inputs'].values() for view in role]
    return [[b(x) for x in crops] for b in (model.backbone, model.teacher.backbone)]


def test_view_loss_is_the_equation():
    model = moby()
    data = model.data_preprocessor(views(batch=3))
    student, teacher = encode(model, data)
    own, other = model.projectors['view'], model.teacher.projectors['view']
    head = model.heads['view']
    with torch.no_grad():
        q = [
            unit(mlp(head.predictor, mlp(own, model.neck.pool(t)))) for t in student[:2]
        ]
        k = [unit(mlp(other, model.teacher.neck.pool(t))) for t in teacher[:2]]
        terms = [
            contrast(q[v][b], k[1 - v][b], head.queue[1 - v].double())
            for v in range(2)
            for b in range(3)
        ]
    out = model(**data)
    expected = sum(terms) / 3  # a mean over images, a sum over the two directions
    torch.testing.assert_close(out['loss_view'].double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        out['loss'], out['loss_view'] + 0.1 * out['loss_selfpatch']
    )


@pytest.mark.parametrize('negatives', [False, True])
def test_patch_loss_is_the_equation(negatives):
    model = moby(patch=dict(negatives=negatives))
    batch = 3
    data = model.data_preprocessor(views(batch))
    student, teacher = encode(model, data)
    own, other = (p['selfpatch'] for p in (model.projectors, model.teacher.projectors))
    head, terms = model.heads['selfpatch'], []
    with torch.no_grad():
        for f_s, f_t in zip(student, teacher, strict=True):
            index, valid = neighbour_index(f_s.grid, 3, 'wrap')
            summaries = []
            for patches in f_t.patches:
                for i, patch in enumerate(patches):
                    near = index[i][valid[i]]
                    cosine = torch.cosine_similarity(patch, patches[near], dim=-1)
                    chosen = patches[near[cosine.topk(4).indices]]
                    tokens = Tokens(chosen[None], (2, 2))
                    summaries.append(model.teacher.neck.pool(tokens)[0])
            rows = model.neck.norm(f_s.patches).flatten(0, 1)
            q = unit(mlp(head.predictor, mlp(own, rows))).unflatten(0, (batch, -1))
            k = unit(mlp(other, torch.stack(summaries))).unflatten(0, (batch, -1))
            view = []
            for b in range(batch):
                for i in range(q.shape[1]):
                    others = [k[o, i] for o in range(batch) if o != b]
                    view.append(
                        contrast(q[b, i], k[b, i], others)
                        if negatives
                        else (q[b, i] - k[b, i]).square().sum()  # 2 - 2 cos
                    )
            terms.append(sum(view) / len(view))
    out = model(**data)
    expected = sum(terms) / len(terms)
    torch.testing.assert_close(
        out['loss_selfpatch'].double(), expected, rtol=1e-5, atol=0
    )


@given(
    length=st.integers(1, 12),
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
)
def test_queue_is_a_first_in_first_out_line(length, counts):
    head = ContrastiveHead(4, 3, hidden_dims=2, queue_length=length)
    lines = [deque(queue.clone(), maxlen=length) for queue in head.queue]
    generator = torch.Generator().manual_seed(0)
    for count in counts:
        keys = torch.randn(2, count, 3, generator=generator)
        head.enqueue(keys)
        for line, new in zip(lines, keys, strict=True):
            line.extend(new)
    oldest = int(head.enqueued) % length
    for queue, line in zip(head.queue, lines, strict=True):
        assert torch.stack([*line]).equal(queue.roll(-oldest, 0))
    assert head.enqueued == sum(counts)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_keys_of_all_parts_join_after_the_step(accumulate):
    model = moby(accumulate=accumulate)
    head, parts = model.heads['view'], []
    before = head.queue.clone()
    data = views(batch=4)
    batch = model.data_preprocessor(data)
    _, teacher = encode(model, batch)
    with torch.no_grad():
        for view in teacher[:2]:
            pooled = model.teacher.neck.pool(view).chunk(accumulate)
            projector = model.teacher.projectors['view']
            parts.append(torch.cat([unit(mlp(projector, part)) for part in pooled]))
    seen = []
    head.predictor.register_forward_hook(lambda *_: seen.append(head.queue.clone()))
    log = model.train_step(data, optim_wrapper(model))
    assert len(seen) == 2 * accumulate and all(q.equal(before) for q in seen)
    keys = head.queue[:, :4].double()
    torch.testing.assert_close(keys, torch.stack(parts), rtol=1e-4, atol=1e-5)
    assert head.queue[:, 4:].equal(before[:, 4:]) and head.enqueued == 4
    assert log['view/queue_filled'] == 0
    log = model.train_step(data, optim_wrapper(model))
    torch.testing.assert_close(log['view/queue_filled'], torch.tensor(0.4))


def test_queues_start_alike_on_all_ranks_and_draw_from_no_shared_generator():
    one, other = (build_model(s, **moby_config()).heads['view'] for s in range(2))
    assert one.queue.equal(other.queue) and not one.queue[0].equal(one.queue[1])
    torch.testing.assert_close(one.queue.norm(dim=-1), torch.ones(2, 10))
    torch.manual_seed(0)
    ContrastiveHead(4, 3, hidden_dims=2, queue_length=5)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    ContrastiveHead(4, 3, hidden_dims=2, queue_length=50)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize('negatives', [False, True])
def test_gradient_reaches_the_student_only(negatives):
    model = build_model(**moby_config(patch=dict(negatives=negatives)))
    model(**model.data_preprocessor(views()))['loss'].backward()
    for name, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None
        assert has_gradient != name.startswith('teacher.'), name
    assert not any(buffer.requires_grad for buffer in model.buffers())
    names = [name for name, _ in model.teacher.named_parameters()]
    assert not any('predictor' in name for name in names)
    assert len([*model.heads['view'].predictor.parameters()]) == 6


def test_one_step_moves_every_trained_parameter_and_the_teacher():
    model = build_model(**moby_config())
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.progress = Progress(30, 100, 10)
    model.train_step(views(), optim_wrapper(model))
    for name, parameter in model.named_parameters():
        assert not parameter.equal(before[name]), name
    m = 1 + (0.99 - 1) * (1 + torch.tensor(0.3 * torch.pi).cos().item()) / 2
    name = 'projectors.view.0.weight'
    own = model.get_parameter(name)
    expected = m * before[name] + (1 - m) * own
    torch.testing.assert_close(model.get_parameter(f'teacher.{name}'), expected)


def test_statistics_of_the_teacher_are_its_own_and_move():
    model = build_model(**moby_config())
    norms = [p['view'][1] for p in (model.projectors, model.teacher.projectors)]
    for _ in range(2):
        model.train_step(views(), optim_wrapper(model))
    for norm in norms:
        assert norm.num_batches_tracked == 4  # two views a step
        assert not norm.running_mean.eq(0).any()
    assert not norms[0].running_mean.equal(norms[1].running_mean)


def test_eval_forward_changes_no_buffer():
    model = build_model(**moby_config()).eval()
    state = copy.deepcopy(model.state_dict())
    model(**model.data_preprocessor(views()))
    for head in model.heads.values():
        head.end_step()
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_under_autocast_losses_are_made_in_float32():
    model = build_model(**moby_config(patch=dict(negatives=True)))
    batch = model.data_preprocessor(views(batch=8))
    plain = model(**batch)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = model(**batch)
    mixed['loss'].backward()
    for key in ('loss_view', 'loss_selfpatch'):
        assert mixed[key].dtype == torch.float32
        torch.testing.assert_close(mixed[key], plain[key], rtol=0.05, atol=0.05)


@pytest.mark.parametrize('change', [dict(top_k=8), dict(window='all'), dict(temp=0.5)])
def test_patch_options_change_the_loss(change):
    def loss(**options):
        patch = dict(negatives=True) | options
        model = build_model(**moby_config(patch=patch))
        return model(**model.data_preprocessor(views()))['loss_selfpatch']

    assert loss(**change).isfinite() and loss(**change) != loss()


@pytest.mark.parametrize(
    ('build', 'words'),
    [
        (lambda: ContrastiveHead(8, queue_length=0), 'queue_length=0; without keys'),
        (lambda: ContrastiveHead(8, temp=0.0), 'temp=0.0; temperatures are greater'),
        (lambda: ContrastiveSelfPatchHead(8, top_k=9), 'k=9 is more than the 8'),
    ],
)
def test_wrong_options(build, words):
    with pytest.raises(DenseSSLError, match=words):
        build()


@pytest.mark.parametrize('count', [1, 3])
def test_two_views_are_needed(count):
    model = build_model(**moby_config())
    batch = views()
    batch['inputs'] = {'global': batch['inputs']['local'][:, :count]}
    with pytest.raises(DenseSSLError, match=rf'{count} view\(s\).* recipe cut 2'):
        model(**model.data_preprocessor(batch))


def test_a_batch_of_one_image():
    model = build_model(**moby_config())
    batch = model.data_preprocessor(views(batch=1))
    with pytest.raises(DenseSSLError, match='a batch of one row has no spread'):
        model(**batch)
    heads = moby_config(patch=dict(negatives=True))['heads']
    model = build_model(heads=dict(selfpatch=heads['selfpatch']))
    with pytest.raises(DenseSSLError, match='of one has none; raise batch_size'):
        model(**batch)
    model = build_model(heads=dict(selfpatch=moby_config()['heads']['selfpatch']))
    assert model(**batch)['loss'] > 0  # patches enough, and nobody to tell apart

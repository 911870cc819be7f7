"""A step of the algorithm, against the equations."""

import copy
from functools import partial

import one_step
import pytest
import torch
from conftest import build_model, model_config, optim_wrapper, views

from densessl.benchmark.step import count_gflop
from densessl.errors import DenseSSLError
from densessl.matching import neighbour_index
from densessl.models import NonFiniteLossError
from densessl.registry import MODELS
from densessl.schedules import Progress


def teacher_and_student(model):
    for part in ('backbone', 'neck', 'projectors'):
        yield from zip(
            getattr(model.teacher, part).parameters(),
            getattr(model, part).parameters(),
            strict=True,
        )


def cross_entropy(target_logits, center, student_logits, tau_t=0.04, tau_s=0.1):
    """H(P_t, P_s) over the last axis, in float64."""
    p = ((target_logits - center).double() / tau_t).softmax(-1)
    return -(p * (student_logits.double() / tau_s).log_softmax(-1)).sum(-1)


def most_similar(cos):
    """The paper's four."""
    return cos.topk(4).indices


def over_a_threshold(cos):
    """Those over 0.3, or else the most similar one."""
    found = (cos > 0.3).nonzero()[:, 0]
    return found if len(found) else cos.argmax()[None]


@torch.no_grad()
def plain_losses(model, data, positives=most_similar):
    """Both losses of SelfPatch, view by view and patch by patch; and mean positives."""
    data = model.data_preprocessor(data)
    crops = [view for role in data['inputs'].values() for view in role]  # (B, 3, H, W)
    student = [model.backbone(x) for x in crops]
    teacher = [model.teacher.backbone(x) for x in crops]
    heads, own, other = model.heads, model.projectors, model.teacher.projectors

    terms = []
    for i in range(2):
        for v in range(len(crops)):
            if v != i:
                z_t = other['view'](model.teacher.neck.pool(teacher[i]))
                z_s = own['view'](model.neck.pool(student[v]))
                terms.append(cross_entropy(z_t, heads['view'].center, z_s).mean())
    view = sum(terms) / len(terms)

    terms, numbers = [], []
    for f_s, f_t in zip(student, teacher, strict=True):
        index, valid = neighbour_index(f_s.grid, 3, 'wrap')
        for b in range(len(f_t.patches)):
            patches = f_t.patches[b]
            for i in range(len(patches)):
                near = index[i][valid[i]]
                cos = torch.cosine_similarity(patches[i], patches[near], dim=-1)
                chosen = near[positives(cos)]
                numbers.append(len(chosen))
                tokens = copy.copy(f_t)
                object.__setattr__(tokens, 'patches', patches[chosen][None])
                y = model.teacher.neck.pool(tokens)
                z_t = other['selfpatch'](y)[0]
                z_s = own['selfpatch'](model.neck.norm(f_s.patches[b, i]))
                entropy = cross_entropy(z_t, heads['selfpatch'].center, z_s)
                terms.append(entropy / len(patches) / len(f_t.patches) / len(crops))
    return view, sum(terms), sum(numbers) / len(numbers)


@pytest.mark.parametrize('top_k', [4, 'adaptive'])
def test_losses_are_the_equations(top_k):
    heads = model_config()['heads']
    heads['selfpatch'].update(top_k=top_k, threshold=0.3)
    model, data = build_model(heads=heads), views(batch=2)
    # a teacher and centres of their own, so that mixing the two up shows
    for i, (t, _) in enumerate(teacher_and_student(model)):
        t.data.add_(0.01 * torch.randn(t.shape, generator=torch.manual_seed(i)))
    for head in model.heads.values():
        head.center.normal_(std=0.1)
    how = most_similar if top_k == 4 else over_a_threshold
    view, patch, positives = plain_losses(model, data, how)
    out = model(**model.data_preprocessor(data))
    torch.testing.assert_close(out['loss_view'].double(), view, rtol=1e-5, atol=0)
    torch.testing.assert_close(out['loss_selfpatch'].double(), patch, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        out['loss'], out['loss_view'] + 0.1 * out['loss_selfpatch']
    )
    assert out['selfpatch/positives'].item() == pytest.approx(positives)
    assert top_k == 4 or 1 < positives < 8


def test_teacher_starts_equal_and_shares_no_storage():
    model = build_model()
    for teacher, student in teacher_and_student(model):
        assert teacher.equal(student)
        assert teacher.data_ptr() != student.data_ptr()
        assert not teacher.requires_grad


def test_one_step_moves_teacher_and_centre_by_the_formula():
    model, data = build_model(), views()
    wrapper = optim_wrapper(model)
    model.progress = Progress(30, 100, 10)
    old = [t.clone() for t, _ in teacher_and_student(model)]
    with torch.no_grad():
        batch = model.data_preprocessor(data)
        features = model(**batch, mode='tensor')
        view_logits = model.teacher.projectors['view'](features.pooled)
        mean_view = view_logits.flatten(0, 1).mean(0)  # all views, as in the code
    model.train_step(data, wrapper)
    m = 1 + (0.996 - 1) * (1 + torch.tensor(0.3 * torch.pi).cos().item()) / 2
    for before, (teacher, student) in zip(old, teacher_and_student(model), strict=True):
        torch.testing.assert_close(teacher, m * before + (1 - m) * student.detach())
    torch.testing.assert_close(model.heads['view'].center, 0.1 * mean_view)


def test_centre_of_target_views_only():
    heads = model_config()['heads']
    heads['view']['center_views'] = 'target'
    model, data = build_model(heads=heads), views()
    with torch.no_grad():
        features = model(**model.data_preprocessor(data), mode='tensor')
        logits = model.teacher.projectors['view'](features.pooled[:2])
    model.train_step(data, optim_wrapper(model))
    expected = 0.1 * logits.flatten(0, 1).mean(0)
    torch.testing.assert_close(model.heads['view'].center, expected)


def test_every_trained_parameter_moves_after_the_first_epoch():
    model = build_model()
    wrapper = optim_wrapper(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.progress = Progress(10, 100, 10)
    model.train_step(views(), wrapper)
    for name, parameter in model.named_parameters():
        fixed = name.endswith('weight_g')
        assert parameter.equal(before[name]) == fixed, name


def test_last_layers_rest_in_the_first_epoch_only():
    model = build_model()
    wrapper = optim_wrapper(model)
    last = model.projectors['selfpatch'].last_layer.weight_v
    before = last.clone()
    model.progress = Progress(9, 100, 10)
    model.train_step(views(), wrapper)
    assert last.equal(before)
    model.progress = Progress(10, 100, 10)
    model.train_step(views(), wrapper)
    assert not last.equal(before)


def test_accumulated_parts_equal_the_whole_batch():
    outcomes = []
    for accumulate in (1, 2, 4):
        model = build_model(accumulate=accumulate)
        wrapper = optim_wrapper(model, kind='SGD')  # Adam turns rounding into steps
        for step in range(2):
            model.progress = Progress(step, 10, 1)
            log = model.train_step(views(seed=step), wrapper)
        outcomes.append((log['loss'], model.state_dict()))
    for loss, state in outcomes[1:]:
        torch.testing.assert_close(loss, outcomes[0][0], rtol=1e-5, atol=0)
        for key, value in state.items():
            torch.testing.assert_close(
                value, outcomes[0][1][key], rtol=1e-5, atol=1e-6, msg=key
            )


def test_batch_that_does_not_split():
    model = build_model(accumulate=3)
    with pytest.raises(DenseSSLError, match='4 images does not split into'):
        model.train_step(views(), optim_wrapper(model))


def test_teacher_is_deterministic_where_the_student_drops_paths():
    backbone = model_config()['backbone'] | dict(drop_path_rate=0.5)
    model = build_model(backbone=backbone).train()
    image = torch.randn(4, 3, 32, 32)
    first, second = (model.teacher.backbone(image).patches for _ in range(2))
    assert first.equal(second)
    assert not model.backbone(image).patches.equal(model.backbone(image).patches)


def test_teacher_sees_only_what_heads_ask_for():
    heads = dict(view=model_config()['heads']['view'] | dict(center_views='target'))
    model = build_model(heads=heads)
    calls = []
    model.teacher.backbone.register_forward_hook(
        lambda module, args, out: calls.append(args[0].shape)
    )
    model(**model.data_preprocessor(views(batch=3)))
    assert calls == [torch.Size([6, 3, 32, 32])]  # the two global views, no local one


def test_eval_forward_changes_no_buffer():
    model = build_model().eval()
    state = copy.deepcopy(model.state_dict())
    model(**model.data_preprocessor(views()))
    for head in model.heads.values():
        head.end_step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)


def test_non_finite_loss_names_the_term_and_changes_nothing():
    model = build_model()
    wrapper = optim_wrapper(model)
    model.heads['selfpatch'].center[3] = float('nan')
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLossError, match='first such term is loss_selfpatch'):
        model.train_step(views(), wrapper)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize('top_k', [1, 2, 8])
@pytest.mark.parametrize('window', [5, 'all'])
@pytest.mark.parametrize('border', ['wrap', 'clip'])
def test_selfpatch_options_change_the_loss(top_k, window, border):
    def loss(**options):
        heads = model_config()['heads']
        heads['selfpatch'].update(options)
        model = build_model(heads=heads)
        return model(**model.data_preprocessor(views()))['loss_selfpatch']

    changed = loss(top_k=top_k, window=window, border=border)
    assert changed.isfinite() and changed != loss()


@pytest.mark.parametrize(
    'change',
    [
        dict(neck=dict(type='AveragePoolNeck', norm=True)),
        dict(
            backbone=model_config()['backbone'] | dict(cls_token=True),
            neck=dict(type='ClassTokenNeck'),
        ),
        dict(
            backbone=dict(type='TimmBackbone', name='resnet18'),
            neck=dict(type='AveragePoolNeck'),
        ),
    ],
)
def test_other_necks_and_backbones_train(change):
    batch = views(batch=2)
    batch['inputs'] = {'global': torch.randint(0, 256, (2, 2, 3, 96, 96)).byte()}
    heads = model_config()['heads']
    model = build_model(heads=heads, **change)
    before = copy.deepcopy(model.backbone.state_dict())
    model.progress = Progress(10, 100, 10)
    log = model.train_step(batch, optim_wrapper(model))
    assert log['loss'].isfinite()
    moved = [not v.equal(before[k]) for k, v in model.backbone.state_dict().items()]
    assert sum(moved) > len(moved) / 2


def test_selfpatch_on_swin_takes_small_views():
    change = dict(
        backbone=dict(type='SwinTransformer', arch='tiny'),
        neck=dict(type='ClassAttentionNeck'),
    )
    batch = views(batch=1)
    batch['inputs'] = {
        'global': torch.randint(0, 256, (1, 2, 3, 224, 224)).byte(),
        'local': torch.randint(0, 256, (1, 1, 3, 96, 96)).byte(),
    }
    model = build_model(**change)
    log = model.train_step(batch, optim_wrapper(model))
    assert log['loss'].isfinite() and log['loss_selfpatch'] > 0


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (dict(teacher_momentum=0.004), 'share of the old teacher'),
        (dict(accumulate=0), 'accumulate=0'),
        (dict(heads={}), 'no heads'),
    ],
)
def test_wrong_settings(change, words):
    with pytest.raises(DenseSSLError, match=words):
        MODELS.build(model_config(**change))


def test_threshold_of_an_adaptive_number_moves_the_positives():
    def positives(**options):
        heads = model_config()['heads']
        heads['selfpatch'].update(options)
        model = build_model(heads=heads)
        return float(model(**model.data_preprocessor(views()))['selfpatch/positives'])

    found = [positives(top_k='adaptive', threshold=t) for t in (-1.0, 0.2, 0.4, 1.0)]
    assert found[0] == 8 > found[1] > found[2] > found[3] == 1
    assert positives(top_k=3, threshold=0.4) == 3  # a number does not read it


def test_wrong_head_settings():
    heads = model_config()['heads']
    heads['selfpatch']['top_k'] = 9
    with pytest.raises(DenseSSLError, match='k=9 is more than the 8 neighbours'):
        MODELS.build(model_config(heads=heads))
    heads = model_config()['heads']
    heads['view']['teacher_temp'] = 0.0
    with pytest.raises(DenseSSLError, match='greater than 0'):
        MODELS.build(model_config(heads=heads))


@pytest.mark.parametrize('method', one_step.METHODS)
def test_products_of_a_step_can_be_counted(method):
    """Which torch's counter refuses for some uses of views."""
    assert count_gflop(partial(one_step.step, **one_step.METHODS[method])) > 0.01

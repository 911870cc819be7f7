"""Monitors on features with known answers, and the warnings they lead to."""

import math
from types import SimpleNamespace

import pytest
import torch

from densessl.engine.hooks import HealthHook, effective_rank, feature_std


def test_feature_std():
    torch.manual_seed(0)
    assert feature_std(torch.ones(10, 8)) < 1e-6
    assert feature_std(torch.randn(20_000, 64)) == pytest.approx(1.0, abs=0.01)
    scaled = torch.randn(100, 64)
    torch.testing.assert_close(feature_std(7 * scaled), feature_std(scaled))


@pytest.mark.parametrize('rank', [1, 3, 8])
def test_effective_rank_of_equal_directions(rank):
    # +e_i and -e_i for i < rank: centred, with equal singular values
    basis = torch.eye(8)[:rank]
    assert effective_rank(torch.cat([basis, -basis])) == pytest.approx(rank)


def test_effective_rank_of_a_spectrum():
    values = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    features = torch.cat([torch.diag(values), -torch.diag(values)])
    share = values / values.sum()
    expected = math.exp(-sum(p * math.log(p) for p in share.tolist()))
    assert effective_rank(features) == pytest.approx(expected)
    assert effective_rank(torch.ones(5, 3)) == 0


class Log:
    def __init__(self):
        self.warnings = []

    def warning(self, words):
        self.warnings.append(words)

    def debug(self, words):
        pass


def look(
    hook,
    features,
    entropy,
    waiting=0.0,
    looks=1,
    matched=40.0,
    by_place=False,
    step=0,
    prediction_entropy=None,
):
    """Warnings after some looks at a model with one head of K = 100, 49 tokens."""
    head = SimpleNamespace(
        center=torch.zeros(100),
        matcher=SimpleNamespace(needs_geometry=by_place),
        target_tokens=49,
    )
    scalars = {
        f'train/{name}': SimpleNamespace(mean=lambda window, value=value: value)
        for name, value in (('time', 1.0), ('data_time', waiting))
    }
    added = []
    runner = SimpleNamespace(
        iter=step,
        max_iters=1000,
        model=SimpleNamespace(
            monitored={'view': features}, heads={'view': head}, momentum=0.99
        ),
        optim_wrapper=SimpleNamespace(
            optimizer=SimpleNamespace(param_groups=[dict(weight_decay=0.1)])
        ),
        message_hub=SimpleNamespace(log_scalars=scalars),
        visualizer=SimpleNamespace(add_scalars=lambda v, step: added.append(v)),
        logger=Log(),
    )
    for _ in range(looks):
        outputs = {'loss': 1.0, 'view/teacher_entropy': entropy, 'view/kl': 0.1}
        outputs['view/match_perplexity'] = matched
        if prediction_entropy is not None:
            outputs['view/prediction_entropy'] = prediction_entropy
        hook.after_train_iter(runner, 0, outputs=outputs)
        assert outputs == {'loss': 1.0}  # monitors are not logged as losses
    return runner.logger.warnings, added[-1]


def test_a_healthy_run_is_left_alone():
    torch.manual_seed(0)
    hook = HealthHook(interval=1, patience=2)
    warnings, values = look(hook, torch.randn(50, 8), 2.0, looks=5)
    assert warnings == []
    assert values['view/effective_rank'] > 6 and values['data_wait'] == 0
    assert {'view/kl', 'teacher_momentum', 'weight_decay'} <= values.keys()


@pytest.mark.parametrize(
    ('features', 'entropy', 'waiting', 'words'),
    [
        (torch.ones(50, 8), 2.0, 0.0, "features of head 'view' collapse"),
        (torch.eye(8), math.log(100), 0.0, 'uniform: its entropy is 100.0% of log K'),
        (torch.eye(8), 2.0, 0.5, '50% of the time goes into waiting for data'),
    ],
)
def test_sick_runs_are_told_once_with_a_remedy(features, entropy, waiting, words):
    hook = HealthHook(interval=1, patience=3)
    assert look(hook, features, entropy, waiting, looks=2)[0] == []
    (warning,) = look(hook, features, entropy, waiting, looks=4)[0]
    assert words in warning and ('lower' in warning or 'raise' in warning)


@pytest.mark.parametrize(
    ('prototypes', 'warned'), [(1.0, True), (1.98, True), (2.0, False), (90.0, False)]
)
def test_collapse_of_the_clusters(prototypes, warned):
    torch.manual_seed(0)
    hook = HealthHook(interval=1, patience=2)
    warnings, _ = look(
        hook, torch.randn(50, 8), 2.0, looks=5, prediction_entropy=math.log(prototypes)
    )
    assert len(warnings) == warned
    if warned:
        assert (
            f"'view' collapse: predictions spread over {prototypes:.1f} of 100"
            in (warnings[0])
        )
        assert 'turn on sinkhorn' in warnings[0]


@pytest.mark.parametrize(
    ('matched', 'by_place', 'step', 'warned'),
    [
        (12.2, False, 200, True),
        (12.3, False, 200, False),
        (12.2, True, 200, False),
        (12.2, False, 50, False),  # too early to tell
    ],
)
def test_collapse_of_the_matching(matched, by_place, step, warned):
    torch.manual_seed(0)
    hook = HealthHook(interval=1, patience=2)
    features = torch.randn(50, 8)
    warnings, values = look(
        hook, features, 2.0, looks=5, matched=matched, by_place=by_place, step=step
    )
    assert values['view/match_perplexity'] == matched
    assert len(warnings) == warned  # once, not at each look
    if warned:
        assert "head 'view' collapses: student tokens match 12.2 of 49" in warnings[0]
        assert "matching='geometric'" in warnings[0]

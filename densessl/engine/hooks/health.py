"""Is the training well? Monitors per head, and warnings in plain words."""

from __future__ import annotations

import math

import torch
from mmengine.hooks import Hook
from torch import Tensor

from densessl.datasets import BrokenImageMonitor
from densessl.engine.distributed import unwrap
from densessl.registry import HOOKS


def feature_std(features: Tensor) -> Tensor:
    """Spread of unit-length features, 0 (all equal) to 1 (isotropic).

    The standard deviation over rows of ``sqrt(D) f / |f|``, averaged over channels.

    Args:
        features: ``(n, D)``.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    return unit.std(0, correction=0).mean() * features.shape[1] ** 0.5


def effective_rank(features: Tensor) -> Tensor:
    """``exp(entropy)`` of the normalised singular values of centred features.

    From 1, features on a line, to ``min(n - 1, D)`` (Roy and Vetterli, EUSIPCO 2007);
    0 where all rows are equal.

    Args:
        features: ``(n, D)``.
    """
    x = features.double()
    values = torch.linalg.svdvals(x - x.mean(0))
    if values[0] < 1e-9:
        return values.new_zeros(())
    share = values / values.sum()
    return torch.special.entr(share).sum().exp()


@HOOKS.register_module()
class HealthHook(Hook):
    """Logs what tells a healthy run from a sick one, and warns when it turns.

    Per head, under ``<head>/``: ``teacher_entropy`` and ``kl`` in nats,
    ``center_norm``, ``feature_std`` and ``effective_rank`` of the teacher's features,
    and what the head adds (see :class:`densessl.models.heads.RegionHead`); and
    ``data_wait``, the share of time spent waiting for data. They go to
    ``scalars.json`` (and other visualisation backends), not to the console.

    Args:
        interval: steps between two looks.
        patience: looks in a row that must be bad before a warning.
        min_feature_std: a lower spread counts as collapsed.
        max_entropy_share: more teacher entropy, as a share of ``log K``, counts as
            uniform.
        min_match_share: a smaller share of matched teacher tokens counts as a collapse
            of the matching, once a tenth of the training is over: features of a fresh
            network also match few tokens.
        min_prototype_share: a smaller share of prototypes in the mean prediction of a
            cluster head, as ``exp(entropy)``, counts as a collapse of the clusters.
        max_data_wait: a greater share of waiting gives a hint.
    """

    priority = 'HIGHEST'  # sees the outputs before they are logged

    def __init__(
        self,
        interval: int = 50,
        patience: int = 3,
        *,
        min_feature_std: float = 0.02,
        max_entropy_share: float = 0.995,
        min_match_share: float = 0.25,
        min_prototype_share: float = 0.01,
        max_data_wait: float = 0.3,
    ) -> None:
        self.interval = interval
        self.patience = patience
        self.min_feature_std = min_feature_std
        self.max_entropy_share = max_entropy_share
        self.min_match_share = min_match_share
        self.min_prototype_share = min_prototype_share
        self.max_data_wait = max_data_wait
        self._bad: dict[str, int] = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Take the monitors out of the outputs; look at them every few steps."""
        monitors = {key: outputs.pop(key) for key in list(outputs) if '/' in key}
        if not self.every_n_train_iters(runner, self.interval):
            return
        model = unwrap(runner.model)
        values = {key: float(value) for key, value in monitors.items()}
        for name, features in model.monitored.items():
            values[f'{name}/feature_std'] = float(feature_std(features))
            values[f'{name}/effective_rank'] = float(effective_rank(features))
        values['teacher_momentum'] = model.momentum
        values['weight_decay'] = runner.optim_wrapper.optimizer.param_groups[0][
            'weight_decay'
        ]
        scalars = runner.message_hub.log_scalars
        if 'train/time' in scalars:
            waited = scalars['train/data_time'].mean(self.interval)
            values['data_wait'] = waited / scalars['train/time'].mean(self.interval)
        runner.visualizer.add_scalars(values, step=runner.iter + 1)
        runner.logger.debug(f'health at step {runner.iter + 1}: {values}')
        for name in model.monitored:  # heads that rest are not
            self._judge(runner, name, model.heads[name], values)
        self._count(
            runner,
            'data_wait',
            values.get('data_wait', 0) > self.max_data_wait,
            f'{values.get("data_wait", 0):.0%} of the time goes into waiting for '
            'data: raise train_dataloader.num_workers, or store smaller pictures',
        )

    def _judge(self, runner, name: str, head, values: dict[str, float]) -> None:
        std = values[f'{name}/feature_std']
        self._count(
            runner,
            f'{name}/collapse',
            std < self.min_feature_std,
            f'the features of head {name!r} collapse: their spread is {std:.4f} of 1, '
            'nearly the same for every input; lower the learning rate or teacher_temp, '
            'lengthen the warm-up, or raise teacher_momentum or the batch size',
        )
        matched = values.get(f'{name}/match_perplexity')
        if matched is not None and not head.matcher.needs_geometry:
            self._count(
                runner,
                f'{name}/matches',
                matched < self.min_match_share * head.target_tokens
                and runner.iter > runner.max_iters / 10,
                f'the matching of head {name!r} collapses: student tokens match '
                f'{matched:.1f} of {head.target_tokens} teacher tokens; match by place '
                "(matching='geometric'), or begin with the view task alone and add "
                'the head later (--add-heads)',
            )
        predicted = values.get(f'{name}/prediction_entropy')
        if predicted is not None:
            used, count = math.exp(predicted), len(head.center)
            self._count(
                runner,
                f'{name}/clusters',
                used - 1 < self.min_prototype_share * (count - 1),
                f'the clusters of head {name!r} collapse: predictions spread over '
                f'{used:.1f} of {count} prototypes; turn on sinkhorn (3 rounds) and '
                'me_max, or lower the learning rate',
            )
        entropy = values.get(f'{name}/teacher_entropy')
        if entropy is None:
            return
        share = entropy / math.log(len(head.center))
        self._count(
            runner,
            f'{name}/uniform',
            share > self.max_entropy_share,
            f"the teacher's output of head {name!r} is uniform: its entropy is "
            f'{share:.1%} of log K, so there is nothing to learn from; lower '
            'teacher_temp, or center_momentum',
        )

    def _count(self, runner, kind: str, bad: bool, words: str) -> None:
        self._bad[kind] = self._bad.get(kind, 0) + 1 if bad else 0
        if self._bad[kind] == self.patience:
            runner.logger.warning(words)


@HOOKS.register_module()
class BrokenImageHook(Hook):
    """Names pictures that cannot be read, and stops a run that meets too many.

    Args:
        max_broken: share of the pictures that may be broken; see
            :class:`densessl.datasets.BrokenImageMonitor`.
    """

    def __init__(self, max_broken: float = 0.01) -> None:
        self.monitor = BrokenImageMonitor(max_broken)

    def before_train(self, runner) -> None:
        """Learn how many pictures there are."""
        self.monitor.num_images = len(runner.train_dataloader.dataset)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Count the batch's pictures."""
        for path in self.monitor.update(len(data_batch['paths']), data_batch['broken']):
            runner.logger.warning(f'cannot read {path}; another picture took its place')

"""Scores while the training goes on, at a bounded cost."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mmengine.dist import master_only
from mmengine.hooks import Hook

from densessl.engine.checkpoint import write_atomically
from densessl.engine.distributed import unwrap
from densessl.errors import DenseSSLError
from densessl.evaluation import FeatureExtractor
from densessl.interop.backbone import save_backbone
from densessl.registry import HOOKS

from .probe_pictures import miou, read_classified, read_masked, top1

BEST_FILE = 'best_dense.safetensors'
BEST_ABOUT = 'best_dense.json'
_TRIAL = 10  # the first probe's cost is foretold from this share of the pictures


@HOOKS.register_module()
class ProbeHook(Hook):
    """Every few epochs, scores the teacher on a small labelled set.

    Logs ``probe/miou`` of a linear segmentation and ``probe/knn``, the top-1 share of
    k-NN, and keeps the teacher's backbone of the best score (mIoU, else k-NN) as
    ``best_dense.safetensors``, with what it scored in ``best_dense.json``. Without
    labelled data the hook does nothing.

    With ``guard`` it scores the weights that the run begins from too, before the first
    step. They are the first to be kept, and a later score below theirs by more than
    ``margin`` is warned of, once, or stops the run.

    The probes, with the reading of their pictures, take at most ``max_share`` of the
    training time. The cost of the first is foretold from a tenth of the pictures. A
    probe that would take more waits, and the interval grows. The guard's look at the
    start comes on top.

    The training is what it would be without: no generator moves, and only the first
    process probes while the others wait for its next step.

    Args:
        segmentation: folder with ``images/{train,val}`` and ``annotations/{train,val}``
            or of VOC's layout (see `mask_pairs`); ``'demo'`` for built-in demo scenes.
        knn: folder with ``train/CLASS`` and ``val/CLASS``.
        interval: epochs between two probes; the last epoch has one too.
        max_share: of the training time, above 0; 1e9 sets no bound.
        size: side in px of all pictures; central crops for k-NN.
        train_pictures: most pictures to learn from, spread evenly over those there.
        val_pictures: most pictures to score on.
        ignore: labels of pixels that do not count, beside 255.
        k: neighbours.
        guard: what a fall of the score does, ``'warn'`` or ``'stop'``; None for no look
            at the start.
        margin: fall of the score, a share such as 0.01, that is borne.

    Raises:
        DenseSSLError: an option is out of range; with ``'stop'``, the score fell.
    """

    priority = 'LOWEST'  # after the checkpoint

    def __init__(
        self,
        segmentation: str | None = None,
        knn: str | None = None,
        *,
        interval: int = 5,
        max_share: float = 0.05,
        size: int = 224,
        train_pictures: int = 200,
        val_pictures: int = 100,
        ignore: Sequence[int] = (),
        k: int = 10,
        guard: Literal['warn', 'stop'] | None = None,
        margin: float = 0.01,
    ) -> None:
        counts = dict(
            interval=interval,
            size=size,
            train_pictures=train_pictures,
            val_pictures=val_pictures,
            k=k,
        )
        for name, value in counts.items():
            if value < 1:
                raise DenseSSLError(f'ProbeHook: {name}={value}; give 1 or more')
        if not max_share > 0:
            raise DenseSSLError(
                f'ProbeHook: max_share={max_share}; give a share of the training time '
                'above 0, such as 0.05'
            )
        if guard not in (None, 'warn', 'stop') or not 0 <= margin < 1:
            raise DenseSSLError(
                f"ProbeHook: guard={guard!r} with margin={margin}; choose 'warn', "
                "'stop' or None, and a share of the score from 0, such as 0.01"
            )
        self.segmentation = segmentation
        self.knn = knn
        self.guard = guard
        self.margin = margin
        self.interval = interval
        self.max_share = max_share
        self.settings = dict(
            segmentation=segmentation,
            knn=knn,
            size=size,
            train_pictures=train_pictures,
            val_pictures=val_pictures,
            ignore=list(ignore),
            k=k,
        )
        self.best = -math.inf
        self.start: float | None = None
        """The score before the first step, where there is a guard."""
        self.trained = 0.0
        """Seconds of training since the start or the resume."""
        self.spent = 0.0
        """Seconds of probes, with reading and trial."""
        self.cost: float | None = None
        """Seconds that a probe takes."""
        self._told = self._warned = False

    @property
    def wanted(self) -> bool:
        """Whether there is anything to score on."""
        return bool(self.segmentation or self.knn)

    @master_only
    def before_train(self, runner) -> None:
        """Read the pictures, and after a resume what was best so far."""
        if not self.wanted:
            return
        start = self._clock()
        model = unwrap(runner.model)
        patch, size = model.teacher.backbone.patch_size, self.settings['size']
        if size % patch:
            raise DenseSSLError(
                f'ProbeHook: size={size} is not a multiple of the patch, {patch} px; '
                f'set default_hooks.probe.size={max(1, round(size / patch)) * patch}'
            )
        self.data = {}
        if self.segmentation:
            self.data['miou'] = read_masked(**self.settings)
        if self.knn:
            self.data['knn'] = read_classified(**self.settings)
        about = Path(runner.work_dir) / BEST_ABOUT
        if runner.iter and about.is_file():
            found = json.loads(about.read_text())
            if found['settings'] == self.settings:
                self.best, self.start = found['score'], found.get('start')
        self._next = (runner.epoch // self.interval + 1) * self.interval
        self._first = runner.epoch
        self.spent += self._clock() - start
        if self.guard and not runner.iter:
            self._probe(runner, 'before the first step')
        elif self.guard and self.start is None:
            runner.logger.warning(
                f'no guard: {about} has no score of the start, which is taken when a '
                'run begins; start anew with default_hooks.probe.guard set'
            )

    def before_train_epoch(self, runner) -> None:
        """Take the time."""
        self._began = self._clock()

    @master_only
    def after_train_epoch(self, runner) -> None:
        """Probe, if it is time to and the time allows it."""
        self.trained += self._clock() - self._began
        done = runner.epoch + 1
        last = done == runner.max_epochs
        if not self.wanted or not (last or done >= self._next):
            return
        if self.cost is None:
            start = self._clock()
            self._score(_extractor(runner), trial=True)
            took = self._clock() - start
            self.spent += took
            self.cost = _TRIAL * took
        if self.spent + self.cost > self.max_share * self.trained:
            self._wait(runner, done, last)
            return
        score = self._probe(runner, f'after epoch {done}')
        self._next = done + self.interval
        if self.start is not None and self.start - score > self.margin:
            self._alarm(runner, score)

    def _probe(self, runner, when: str) -> float:
        """Score, keep the best, log; the score that ranks."""
        start = self._clock()
        values = self._score(_extractor(runner))
        score = next(iter(values.values()))
        if not runner.iter:
            self.start = score
        self._keep(runner, unwrap(runner.model), values)
        self.cost = self._clock() - start
        logged = {f'probe/{name}': value for name, value in values.items()}
        logged['probe/seconds'] = self.cost
        words = ', '.join(f'{name} {value:.1%}' for name, value in values.items())
        words = f'probe {when}: {words} ({self.cost:.1f} s'
        if self.trained:
            self.spent += self.cost
            share = self.spent / self.trained
            logged['probe/time_share'] = share
            words += f'; {share:.1%} of the training time so far'
        runner.logger.info(f'{words})')
        runner.visualizer.add_scalars(logged, step=runner.iter)
        return score

    def _alarm(self, runner, score: float) -> None:
        """The training harms what it began from: say so once, or stop."""
        words = (
            f'the score fell to {score:.1%} from {self.start:.1%} before the first '
            f'step, by more than the margin of {self.margin:.1%}: lower '
            'optim_wrapper.optimizer.lr or optim_wrapper.layer_decay, or raise '
            'model.freeze_backbone_epochs or model.teacher_momentum; the best backbone '
            f'so far is {Path(runner.work_dir) / BEST_FILE}'
        )
        if self.guard == 'stop':
            raise DenseSSLError(words)
        if not self._warned:
            runner.logger.warning(words)
        self._warned = True

    def _score(self, extractor: FeatureExtractor, trial: bool = False) -> dict:
        """Scores by name; a trial takes a tenth of the pictures, and any label."""
        scores = {}
        for name, (train, val, classes) in self.data.items():
            if trial:
                train, val = (
                    [(image, label * 0) for image, label in part[::_TRIAL]]
                    for part in (train, val)
                )
            protocol = miou if name == 'miou' else top1
            scores[name] = protocol(extractor, train, val, classes, self.settings['k'])
        return scores

    def _wait(self, runner, done: int, last: bool) -> None:
        """Put the next probe off until it may take its time; say so once."""
        epoch = self.trained / (done - self._first)
        self.interval = max(
            self.interval, math.ceil(self.cost / (self.max_share * epoch))
        )
        missing = (self.spent + self.cost) / self.max_share - self.trained
        self._next = done + max(1, math.ceil(missing / epoch))
        if last or not self._told:
            runner.logger.warning(
                f'no probe after epoch {done}: one takes {self.cost:.1f} s, and '
                f'{self.max_share:.0%} of the training time so far is '
                f'{self.max_share * self.trained:.1f} s; '
                + ('' if last else f'the next one follows epoch {self._next}; ')
                + 'lower default_hooks.probe.train_pictures or raise max_share'
            )
        self._told = True

    def _keep(self, runner, model, values: dict[str, float]) -> None:
        """Save the teacher if no probe before was better."""
        metric = next(iter(values))
        if not values[metric] > self.best:
            return
        self.best = values[metric]
        folder = Path(runner.work_dir)
        write_atomically(
            folder / BEST_FILE,
            lambda partial: save_backbone(
                partial,
                model.teacher.backbone,
                runner.cfg.model.backbone,
                **model.data_preprocessor.normalization,
                steps=runner.iter,
            ),
        )
        about = dict(
            metric=f'probe/{metric}',
            score=self.best,
            start=self.start,
            steps=runner.iter,
            scores=values,
            settings=self.settings,
        )
        write_atomically(
            folder / BEST_ABOUT,
            lambda partial: partial.write_text(json.dumps(about, indent=2)),
        )

    def _clock(self) -> float:
        return time.perf_counter()


def _extractor(runner) -> FeatureExtractor:
    """Features of the teacher."""
    model = unwrap(runner.model)
    return FeatureExtractor(
        model.teacher.backbone, **model.data_preprocessor.normalization
    )

"""Logistic regression by L-BFGS, and the search for its strength."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from densessl.errors import DenseSSLError

STRENGTHS = np.logspace(-6, 6, 96)
"""The values of C that `search_strength` looks among."""
_FIRST = 7


@dataclass(frozen=True)
class LogisticRegression:
    """A trained classifier; what it predicts is ``x W + b``.

    Attributes:
        weight: ``(D, K)`` ``W``; ``K`` is 1 for two classes.
        bias: ``(K,)`` ``b``.
        iterations: of L-BFGS.
    """

    weight: Tensor
    bias: Tensor
    iterations: int

    def __call__(self, features: Tensor) -> Tensor:
        """``(M, K)`` logits of ``(M, D)`` features."""
        return features.to(self.weight) @ self.weight + self.bias


def fit_logistic(
    features: Tensor,
    targets: Tensor,
    strength: float,
    num_classes: int,
    *,
    max_iterations: int = 1000,
) -> LogisticRegression:
    """Minimise ``C sum_i loss_i + |W|^2 / 2``, the bias free, as scikit-learn does.

    The loss is the cross-entropy of a softmax, of one logit for two classes, or of one
    logit for each class with several labels a picture. L-BFGS with a strong Wolfe line
    search starts from zero; it works on centred features and on the mean, which
    changes the way there and not the minimum.

    Args:
        features: ``(M, D)``; they set device and type, float64 or float32.
        targets: ``(M,)`` int64 classes, or ``(M, C)`` of 1, 0 and -1 (left out).
        strength: ``C`` > 0; the greater, the less regularised.
        num_classes: ``C`` of the classes.
        max_iterations: of L-BFGS.

    Raises:
        DenseSSLError: the minimisation left the finite numbers.
    """
    one_logit = targets.ndim == 2 or num_classes == 2
    outputs = num_classes if targets.ndim == 2 or num_classes > 2 else 1
    total, dims = features.shape
    shift = features.mean(0)
    centred = features - shift
    targets = targets.to(features.device)
    if one_logit:
        truth = targets.reshape(total, outputs).to(features.dtype)
        counted = (truth >= 0).to(features.dtype)
        truth = truth.clamp_min(0)
    weight = features.new_zeros(dims, outputs, requires_grad=True)
    bias = features.new_zeros(outputs, requires_grad=True)
    double = features.dtype == torch.float64
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=1e-9 if double else 1e-6,
        tolerance_change=1e-13 if double else 1e-9,
        history_size=20,
        line_search_fn='strong_wolfe',
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = centred @ weight + bias
        if one_logit:
            loss = F.binary_cross_entropy_with_logits(
                logits, truth, counted, reduction='sum'
            )
        else:
            loss = F.cross_entropy(logits, targets, reduction='sum')
        loss = loss / total + weight.square().sum() / (2 * strength * total)
        loss.backward()
        return loss

    optimizer.step(closure)
    iterations = optimizer.state[weight]['n_iter']
    weight, bias = weight.detach(), bias.detach()
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise DenseSSLError(
            f'logistic regression with C={strength:.3g}: the weights are not finite; '
            'set protocol.dtype=float64'
        )
    return LogisticRegression(weight, bias - shift @ weight, iterations)


def search_strength(
    score: Callable[[float], float],
) -> tuple[float, dict[float, float]]:
    """Look for the C with the best score among `STRENGTHS`.

    As for CLIP (arXiv:2103.00020, App. A.3): 7 values over the whole range first, then
    the two half-way to the neighbours of the best so far, until these are next to it.

    Args:
        score: of a value of C, greater is better; NaN never wins.

    Returns:
        The best value, the smallest of equals, and all scores by value.
    """
    scores: dict[int, float] = {}

    def look(places: list[int]) -> int:
        for place in places:
            if 0 <= place < len(STRENGTHS) and place not in scores:
                found = score(float(STRENGTHS[place]))
                scores[place] = -math.inf if math.isnan(found) else found
        return min(scores, key=lambda place: (-scores[place], place))

    first = np.linspace(0, len(STRENGTHS) - 1, _FIRST).round().astype(int).tolist()
    best = look(first)
    step = math.ceil((len(STRENGTHS) - 1) / (_FIRST - 1))
    while step > 1:
        step = math.ceil(step / 2)
        best = look([best - step, best + step])
    by_value = {float(STRENGTHS[place]): scores[place] for place in sorted(scores)}
    return float(STRENGTHS[best]), by_value

"""The loss of boxes on boxes that can be drawn."""

import pytest
import torch

from densessl.losses import box_loss


@pytest.mark.parametrize(
    ('a', 'b', 'distance', 'giou', 'iou'),
    [
        # the same
        ((0.5, 0.5, 0.4, 0.2), (0.5, 0.5, 0.4, 0.2), 0.0, 1.0, 1.0),
        # the left half of b: union and hull are b
        ((0.25, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0), 0.75, 0.5, 0.5),
        # two quarters at opposite corners: hull 1, union 1/2
        ((0.25, 0.25, 0.5, 0.5), (0.75, 0.75, 0.5, 0.5), 1.0, -0.5, 0.0),
        # side by side with a gap of their own width: hull 3, union 2
        ((0.1, 0.5, 0.2, 0.2), (0.5, 0.5, 0.2, 0.2), 0.4, -1 / 3, 0.0),
    ],
)
def test_l1_and_giou(a, b, distance, giou, iou):
    a, b = (torch.tensor(box, dtype=torch.float64) for box in (a, b))
    for one, other in ((a, b), (b, a)):
        loss, found = box_loss(one, other)
        torch.testing.assert_close(loss.item(), distance + 1 - giou)
        torch.testing.assert_close(found.item(), iou)


def test_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    target = torch.rand(6, 4).double() * 0.5 + 0.2
    predicted = (torch.rand(6, 4).double() * 0.5 + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: box_loss(x, target)[0], predicted)

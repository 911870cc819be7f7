"""The projector against its description written with plain functions."""

import pytest
import torch
import torch.nn.functional as F

from densessl.models.heads import DINOProjector


@pytest.mark.parametrize('norm_last_layer', [True, False])
def test_equals_plain_functions_with_gradients(norm_last_layer):
    torch.manual_seed(0)
    options = dict(hidden_dims=12, bottleneck_dims=5, norm_last_layer=norm_last_layer)
    projector = DINOProjector(8, 5000, **options).double()
    x = torch.randn(6, 8, dtype=torch.float64)
    v, g = projector.last_layer.weight_v, projector.last_layer.weight_g
    z = F.normalize(projector.mlp(x), dim=-1) @ (g * F.normalize(v, dim=1)).T
    torch.testing.assert_close(projector(x), z)
    out_grad = torch.randn_like(z)
    wanted = [p for p in projector.parameters() if p.requires_grad]
    assert (g.requires_grad is False) == norm_last_layer
    expected = torch.autograd.grad(z, wanted, out_grad)
    got = torch.autograd.grad(projector(x), wanted, out_grad)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)

"""The lean MLP against timm's: values, gradients, autocast."""

import pytest
import torch
from timm.layers import Mlp

from densessl.models.mlp import LeanLayers, LeanMlp, gelu_linear


def test_equals_timms_with_gradients():
    torch.manual_seed(0)
    plain, lean = Mlp(8, 32).double(), LeanMlp(8, 32).double()
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    results = []
    for mlp in (plain, lean):
        inputs = x.clone().requires_grad_()
        out = mlp(inputs)
        out.square().sum().backward()
        results.append([out, inputs.grad, *(p.grad for p in mlp.parameters())])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    layer = torch.nn.Linear(6, 3).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gelu_linear(t, layer), x)


@pytest.mark.parametrize('kept', [True, False])
def test_autocast_gives_gradients_of_the_parameters_type(kept):
    torch.manual_seed(0)
    mlp = LeanMlp(8, 32)
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast('cpu', dtype=torch.bfloat16, cache_enabled=kept):
        out = mlp(x)
        assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    reference = Mlp(8, 32)
    reference.load_state_dict(mlp.state_dict())
    reference(x.detach()).square().sum().backward()
    for ours, theirs in zip(mlp.parameters(), reference.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 0.03


def test_lean_layers_of_mmcvs_ffn_keep_their_keys_and_gradients():
    from mmcv.cnn.bricks.transformer import FFN

    torch.manual_seed(0)
    ffn = FFN(6, 12, act_cfg=dict(type='GELU')).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    wanted = [x, *ffn.parameters()]
    expected = ffn(x)
    out_grad = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, wanted, out_grad)
    keys = list(ffn.state_dict())
    ffn.layers = LeanLayers(*ffn.layers)
    assert list(ffn.state_dict()) == keys
    out = ffn(x)
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out, wanted, out_grad), grads, strict=True):
        torch.testing.assert_close(a, b)

"""Lean layers against timm's and torch's: values, gradients, what is kept."""

import pytest
import torch
from timm.layers import Mlp

from densessl.models import mlp as mlp_module
from densessl.models.mlp import LeanLayers, LeanMlp, gelu_linear, norm_linear


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


@pytest.mark.parametrize('shape', [(8,), (1, 8), (23, 8), (4, 6, 8), (0, 8)])
def test_some_rows_after_the_others(shape, monkeypatch):
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 3).double()
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for values in (10**6, 5 * 8 + 1):  # all rows at once, and five
        monkeypatch.setattr(mlp_module, '_CPU_HIDDEN', values)
        inputs = x.clone().requires_grad_()
        out = gelu_linear(inputs, layer)
        grads = torch.autograd.grad(
            (out * out.sin()).sum(), [inputs, *layer.parameters()]
        )
        results.append([out, *grads])
    plain = layer(torch.nn.functional.gelu(x))
    torch.testing.assert_close(results[0][0], plain)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('strided', [False, True])
def test_norm_linear_equals_the_layers_with_gradients(strided):
    torch.manual_seed(0)
    norm, layer = (
        torch.nn.LayerNorm(6, eps=1e-3).double(),
        torch.nn.Linear(6, 4).double(),
    )
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    x = x.transpose(0, 1) if strided else x
    wanted = [*norm.parameters(), *layer.parameters()]
    results = []
    for call in (lambda t: layer(norm(t)), lambda t: norm_linear(t, norm, layer)):
        inputs = x.clone().requires_grad_()
        out = call(inputs)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [inputs, *wanted])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_norm_linear_under_autocast():
    torch.manual_seed(0)
    norm, layer = torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)
    results = []
    for call in (lambda t: layer(norm(t)), lambda t: norm_linear(t, norm, layer)):
        inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
        inputs.requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = call(inputs)
        wanted = [inputs, *norm.parameters(), *layer.parameters()]
        results.append([out, *torch.autograd.grad(out.float().sin().sum(), wanted)])
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 0.01 * theirs.norm()


def test_norm_and_gelu_are_not_kept():
    norm, layer = torch.nn.LayerNorm(8), torch.nn.Linear(8, 32)
    x = torch.randn(2, 5, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()), lambda t: t
    ):
        hidden = norm_linear(x, norm, layer)
        gelu_linear(hidden, torch.nn.Linear(32, 8))
    inputs = {
        x.data_ptr(),
        hidden.data_ptr(),
        *(p.data_ptr() for p in norm.parameters()),
    }
    assert len(set(kept) - inputs) == 2  # the weights of the two layers


class Adapter(torch.nn.Module):
    """What stands in a layer's place, and shows its weights."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x):
        return self.layer(x) + 1


def test_adapters_are_called():
    norm, layer, x = torch.nn.LayerNorm(6), torch.nn.Linear(6, 3), torch.randn(4, 6)
    for apply in (lambda x, layer: norm_linear(x, norm, layer), gelu_linear):
        torch.testing.assert_close(apply(x, Adapter(layer)), apply(x, layer) + 1)

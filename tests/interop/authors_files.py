"""Checkpoints as the authors' code writes them, name by name, with random weights."""

import argparse

import numpy as np
import pytest
import torch


class Draw:
    """Random tensors of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=self.generator)

    def linear(self, name: str, width_in: int, width_out: int) -> dict:
        return {
            f'{name}.weight': self(width_out, width_in),
            f'{name}.bias': self(width_out),
        }

    def norm(self, name: str, width: int) -> dict:
        return {f'{name}.weight': 1 + self(width), f'{name}.bias': self(width)}

    def batch_norm(self, name: str, width: int) -> dict:
        return self.norm(name, width) | {
            f'{name}.running_mean': self(width),
            f'{name}.running_var': 1 + self(width).square(),
            f'{name}.num_batches_tracked': torch.tensor(7),
        }


def block(draw: Draw, name: str, width: int) -> dict:
    """A block of a ViT or Swin, without relative positions."""
    return {
        **draw.norm(f'{name}.norm1', width),
        **draw.linear(f'{name}.attn.qkv', width, 3 * width),
        **draw.linear(f'{name}.attn.proj', width, width),
        **draw.norm(f'{name}.norm2', width),
        **draw.linear(f'{name}.mlp.fc1', width, 4 * width),
        **draw.linear(f'{name}.mlp.fc2', 4 * width, width),
    }


def vit(draw: Draw, width: int, depth: int, patch: int, side: int) -> dict:
    """DINO's ViT; a table of ``side x side`` positions."""
    out = dict(cls_token=draw(1, 1, width), pos_embed=draw(1, 1 + side**2, width))
    out['patch_embed.proj.weight'] = draw(width, 3, patch, patch)
    out['patch_embed.proj.bias'] = draw(width)
    for i in range(depth):
        out |= block(draw, f'blocks.{i}', width)
    return out | draw.norm('norm', width)


def selfpatch_vit(draw: Draw, width: int, depth: int, patch: int, side: int) -> dict:
    """Without class token and final norm."""
    out = vit(draw, width, depth, patch, side)
    for name in ('cls_token', 'norm.weight', 'norm.bias'):
        del out[name]
    return out | dict(pos_embed=draw(1, side**2, width))


def densedino_vit(
    draw: Draw, width: int, depth: int, patch: int, side: int, token: bool = True
) -> dict:
    """Position embeddings in two; a learned reference token."""
    out = vit(draw, width, depth, patch, side)
    del out['pos_embed']
    out |= dict(
        cls_pos_embed=draw(1, 1, width), patch_pos_embed=draw(1, side**2, width)
    )
    return out | (dict(ref_learn_token=draw(1, 1, width)) if token else {})


def window_index(window: int) -> torch.Tensor:
    """Row of the bias table, ``(dy + w - 1) (2 w - 1) + dx + w - 1``, by loops."""
    cells = [(y, x) for y in range(window) for x in range(window)]
    span = 2 * window - 1
    return torch.tensor(
        [
            [(y - v + window - 1) * span + x - u + window - 1 for v, u in cells]
            for y, x in cells
        ]
    )


def swin(
    draw: Draw, width: int, depths: list, heads: list, windows: list, side: int
) -> dict:
    """The original Swin, with its buffers; ``side``: of the map of stage 1."""
    out = {
        'patch_embed.proj.weight': draw(width, 3, 4, 4),
        'patch_embed.proj.bias': draw(width),
        **draw.norm('patch_embed.norm', width),
    }
    for s, depth in enumerate(depths):
        own, window = width * 2**s, windows[s]
        for i in range(depth):
            name = f'layers.{s}.blocks.{i}'
            out |= block(draw, name, own)
            table = draw((2 * window - 1) ** 2, heads[s])
            out[f'{name}.attn.relative_position_bias_table'] = table
            out[f'{name}.attn.relative_position_index'] = window_index(window)
            if i % 2 and side // 2**s > window:
                count = (side // 2**s // window) ** 2
                out[f'{name}.attn_mask'] = torch.zeros(count, window**2, window**2)
        if s < len(depths) - 1:
            out[f'layers.{s}.downsample.reduction.weight'] = draw(2 * own, 4 * own)
            out |= draw.norm(f'layers.{s}.downsample.norm', 4 * own)
    return out | draw.norm('norm', width * 2 ** (len(depths) - 1))


def resnet(draw: Draw, blocks: list) -> dict:
    """torchvision's ResNet of bottlenecks, without classifier."""
    out = {'conv1.weight': draw(64, 3, 7, 7), **draw.batch_norm('bn1', 64)}
    width_in = 64
    for s, count in enumerate(blocks, 1):
        width = 32 * 2**s
        for i in range(count):
            name = f'layer{s}.{i}'
            out[f'{name}.conv1.weight'] = draw(width, width_in, 1, 1)
            out[f'{name}.conv2.weight'] = draw(width, width, 3, 3)
            out[f'{name}.conv3.weight'] = draw(4 * width, width, 1, 1)
            for j, channels in enumerate((width, width, 4 * width), 1):
                out |= draw.batch_norm(f'{name}.bn{j}', channels)
            if i == 0:
                out[f'{name}.downsample.0.weight'] = draw(4 * width, width_in, 1, 1)
                out |= draw.batch_norm(f'{name}.downsample.1', 4 * width)
            width_in = 4 * width
    return out


def cvt(draw: Draw, widths: list, depths: list, heads: list, window: int) -> dict:
    """EsViT's CvT with relative positions."""
    out, channels = {}, 3
    for s, width in enumerate(widths):
        kernel = 3 if s else 7
        out[f'stage{s}.0.proj.weight'] = draw(width, channels, kernel, kernel)
        out[f'stage{s}.0.proj.bias'] = draw(width)
        out |= draw.norm(f'stage{s}.0.norm', width)
        for i in range(depths[s]):
            attn, mlp = (f'stage{s}.1.layers.{i}.{j}' for j in range(2))
            out |= draw.norm(f'{attn}.norm', width)
            out[f'{attn}.fn.qkv.dw.weight'] = draw(width, 1, 3, 3)
            out |= draw.batch_norm(f'{attn}.fn.qkv.bn', width)
            out[f'{attn}.fn.qkv.pw.weight'] = draw(3 * width, width, 1, 1)
            out[f'{attn}.fn.qkv.pw.bias'] = draw(3 * width)
            out[f'{attn}.fn.proj_out.weight'] = draw(width, width, 1, 1)
            out[f'{attn}.fn.proj_out.bias'] = draw(width)
            table = draw((2 * window - 1) ** 2, heads[s])
            out[f'{attn}.fn.rel_pos_bias_table'] = table
            out[f'{attn}.fn.rel_pos_idx'] = window_index(window)
            out |= draw.norm(f'{mlp}.norm', width)
            out[f'{mlp}.fn.net.0.weight'] = draw(4 * width, width, 1, 1)
            out[f'{mlp}.fn.net.0.bias'] = draw(4 * width)
            out[f'{mlp}.fn.net.2.weight'] = draw(width, 4 * width, 1, 1)
            out[f'{mlp}.fn.net.2.bias'] = draw(width)
        channels = width
    return out | draw.norm('norm', channels)


def dino_head(draw: Draw, width: int, out_dims: int) -> dict:
    """Hidden width 48, bottleneck 16."""
    return {
        **draw.linear('mlp.0', width, 48),
        **draw.linear('mlp.2', 48, 48),
        **draw.linear('mlp.4', 48, 16),
        'last_layer.weight_g': 1 + draw(out_dims, 1),
        'last_layer.weight_v': draw(out_dims, 16),
    }


def ca_head(draw: Draw, width: int) -> dict:
    """SelfPatch's aggregator of two blocks."""
    out = dict(cls_token=draw(1, 1, width))
    for i in range(2):
        name = f'cls_blocks.{i}'
        out |= draw.norm(f'{name}.norm1', width) | draw.norm(f'{name}.norm2', width)
        for layer in ('q', 'k', 'v', 'proj'):
            out |= draw.linear(f'{name}.attn.{layer}', width, width)
        out |= draw.linear(f'{name}.mlp.fc1', width, 4 * width)
        out |= draw.linear(f'{name}.mlp.fc2', 4 * width, width)
    return out | draw.norm('norm', width)


def named(prefix: str, weights: dict) -> dict:
    return {f'{prefix}.{name}': value for name, value in weights.items()}


def training(student: dict, teacher: dict, dino_loss: dict) -> dict:
    """What DINO's training script saves, and those built on it."""
    return dict(
        student=named('module', student),
        teacher=teacher,
        optimizer=dict(state={0: dict(step=3)}, param_groups=[dict(lr=0.1)]),
        epoch=100,
        args=argparse.Namespace(arch='vit_small', lr=0.0005),
        dino_loss=dino_loss,
        fp16_scaler=dict(scale=65536.0),
    )


def moby_mlp(draw: Draw, width: int, hidden: int, out_dims: int) -> dict:
    return {
        **draw.linear('linear_hidden.1', width, hidden),
        **draw.batch_norm('linear_hidden.2', hidden),
        **draw.linear('linear_out', hidden, out_dims),
    }


def flax_loca(
    draw: Draw, width: int, depth: int, patch: int, side: int, heads: int
) -> dict:
    """Parameters of ``ViT4LOCA``, nested; 24 prototypes."""

    def array(*shape: int) -> np.ndarray:
        return draw(*shape).numpy()

    def norm() -> dict:
        return dict(scale=1 + array(width), bias=array(width))

    def dense(width_in: int, width_out: int) -> dict:
        return dict(kernel=array(width_in, width_out), bias=array(width_out))

    def attention() -> dict:
        c = width // heads
        out = {
            part: dict(kernel=array(width, heads, c), bias=array(heads, c))
            for part in ('query', 'key', 'value')
        }
        return out | dict(out=dict(kernel=array(heads, c, width), bias=array(width)))

    def mlp() -> dict:
        return dict(Dense_0=dense(width, 4 * width), Dense_1=dense(4 * width, width))

    out = dict(
        ToTokenSequence_0=dict(
            embedding=dict(kernel=array(patch, patch, 3, width), bias=array(width)),
            posembed_input=array(1, side, side, width),
        )
    )
    for i in range(depth):
        out[f'encoderblock_{i}'] = dict(
            LayerNorm_0=norm(),
            MultiHeadDotProductAttention_0=attention(),
            LayerNorm_1=norm(),
            MlpBlock_0=mlp(),
        )
    return out | dict(
        encoder_norm=norm(),
        projection_head_for_clustering_prediction=dict(
            Dense_0=dense(width, 48),
            Dense_1=dense(48, 48),
            Dense_2=dense(48, 16),
            prototypes=dict(kernel=array(16, 24)),
        ),
        cross_attention_block=dict(
            LayerNorm_0=norm(),
            LayerNorm_1=norm(),
            MultiHeadDotProductAttention_0=attention(),
            LayerNorm_2=norm(),
            MlpBlock_0=mlp(),
        ),
        final_norm=norm(),
        position_predictor=dense(width, side**2),
    )


def flax_bytes(tree: dict, chunk: int = 2**30) -> bytes:
    """As ``flax.serialization.msgpack_serialize`` packs, arrays in chunks of bytes."""
    msgpack = pytest.importorskip('msgpack')

    def pack(array: np.ndarray):
        data = (array.shape, array.dtype.name, array.tobytes())
        return msgpack.ExtType(1, msgpack.packb(data, use_bin_type=True))

    def walk(node):
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if not isinstance(node, np.ndarray):
            return node
        if node.nbytes <= chunk:
            return pack(node)
        flat, step = node.reshape(-1), chunk // node.itemsize
        pieces = [flat[i : i + step] for i in range(0, flat.size, step)]
        return {
            '__msgpack_chunked_array__': True,
            'shape': {str(i): n for i, n in enumerate(node.shape)},
            'chunks': {str(i): pack(piece) for i, piece in enumerate(pieces)},
        }

    return msgpack.packb(walk(tree), strict_types=True)

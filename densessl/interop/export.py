"""A backbone for another package: every name filled, features compared, then written.

The names are tables (`layouts`); what each package builds, and how it gives its
features, is in `twins`.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import densessl
from densessl.engine.checkpoint import write_atomically
from densessl.errors import DenseSSLError
from densessl.evaluation.loading import load_network

from .backbone import load_strictly
from .fingerprint import fingerprint
from .twins import Twin, distribution, installed, largest_difference, twin

EXPORT_FORMAT = 'densessl-export'
TOLERANCE = 1e-4
OPENMMLAB = ('mmseg', 'mmdet', 'mmpretrain')


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file, or the folder of a Hugging Face model.
        config: how the other package builds the backbone.
        fingerprint: of its state dict, see `fingerprint`.
        difference: largest relative difference of features; None where the package is
            not installed, so that nothing was compared.
        version: of the package, None where there is none.
        usage: lines that say how to use it there.
    """

    path: Path
    config: dict[str, Any]
    fingerprint: str
    difference: float | None
    version: str | None
    usage: tuple[str, ...]


def export(
    checkpoint: str,
    out: str | Path,
    target: str,
    *,
    student: bool = False,
    prefix: str = 'backbone.',
) -> Exported:
    """Write the backbone of a checkpoint for another package.

    Args:
        checkpoint: what `densessl.evaluation.loading.load_network` takes.
        out: file to write, ``.pth`` or, but for OpenMMLab's packages, whose loader
            does not read them, ``.safetensors``; for Hugging Face a folder.
        target: one of `TARGETS`.
        student: the student of a ``step_*.pth`` in place of its teacher.
        prefix: of names for OpenMMLab's packages: ``'backbone.'`` for ``load_from``,
            ``''`` for ``backbone.init_cfg``.

    Raises:
        DenseSSLError: the target has no such architecture, a name of its backbone
            stays unfilled, or features differ by more than `TOLERANCE`; nothing is
            written then.
    """
    path = Path(out)
    _check_path(path, target)
    backbone, about = load_network(checkpoint, student=student)
    there = twin(backbone, target)
    state = there.keymap.there(there.state)
    found = installed(target)
    difference = None
    if found is not None:
        difference = _compare(there, state, backbone, target)
    provenance = dict(
        format=EXPORT_FORMAT,
        version=densessl.__version__,
        target=target,
        source=about['name'],
        role=about['role'],
        source_sha256=about['sha256'],
        steps=backbone.steps,
        config=backbone.config,
        mean=list(backbone.mean),
        std=list(backbone.std),
        target_config=there.config,
        fingerprint=fingerprint(state),
    )
    if target == 'hf':
        _write_hugging_face(path, state, provenance)
    elif path.suffix == '.safetensors':
        data = save(state, metadata=_strings(provenance))
        write_atomically(path, lambda partial: partial.write_bytes(data))
    else:
        if target in OPENMMLAB:
            named = {f'{prefix}{name}': value for name, value in state.items()}
            content = dict(state_dict=named, meta=provenance)
        else:
            content = state
        write_atomically(path, lambda partial: torch.save(content, partial))
        if content is state:
            text = json.dumps(provenance, indent=1)
            sidecar = path.with_suffix('.json')
            write_atomically(sidecar, lambda partial: partial.write_text(text))
    return Exported(
        path=path,
        config=there.config,
        fingerprint=provenance['fingerprint'],
        difference=difference,
        version=found,
        usage=_usage(path, target, there.config, prefix),
    )


def _check_path(path: Path, target: str) -> None:
    if target == 'hf':
        if path.suffix or path.is_file():
            raise DenseSSLError(
                f'--to hf: {path} is a file; a Hugging Face model is a folder, give '
                'the name of one'
            )
    elif target in OPENMMLAB and path.suffix != '.pth':
        raise DenseSSLError(
            f'--to {target}: OpenMMLab does not load {path.name}; give a name that '
            'ends in .pth'
        )
    elif path.suffix not in ('.pth', '.safetensors'):
        raise DenseSSLError(
            f'--to {target}: {path.name} ends in neither .pth nor .safetensors; give '
            'a name that does'
        )


def _compare(
    there: Twin, state: dict[str, Tensor], backbone: nn.Module, target: str
) -> float:
    """Load into the target's own backbone and compare features.

    Raises:
        DenseSSLError: names are missing or left over, or features differ.
    """
    if target in ('mmseg', 'mmdet'):
        from .mmcv_ops import install

        install()  # of this process: their modules do not import without
    if target == 'hf':
        module = _load_hugging_face(there.config, state)
    else:
        module = there.build()
        own = {
            name: value
            for name, value in module.state_dict().items()
            if name.startswith(there.ignore)
        }
        load_strictly(module, own | state, f'--to {target}: the backbone')
    difference = largest_difference(there, module, backbone)
    if not difference <= TOLERANCE:
        raise DenseSSLError(
            f'--to {target}: features of {distribution(target)} {installed(target)} '
            f'differ by {difference:.1e} of the largest, more than {TOLERANCE:.0e}; '
            'nothing was written, please report the config of the backbone'
        )
    return difference


def _strings(provenance: dict[str, Any]) -> dict[str, str]:
    """Metadata of a safetensors file, whose values are strings."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in provenance.items()
    }


def _write_hugging_face(
    folder: Path, state: dict[str, Tensor], provenance: dict[str, Any]
) -> None:
    config = dict(provenance['target_config'])
    size = config['image_size']
    preprocessor = dict(
        image_processor_type='ViTImageProcessor',
        do_resize=True,
        do_rescale=True,
        do_normalize=True,
        size=dict(height=size, width=size),
        resample=3,  # bicubic
        rescale_factor=1 / 255,
        image_mean=[value / 255 for value in provenance['mean']],
        image_std=[value / 255 for value in provenance['std']],
    )
    data = save(state, metadata=dict(_strings(provenance), format='pt'))
    files = {
        'config.json': json.dumps(dict(config, dtype='float32'), indent=1).encode(),
        'preprocessor_config.json': json.dumps(preprocessor, indent=1).encode(),
        'densessl.json': json.dumps(provenance, indent=1).encode(),
        'model.safetensors': data,
    }
    for name, content in files.items():
        write_atomically(
            folder / name, lambda partial, content=content: partial.write_bytes(content)
        )


def _load_hugging_face(config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """A model of transformers, whose names in files are not those in memory."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'config.json').write_text(json.dumps(config))
        Path(folder, 'model.safetensors').write_bytes(
            save(state, metadata=dict(format='pt'))
        )
        kind = getattr(transformers, config['architectures'][0])
        module, found = kind.from_pretrained(
            folder, add_pooling_layer=False, output_loading_info=True
        )
    wrong = {key: list(names) for key, names in found.items() if names}
    if wrong:
        raise DenseSSLError(
            f'--to hf: transformers {transformers.__version__} does not take all '
            f'weights: {str(wrong)[:200]}; nothing was written, please report the '
            'config of the backbone'
        )
    return module


def _usage(path: Path, target: str, config: dict, prefix: str) -> tuple[str, ...]:
    """How the file is used, as lines to copy."""
    words = ', '.join(f'{key}={value!r}' for key, value in config.items())
    if target in OPENMMLAB:
        if prefix:
            how = f"load_from = '{path}'"
        else:
            how = f"init_cfg=dict(type='Pretrained', checkpoint='{path}') in backbone"
        return (f'backbone = dict({words})', how)
    if target == 'hf':
        kind = config['architectures'][0]
        return (
            f"transformers.{kind}.from_pretrained('{path}', add_pooling_layer=False)",
        )
    if target == 'torchvision-resnet':
        load = (
            f"safetensors.torch.load_file('{path}')"
            if path.suffix == '.safetensors'
            else f"torch.load('{path}', weights_only=True)"
        )
        return (
            f'model = {config["model"]}(); model.fc = torch.nn.Identity()',
            f'model.load_state_dict({load})',
        )
    if 'model_name' in config:
        return (f"timm.create_model({words}, checkpoint_path='{path}')",)
    kind = 'SwinTransformer' if 'depths' in config else 'VisionTransformer'
    return (
        f'model = timm.models.{kind}({words})',
        f"timm.models.load_checkpoint(model, '{path}')",
    )

"""Did the fine-tuned model start from the weights that the config names?"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from mmengine.hooks import Hook
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from densessl.engine.distributed import unwrap
from densessl.errors import DenseSSLError
from densessl.interop.fingerprint import fingerprint
from densessl.registry import HOOKS

PREFIX = 'backbone.'
_EXPORT = 'python tools/convert.py export {} OUT.pth --to mmseg (or mmdet)'


@HOOKS.register_module()
class WeightFingerprintHook(Hook):
    """Compares ``model.backbone`` with the exported file before the first step.

    For runs of MMSegmentation and MMDetection. Those load what fits and go on where
    little or nothing did. This hook reads the file that ``load_from`` or
    ``model.backbone.init_cfg`` names, and ends the run in one line unless every tensor
    of the backbone is the file's. Its fingerprint is printed; it is the one that
    ``tools/convert.py export`` printed. A resumed run is left alone, and a file that
    densessl did not export is named as not checked.

    Raises:
        DenseSSLError: the file is missing or a whole run's checkpoint or
            ``backbone.safetensors``; or tensors differ or were not loaded.
    """

    priority = 'VERY_LOW'

    def before_run(self, runner) -> None:
        """Refuse files of a wrong kind before anyone tries to load them."""
        if not runner._resume:
            path = self.source(runner)
            if path is not None:
                read_export(path)

    def before_train(self, runner) -> None:
        """Compare and print."""
        if runner.iter:  # resumed: the weights have moved on
            return
        path = self.source(runner)
        if path is None:
            runner.logger.info(
                'backbone starts from random weights: neither load_from nor '
                "the backbone's init_cfg names a file"
            )
            return
        export = read_export(path)
        if export is None:
            runner.logger.info(
                f'{path} is no export of densessl: whether it reached the backbone is '
                'not checked'
            )
            return
        wanted, about = export
        backbone = unwrap(runner.model).backbone
        complain = differences(wanted, backbone)
        if complain:
            made_for = about.get('target', 'another package')
            raise DenseSSLError(f'{path}, exported for {made_for}: {complain}')
        found = fingerprint(backbone.state_dict())
        if found != about['fingerprint']:
            raise DenseSSLError(
                f'{path}: its tensors are not those that were exported (fingerprint '
                f'{found[:12]}, noted {about["fingerprint"][:12]}); export it again'
            )
        runner.logger.info(
            f'backbone has the {len(wanted)} tensors of {path}, fingerprint {found}'
        )

    @staticmethod
    def source(runner) -> str | None:
        """The file that the backbone's weights come from, None for random ones."""
        if runner._load_from:
            return str(runner._load_from)
        init_cfg = unwrap(runner.model).backbone.init_cfg
        cfgs = init_cfg if isinstance(init_cfg, list | tuple) else [init_cfg or {}]
        return next((str(c['checkpoint']) for c in cfgs if 'checkpoint' in c), None)


def read_export(path: str) -> tuple[dict[str, Tensor], dict] | None:
    """The backbone's tensors without prefix, and what the file says of itself.

    None for a file that densessl did not export, local or not.

    Raises:
        DenseSSLError: no such file, or one of densessl that is to be exported first.
    """
    if '://' in path:
        return None
    if not Path(path).is_file():
        raise DenseSSLError(f'{path}: no such file; give one that was exported')
    try:
        with safe_open(path, 'pt') as file:
            if (file.metadata() or {}).get('format', '').startswith('densessl-'):
                raise DenseSSLError(
                    f'{path}: its names are not those of this package; export the '
                    f'backbone for it: {_EXPORT.format(path)}'
                )
        return None
    except (SafetensorError, OSError):
        pass  # most files are torch's
    try:
        data = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError):
        return None  # of other packages, which read it in their own way
    if not isinstance(data, dict):
        return None
    if str(data.get('kind', '')).startswith('densessl-'):
        raise DenseSSLError(
            f'{path}: the checkpoint of a whole densessl run, where a backbone is '
            f'wanted; export that: {_EXPORT.format(path)}'
        )
    about = data.get('meta')
    if not isinstance(about, dict) or about.get('format') != 'densessl-export':
        return None
    state = {
        key.removeprefix(PREFIX): value for key, value in data['state_dict'].items()
    }
    return state, about


def differences(wanted: dict[str, Tensor], backbone: nn.Module) -> str:
    """What keeps a backbone from having the wanted tensors; '' if nothing does."""
    own = backbone.state_dict()
    absent = [key for key in wanted if key not in own]
    unknown = [key for key in own if key not in wanted]
    shared = [key for key in wanted if key in own]
    misshapen = [key for key in shared if wanted[key].shape != own[key].shape]
    changed = [
        key
        for key in shared
        if key not in misshapen and not torch.equal(own[key].cpu(), wanted[key])
    ]
    if not (absent or unknown or misshapen or changed):
        return ''
    kinds = {
        'of the file are not in the model': absent,
        'of the model are not in the file': unknown,
        'have another shape': misshapen,
        'differ': changed,
    }
    found = '; '.join(
        f'{len(keys)} {kind} ({", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""})'
        for kind, keys in kinds.items()
        if keys
    )
    weights = [key for key in shared if own[key].dim() > 1]  # these start random
    if absent or unknown or misshapen:
        cause = (
            "the backbone's config is not the exported model's: compare its type, "
            'width, depth, patch and img_size, class token and final norm with what '
            'tools/convert.py export printed'
        )
    elif 2 * len({*weights} & {*changed}) > len(weights):
        cause = (
            'nothing was loaded: give the file by load_from, or for init_cfg export '
            "it with --prefix ''"
        )
    else:
        cause = (
            'init_weights or another hook overwrote them after loading: give the file '
            'by load_from, which comes last'
        )
    return (
        f'the backbone does not have its weights: of {len(own)} tensors {found}; '
        f'likely {cause}'
    )

"""What is taken from MMPretrain, imported so that it can be imported."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

from mmpretrain.utils import dependency


def _lacks_what_mmpretrain_imports() -> bool:
    """Whether transformers is too new for MMPretrain's multimodal models.

    They import a name that later releases moved, and then all of ``mmpretrain.models``
    fails. The file is read, not imported, as that takes seconds.
    """
    spec = importlib.util.find_spec('transformers')
    if spec is None or spec.origin is None:
        return False
    source = Path(spec.origin).with_name('modeling_utils.py')
    return not source.exists() or 'apply_chunking_to_forward' not in source.read_text()


if dependency.WITH_MULTIMODAL and _lacks_what_mmpretrain_imports():
    dependency.WITH_MULTIMODAL = False  # MMPretrain's own switch

with warnings.catch_warnings():  # mmcv-lite has no compiled ops, and we need none
    warnings.filterwarnings('ignore', message='Fail to import')
    from mmpretrain.models import SwinTransformer
    from mmpretrain.models.backbones.swin_transformer import SwinBlock
    from mmpretrain.models.utils.attention import ShiftWindowMSA

__all__ = ['ShiftWindowMSA', 'SwinBlock', 'SwinTransformer']

"""A new run from weights: what the file holds is loaded whole, and said."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from densessl.errors import DenseSSLError
from densessl.interop.backbone import branch, load_strictly, read_weights
from densessl.interop.channels import fit_channels


def start_from(model: nn.Module, path: str, *, inflate: bool = False) -> list[str]:
    """Give a model the weights of a file, part by part.

    A part (a backbone, a neck, a projector, a head's centre) is loaded whole or, when
    the file has nothing of it, left as it was built. Of student and teacher, one that
    the file lacks gets the weights of the other.

    Args:
        model: a :class:`densessl.models.SelfDistillation`.
        path: ``backbone.safetensors``, or what ``tools/convert.py import`` wrote.
        inflate: spread the first convolution over another number of channels.

    Returns:
        Lines on what was loaded, what starts anew and what was not used.

    Raises:
        DenseSSLError: another kind of file, or a part that does not fit.
    """
    if Path(path).suffix == '.pth':
        raise DenseSSLError(
            f'--init-from: {path} is a checkpoint of a run, not weights; give the '
            'backbone.safetensors beside it, or go on with the run by --resume (files '
            'of other projects: tools/convert.py import)'
        )
    state, about = read_weights(path)
    what = f'--init-from: {path}'
    parts = {'backbone': 'the backbone'}
    if model.neck.state_dict():
        parts['neck'] = 'the neck'
    parts |= {f'projectors.{name}': f'projector {name}' for name in model.heads}
    loaded, anew, used = [], [], set()
    for part, words in parts.items():
        student = branch(state, f'{part}.')
        teacher = branch(state, f'teacher.{part}.')
        used |= {f'{part}.', f'teacher.{part}.'}
        if not (student or teacher):
            anew.append(words)
            continue
        for weights, network in (
            (student or teacher, model),
            (teacher or student, model.teacher),
        ):
            module = network.get_submodule(part)
            if part == 'backbone':
                weights = fit_channels(module, weights, what, inflate=inflate)
            load_strictly(module, weights, f'{what}, {words},')
        both = 'student and teacher' if student and teacher else 'one network'
        loaded.append(f'{words} ({both})')
    for name, head in model.heads.items():
        own = branch(state, f'heads.{name}.')
        used.add(f'heads.{name}.')
        if own:
            load_strictly(head, own, f'{what}, head {name},')
            loaded.append(f'state of head {name}')
        elif head.state_dict():
            anew.append(f'state of head {name}')
    rest = [key for key in state if not key.startswith(tuple(used))]
    lines = [f'from {path} ({about.get("source", "a run")}): {", ".join(loaded)}']
    if anew:
        lines.append(f'starting anew: {", ".join(anew)}')
    if rest:
        names = sorted({'.'.join(key.split('.')[:3]) for key in rest})
        lines.append(f'in the file and not used: {", ".join(names[:8])}')
    return lines

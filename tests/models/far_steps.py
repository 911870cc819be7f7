"""Steps of all methods on the far device against the CPU's, in a process of its own.

Torch must know the device before the first backward pass of a process. Prints a line of
JSON a method: what differed, and where a GPU would have been waited for.
"""

import json

import torch
from conftest import build_model, optim_wrapper
from far_device import FarDevice, near
from one_step import METHODS, assert_same_step, batch, step
from plain import PlainStep
from torch.utils._pytree import tree_map

TOLERANCES = dict(moby=1e-4)  # its logits are float32; of others, the log alone


def main() -> None:
    FarDevice()
    torch.set_default_dtype(torch.float64)
    for name, options in METHODS.items():
        found = dict(method=name, wrong=_wrong(name, options), waits=_waits(options))
        print(json.dumps(found))
    for name in ('dino', 'selfpatch', 'esvit', 'glsd'):
        here, there = (_plain_loss(METHODS[name], device) for device in ('cpu', 'far'))
        wrong = '' if abs(here - there) < 1e-9 else f'{here} on the CPU, {there}'
        print(json.dumps(dict(method=f'plain {name}', wrong=wrong)))
    print(json.dumps(dict(method='mixed', wrong=_mixed())))


def _wrong(name: str, options: dict) -> str:
    """How a step differs from the CPU's."""
    expected = step(**options)
    with FarDevice():
        log, *rest = tree_map(near, step(**options, device='far'))
    log = {key: value.to(expected[0][key].dtype) for key, value in log.items()}
    try:
        assert_same_step((log, *rest), expected, TOLERANCES.get(name, 1e-6))
    except AssertionError as error:
        return str(error)
    return ''


def _waits(options: dict) -> dict[str, int]:
    """Of the second step; the first one fills caches."""
    with FarDevice() as device:
        model = build_model(**options).to('far').train()
        wrapper = optim_wrapper(model)
        for _ in range(2):
            device.waits.clear()
            model.train_step(batch(options), wrapper)
    return dict(device.waits)


def _plain_loss(options: dict, device: str) -> float:
    """Of a second step by the plain formulation, which speed is measured against."""
    with FarDevice():
        model = build_model(**options).to(device)
        plain = PlainStep(model, optim_wrapper(model).optimizer)
        for seed in range(2):
            torch.manual_seed(seed)
            loss = plain.step(batch(options))
        return float(near(loss))


def _mixed() -> str:
    """What adding tensors of both devices ends in."""
    with FarDevice():
        try:
            torch.ones(2, device='far') + torch.ones(2)
        except RuntimeError as error:
            return str(error)
    return ''


if __name__ == '__main__':
    main()

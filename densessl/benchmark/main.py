"""Command line of ``tools/benchmark.py``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from mmengine.config import Config

from densessl.command import run_command
from densessl.engine.launch import CONFIG_KEYS, load_config, read_config
from densessl.engine.launch import parse_args as training_args
from densessl.errors import DenseSSLError

from . import data, growth, step, workers


def main(argv: list[str] | None = None) -> int:
    """Measure what the command line asks for, and print it."""
    args = _parse(argv)
    commands = dict(data=_data, growth=_growth, step=_step)
    return run_command(commands[args.what], args)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='tools/benchmark.py')
    what = parser.add_subparsers(dest='what', required=True)
    for name, words in (
        ('step', 'time and memory of a training step'),
        ('growth', 'how the time of a step grows with batch, views, K and tokens'),
        ('data', 'images/s of one core through the transforms'),
    ):
        command = what.add_parser(name, help=words)
        command.add_argument('config')
        if name != 'growth':
            command.add_argument(
                '--reference',
                action='store_true',
                help='also measure the plain formulation, or PIL with torchvision',
            )
        command.add_argument(
            '--cfg-options',
            nargs='+',
            default=[],
            metavar='KEY=VALUE',
            help='override anything of CONFIG, not of what it is set against',
        )
        if name == 'growth':
            command.add_argument('--steps', type=int, default=3)
        elif name == 'step':
            command.add_argument('--batch-size', type=int, default=8)
            command.add_argument('--steps', type=int, default=5)
            command.add_argument(
                '--against', metavar='CONFIG', help='also measure this config, in turns'
            )
            command.add_argument(
                '--low-memory',
                action='store_true',
                help='compute activations twice; beside a reference: measure this, too',
            )
            command.add_argument(
                '--compile',
                action='store_true',
                help='compiled blocks; beside a reference: measure them, too',
            )
            command.add_argument(
                '--rounds', type=int, default=3, help='turns with a reference'
            )
            command.add_argument('--plain', action='store_true', help=argparse.SUPPRESS)
            command.add_argument('--json', action='store_true', help=argparse.SUPPRESS)
        else:
            command.add_argument('--data', help='folder; default: made-up JPEGs')
            command.add_argument(
                '--size', default='480x360', metavar='WxH', help='of those, in px'
            )
            command.add_argument('--seconds', type=float, default=10)
            command.add_argument(
                '--workers',
                type=int,
                nargs='+',
                metavar='N',
                help='instead: images/s by the clock with so many worker processes',
            )
    return parser.parse_args(argv)


def _options(args: argparse.Namespace) -> list[str]:
    return ['--cfg-options', *args.cfg_options] if args.cfg_options else []


def _check_config(path: str) -> None:
    if not Path(path).is_file():
        raise DenseSSLError(f'config {path}: no such file; see configs/')


def _data(args: argparse.Namespace) -> None:
    size = data.parse_size(args.size)
    options = training_args([args.config, *_options(args)]).cfg_options
    cfg = read_config(args.config, options, CONFIG_KEYS)
    if args.workers:
        _workers(args, cfg, size)
        return
    speed = data.run(cfg, args.data, args.seconds, args.reference, size)
    print(f'input pipeline: {speed.images_per_second:.1f} images/s a core')
    if speed.ratio:
        print(
            f'PIL + torchvision: {speed.reference_images_per_second:.1f} images/s a '
            f'core; ratio {speed.ratio:.2f}'
        )


def _workers(args: argparse.Namespace, cfg: Config, size: tuple[int, int]) -> None:
    rates = workers.run(cfg, args.workers, args.data, args.seconds, size)
    for count, rate in rates.items():
        print(f'{count} workers: {rate:.1f} images/s')
    if len(rates) > 1:
        exponent = growth.fit_exponent(list(rates), list(rates.values()))
        print(f'exponent {exponent:.2f} (images/s over workers; 1 is linear)')


def _step(args: argparse.Namespace) -> None:
    _check_config(args.config)
    if args.against:
        _check_config(args.against)
    if args.reference or args.against:
        _compare(args)
        return
    measure = step.measure_plain_step if args.plain else step.measure_step
    options = ['--low-memory'] * args.low_memory + ['--compile'] * args.compile
    cfg = load_config(training_args([args.config, *options, *_options(args)]))
    times = measure(cfg, args.batch_size, args.steps)
    if args.json:
        print(json.dumps(dataclasses.asdict(times)))
    else:
        _print_step('densessl', times)


def _compare(args: argparse.Namespace) -> None:
    """Ours and the references in turns, each in processes of its own."""
    ours = [args.config, *_options(args)]
    sides = {'densessl': ours}
    if args.low_memory:
        sides['densessl, low memory'] = [*ours, '--low-memory']
    if args.compile:
        sides['densessl, compiled'] = [*ours, '--compile']
    if args.against:
        sides[args.against] = [args.against]
    if args.reference:
        sides['plain formulation'] = [*ours, '--plain']
    options = ['--batch-size', str(args.batch_size), '--steps', str(args.steps)]
    measured = step.in_turns(
        {name: [*words, *options] for name, words in sides.items()}, args.rounds
    )
    first = measured['densessl']
    for name, times in measured.items():
        _print_step(name, times)
        if times is not first:
            ratio = times.milliseconds['step'] / first.milliseconds['step']
            print(
                f'  {ratio:.2f} times the step of densessl, '
                f'{times.gflop / first.gflop:.2f} times its products, '
                f'{times.above_gib / first.above_gib:.2f} times its memory on top'
            )


def _growth(args: argparse.Namespace) -> None:
    cfg = load_config(training_args([args.config, *_options(args)]))
    for found in growth.measure_growth(cfg, steps=args.steps):
        steps = ', '.join(
            f'{size}: {1e3 * seconds:.0f} ms'
            for size, seconds in zip(found.sizes, found.seconds, strict=True)
        )
        print(f'{found.axis:<10}exponent {found.exponent:.2f} ({steps})', flush=True)


def _print_step(title: str, times: step.StepTimes) -> None:
    about = ', '.join(f'{key} {value}' for key, value in times.settings.items())
    print(f'{title} ({about}):')
    print(
        f'  {times.images_per_second:.2f} images/s, {times.gflop:.1f} GFLOP a step, at '
        f'{times.share:.2f} of the rate of a large product '
        f'({times.gflop_per_second:.0f} GFLOP/s)'
    )
    print(
        f'  {times.peak_gib:.2f} GiB peak: {times.fixed_gib:.2f} weights, gradients '
        f'and optimiser state, {times.base_gib:.2f} the process itself, '
        f'{times.above_gib:.2f} on top'
    )
    for phase, milliseconds in times.milliseconds.items():
        print(f'  {phase:<11}{milliseconds:9.1f} ms')


if __name__ == '__main__':
    sys.exit(main())

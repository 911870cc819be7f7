"""Command line of ``tools/benchmark.py``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from densessl.engine.launch import load_config
from densessl.engine.launch import parse_args as training_args
from densessl.errors import DenseSSLError

from . import data, step


def main(argv: list[str] | None = None) -> int:
    """Measure what the command line asks for, and print it."""
    args = _parse(argv)
    try:
        if not Path(args.config).is_file():
            raise DenseSSLError(f'config {args.config}: no such file; see configs/')
        if args.what == 'data':
            _data(args)
        else:
            _step(args)
    except DenseSSLError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='tools/benchmark.py')
    what = parser.add_subparsers(dest='what', required=True)
    for name, words in (
        ('step', 'time and memory of a training step'),
        ('data', 'images/s of one core through the transforms'),
    ):
        command = what.add_parser(name, help=words)
        command.add_argument('config')
        command.add_argument(
            '--reference',
            action='store_true',
            help='also measure the plain formulation, or PIL with torchvision',
        )
        if name == 'step':
            command.add_argument('--batch-size', type=int, default=8)
            command.add_argument('--steps', type=int, default=5)
            command.add_argument(
                '--against', metavar='CONFIG', help='also measure this config, in turns'
            )
            command.add_argument(
                '--cfg-options',
                nargs='+',
                default=[],
                metavar='KEY=VALUE',
                help='override anything of CONFIG, not of the one it is set against',
            )
            command.add_argument(
                '--rounds', type=int, default=3, help='turns with a reference'
            )
            command.add_argument('--plain', action='store_true', help=argparse.SUPPRESS)
            command.add_argument('--json', action='store_true', help=argparse.SUPPRESS)
        else:
            command.add_argument(
                '--data', help='folder; default: made-up 480x360 JPEGs'
            )
            command.add_argument('--seconds', type=float, default=10)
    return parser.parse_args(argv)


def _data(args: argparse.Namespace) -> None:
    speed = data.run(args.config, args.data, args.seconds, args.reference)
    print(f'input pipeline: {speed.images_per_second:.1f} images/s a core')
    if speed.ratio:
        print(
            f'PIL + torchvision: {speed.reference_images_per_second:.1f} images/s a '
            f'core; ratio {speed.ratio:.2f}'
        )


def _step(args: argparse.Namespace) -> None:
    if args.reference or args.against:
        if args.against and not Path(args.against).is_file():
            raise DenseSSLError(f'config {args.against}: no such file; see configs/')
        _compare(args)
        return
    measure = step.measure_plain_step if args.plain else step.measure_step
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    cfg = load_config(training_args([args.config, *options]))
    times = measure(cfg, args.batch_size, args.steps)
    if args.json:
        print(json.dumps(dataclasses.asdict(times)))
    else:
        _print_step('densessl', times)


def _compare(args: argparse.Namespace) -> None:
    """Ours and the references in turns, each in processes of its own."""
    ours = [args.config]
    if args.cfg_options:
        ours += ['--cfg-options', *args.cfg_options]
    sides = {'densessl': ours}
    if args.against:
        sides[args.against] = [args.against]
    if args.reference:
        sides['plain formulation'] = [*ours, '--plain']
    options = ['--batch-size', str(args.batch_size), '--steps', str(args.steps)]
    measured = step.in_turns(
        {name: [*words, *options] for name, words in sides.items()}, args.rounds
    )
    ours = measured['densessl']
    for name, times in measured.items():
        _print_step(name, times)
        if times is not ours:
            ratio = times.milliseconds['step'] / ours.milliseconds['step']
            print(f'  {ratio:.2f} times the step of densessl')


def _print_step(title: str, times: step.StepTimes) -> None:
    about = ', '.join(f'{key} {value}' for key, value in times.settings.items())
    print(f'{title} ({about}):')
    print(f'  {times.images_per_second:.2f} images/s')
    print(
        f'  {times.peak_gib:.2f} GiB peak, of it {times.fixed_gib:.2f} GiB weights, '
        'gradients and optimiser state'
    )
    for phase, milliseconds in times.milliseconds.items():
        print(f'  {phase:<11}{milliseconds:9.1f} ms')


if __name__ == '__main__':
    sys.exit(main())

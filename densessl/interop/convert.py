"""Command line of ``tools/convert.py``: weights out to other packages, and in."""

from __future__ import annotations

import argparse
from pathlib import Path

from densessl.command import run_command
from densessl.engine.checkpoint import write_atomically
from densessl.errors import DenseSSLError
from densessl.evaluation.loading import KINDS, hash_file

from .authors import LAYOUTS, import_checkpoint
from .export import export
from .twins import TARGETS, distribution


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of ``tools/convert.py``."""
    parser = argparse.ArgumentParser(
        prog='tools/convert.py', description='Weights out to other packages, and in.'
    )
    ways = parser.add_subparsers(dest='way', required=True)
    out = ways.add_parser('export', help='a backbone for another package')
    out.add_argument('checkpoint', help=KINDS)
    out.add_argument('out', help='.pth or .safetensors; for hf a folder')
    out.add_argument('--to', required=True, choices=TARGETS)
    out.add_argument(
        '--student', action='store_true', help='of a step_*.pth; default: its teacher'
    )
    out.add_argument(
        '--prefix',
        default='backbone.',
        help="of names for OpenMMLab; 'backbone.' (default) for load_from, '' for "
        'backbone.init_cfg',
    )
    back = ways.add_parser('import', help='a checkpoint of another project')
    back.add_argument('file')
    back.add_argument('out', help='a .safetensors to write')
    back.add_argument(
        '--from', required=True, choices=tuple(LAYOUTS), dest='layout', help='whose'
    )
    back.add_argument(
        '--num-heads',
        type=int,
        help='of a ViT, where not 64 channels each; files do not tell',
    )
    return parser.parse_args(argv)


def run_import(args: argparse.Namespace) -> None:
    """Import, and say what was taken and how to go on."""
    out = Path(args.out)
    if out.suffix != '.safetensors':
        raise DenseSSLError(
            f'import: {out.name} does not end in .safetensors; give a name that does'
        )
    taken = import_checkpoint(args.file, args.layout, num_heads=args.num_heads)
    source = f'{Path(args.file).name}, sha256 {hash_file(Path(args.file))[:16]}'
    write_atomically(out, lambda partial: taken.save(partial, source))
    for note in taken.notes:
        print(note)
    words = ', '.join(f'{key}={value!r}' for key, value in taken.config.items())
    print(f'backbone = dict({words})')
    print(f'wrote {out}; start a training with --init-from {out}')


def run_export(args: argparse.Namespace) -> None:
    """Export, and say what was found and how to use it."""
    done = export(
        args.checkpoint, args.out, args.to, student=args.student, prefix=args.prefix
    )
    package = distribution(args.to)
    if done.difference is None:
        print(
            f'not compared: {package} is not installed here; names follow the table, '
            f'pip install {package} and run again to have features compared'
        )
    else:
        print(
            f'{package} {done.version}: every name filled, none left over; largest '
            f'relative difference of features {done.difference:.1e}'
        )
    print(f'fingerprint {done.fingerprint[:16]}')
    print(f'wrote {done.path}; use it with:')
    for line in done.usage:
        print(f'  {line}')


def main(argv: list[str] | None = None) -> int:
    """Entry point; users' errors end in one line and exit code 2."""
    args = parse_args(argv)
    return run_command(run_export if args.way == 'export' else run_import, args)

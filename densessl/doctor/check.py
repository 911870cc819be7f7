"""One line of the doctor's findings, and the list of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        level: ``'ok'``; ``'warn'`` for what a run survives; ``'fail'`` for the rest.
        name: of the check, or of the package it is about.
        found: what was found.
        remedy: what to do; with ``'ok'``, nothing.
    """

    level: Literal['ok', 'warn', 'fail']
    name: str
    found: str
    remedy: str = ''

    def __post_init__(self) -> None:
        if (self.level == 'ok') == bool(self.remedy):
            raise ValueError(f'{self}: a remedy belongs to a warning or a failure')

    def __str__(self) -> str:
        tail = f': {self.remedy}' if self.remedy else ''
        return ' '.join(f'{self.level:<5} {self.name} {self.found}{tail}'.split('\n'))


def failure(name: str, error: Exception, remedy: str) -> Check:
    """The failure that an error makes.

    Args:
        name: of the check.
        error: of a ``DenseSSLError``, what follows the last ``'; '`` is the remedy.
        remedy: for errors that bring none.
    """
    text = ' '.join(str(error).split()) or type(error).__name__
    if type(error).__module__.startswith('densessl') and '; ' in text:
        text, _, remedy = text.rpartition('; ')
    return Check('fail', name, text, remedy)


@dataclass
class Report:
    """Runs checks and hands on each line as soon as it is there."""

    show: Callable[[str], object] = print
    checks: list[Check] = field(default_factory=list)

    def add(self, check: Check) -> None:
        """Take a finding in, and show it."""
        self.checks.append(check)
        self.show(str(check))

    def run(self, name: str, found: Iterable[Check]) -> bool:
        """Run the checks that a generator makes.

        An error ends them in a line of its own: an examination has no traceback.

        Args:
            name: of the line that an error makes.
            found: the generator.

        Returns:
            Whether nothing failed.
        """
        start = len(self.checks)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                for check in found:
                    self.add(check)
        except Exception as error:
            remedy = 'what the error names must work first'
            if not type(error).__module__.startswith('densessl'):
                error = RuntimeError(f'{type(error).__name__}: {error}')
            self.add(failure(name, error, remedy))
        return all(check.level != 'fail' for check in self.checks[start:])

    @property
    def exit_code(self) -> int:
        """1 with any failure, else 0."""
        return int(any(check.level == 'fail' for check in self.checks))

    def summary(self) -> str:
        """How many lines there are of each kind."""
        levels = [check.level for check in self.checks]
        return (
            f'{levels.count("ok")} ok, {levels.count("warn")} to look at, '
            f'{levels.count("fail")} failed'
        )

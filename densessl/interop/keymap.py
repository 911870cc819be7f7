"""Names of weights in two layouts, as a table that reads both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from densessl.errors import DenseSSLError

_PLACE = re.compile(r'\{(\w+)(\*?)\}')


@dataclass(frozen=True)
class Rule:
    """One line of a key map.

    In a name, ``{i}`` stands for one part between dots, ``{rest*}`` for any number of
    parts; both sides use the same ones.

    Attributes:
        ours: the name in our layout.
        theirs: the name in the other, or several where they split the tensor.
        there: what becomes of the tensor on the way out: one tensor, or as many as
            ``theirs`` has names. None leaves it as it is.
        back: the way in; takes as many tensors as ``theirs`` has names.
    """

    ours: str
    theirs: str | tuple[str, ...]
    there: Callable[[Tensor], Any] | None = None
    back: Callable[..., Tensor] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """``theirs`` as a tuple."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


@dataclass(frozen=True)
class Extra:
    """A tensor of the other layout that ours has no use for.

    Attributes:
        theirs: its name; with ``make`` a name without places.
        why: what it is, in a few words.
        make: its value on the way out, from our state dict; None leaves it out there.
    """

    theirs: str
    why: str
    make: Callable[[dict[str, Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class Own:
    """A tensor of our layout that the other lacks and that follows from another one.

    Attributes:
        ours: its name.
        source: the name of ours, with the same places, that it follows from.
        make: its value on the way in, from that tensor.
    """

    ours: str
    source: str
    make: Callable[[Tensor], Tensor]


class KeyMap:
    """Names of one layout's weights and those of ours, both ways.

    Args:
        layout: what messages call the other layout.
        *lines: the table; of several rules that fit a name the first one counts, and
            an extra before any rule.
    """

    def __init__(self, layout: str, *lines: Rule | Extra | Own) -> None:
        self.layout = layout
        self.rules = [line for line in lines if isinstance(line, Rule)]
        self.extras = [line for line in lines if isinstance(line, Extra)]
        self.own = [line for line in lines if isinstance(line, Own)]
        self._ours = [_pattern(rule.ours) for rule in self.rules]
        self._theirs = [[_pattern(name) for name in rule.names] for rule in self.rules]
        self._left = [_pattern(extra.theirs) for extra in self.extras]
        self._made = [_pattern(own.ours) for own in self.own]

    def there(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict in the other layout.

        Raises:
            DenseSSLError: the table has no line for a name.
        """
        out: dict[str, Tensor] = {}
        for key, tensor in state.items():
            number, places = self._find(key, self._ours)
            if number is None and self._find(key, self._made)[0] is not None:
                continue
            if number is None:
                raise DenseSSLError(
                    f'{self.layout}: this layout has no place for {key}; export to one '
                    'that has, or leave that part out of the model'
                )
            rule = self.rules[number]
            tensors = tensor if rule.there is None else rule.there(tensor)
            if isinstance(rule.theirs, str):
                tensors = (tensors,)
            for name, value in zip(rule.names, tensors, strict=True):
                out[_fill(name, places)] = value.contiguous()
        for extra in self.extras:
            if extra.make is not None:
                out[extra.theirs] = extra.make(state)
        return out

    def back(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the other layout in ours, extras left out.

        Raises:
            DenseSSLError: the table has no line for a name, or a part of a split tensor
                is missing.
        """
        out: dict[str, Tensor] = {}
        parts: dict[str, dict[int, Tensor]] = {}
        unknown = []
        for key, tensor in state.items():
            if self._find(key, self._left)[0] is not None:
                continue
            number, part, places = self._find_theirs(key)
            if number is None:
                unknown.append(key)
            else:
                rule = self.rules[number]
                ours = _fill(rule.ours, places)
                parts.setdefault(ours, {})[part] = tensor
                if len(parts[ours]) == len(rule.names):
                    tensors = [parts[ours][i] for i in range(len(rule.names))]
                    value = tensors[0] if rule.back is None else rule.back(*tensors)
                    out[ours] = value.contiguous()
                    parts[ours].clear()
        if unknown:
            raise DenseSSLError(
                f'{self.layout}: {len(unknown)} of {len(state)} names are unknown to '
                f'this layout ({", ".join(unknown[:3])}'
                f'{", ..." if len(unknown) > 3 else ""}); the file is of another layout'
            )
        for own in self.own:
            source = _pattern(own.source)
            matches = [(key, source.fullmatch(key)) for key in out]
            out.update(
                {
                    _fill(own.ours, match.groupdict()): own.make(out[key])
                    for key, match in matches
                    if match
                }
            )
        torn = [ours for ours, some in parts.items() if some]
        if torn:
            raise DenseSSLError(
                f'{self.layout}: parts of {torn[0]} are missing; the file is incomplete'
            )
        return out

    def left_out(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Names of the other layout that `back` leaves out, by the reason."""
        found: dict[str, list[str]] = {}
        for name in names:
            number, _ = self._find(name, self._left)
            if number is not None:
                found.setdefault(self.extras[number].why, []).append(name)
        return found

    def _find(self, key: str, patterns: list[re.Pattern]) -> tuple[int | None, dict]:
        for number, pattern in enumerate(patterns):
            if match := pattern.fullmatch(key):
                return number, match.groupdict()
        return None, {}

    def _find_theirs(self, key: str) -> tuple[int | None, int, dict]:
        for number, patterns in enumerate(self._theirs):
            part, places = self._find(key, patterns)
            if part is not None:
                return number, part, places
        return None, 0, {}


def _pattern(name: str) -> re.Pattern:
    """``'a.{i}.{rest*}'`` as a regular expression with named groups."""
    out, end = '', 0
    for place in _PLACE.finditer(name):
        out += re.escape(name[end : place.start()])
        out += f'(?P<{place[1]}>{".+" if place[2] else "[^.]+"})'
        end = place.end()
    return re.compile(out + re.escape(name[end:]))


def _fill(name: str, places: dict[str, str]) -> str:
    return _PLACE.sub(lambda place: places[place[1]], name)

"""The site builds without a warning; each warning of a training has its entry."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from densessl.engine.hooks import health


def test_site_builds_without_a_warning(tmp_path):
    for package in ('sphinx', 'myst_parser', 'furo'):
        pytest.importorskip(package)
    command = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going']
    done = subprocess.run(
        [*command, str(ROOT / 'docs'), str(tmp_path / 'site')],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    start = (tmp_path / 'site/start.html').read_text()
    assert 'Dense self-supervised pretraining of vision backbones' in start
    assert 'href="methods/selfpatch.html"' in start  # a link of the README
    assert (
        'densessl.models.heads.SelfPatchHead'
        in (tmp_path / 'site/api.html').read_text()
    )


def warnings() -> list[str]:
    """What the health hooks may say, as patterns with gaps for the values."""
    found = []
    tree = ast.parse((ROOT / 'densessl/engine/hooks/health.py').read_text())
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        if call.func.attr == '_count':
            words = call.args[3]
        elif call.func.attr == 'warning' and isinstance(call.args[0], ast.JoinedStr):
            words = call.args[0]
        else:
            continue
        parts = [
            re.escape(part.value) if isinstance(part, ast.Constant) else r'.+?'
            for part in words.values
        ]
        found.append(''.join(parts))
    return found


def test_each_warning_has_its_entry():
    page = (ROOT / 'docs/troubleshooting.md').read_text()
    headings = re.findall(r'^### "(.+)"$', page, re.MULTILINE)
    patterns = warnings()
    assert len(patterns) == 6, health.__file__
    for pattern in patterns:
        assert any(
            re.match(_start_of(pattern, heading), heading) for heading in headings
        ), pattern
    for heading in headings:
        assert any(
            re.match(_start_of(pattern, heading), heading) for pattern in patterns
        ), heading


def _start_of(pattern: str, heading: str) -> str:
    """The pattern, cut so that it can match a heading that quotes its beginning."""
    for end in range(len(pattern), 0, -1):
        try:
            if re.fullmatch(pattern[:end], heading):
                return pattern[:end]
        except re.error:
            continue
    return '(?!)'

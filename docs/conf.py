"""The documentation site: ``sphinx-build -W docs site``, offline."""

import os
import re
from pathlib import Path

import densessl

ROOT = Path(__file__).parents[1]
PAGES = {  # of the repository, shown as pages of the site
    'start': 'README.md',
    'benchmarks': 'benchmarks/RESULTS.md',
    'contributing': 'CONTRIBUTING.md',
    'changelog': 'CHANGELOG.md',
}
_LINK = re.compile(r'\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)')

project = 'densessl'
copyright = 'densessl authors'
version = release = densessl.__version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
html_theme = 'furo'
html_title = f'densessl {release}'
myst_heading_anchors = 3  # pages link to headings as on GitHub

default_role = 'code'  # docstrings write names in single backticks
autodoc_member_order = 'bysource'
autodoc_default_options = dict(members=True, show_inheritance=True)
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of dataclasses once


def read_page(app, docname: str, content: list[str]) -> None:
    """Take a page of the repository, and turn links to where they lead on the site."""
    home = ROOT / PAGES.get(docname, f'docs/{docname}.md')
    here = (ROOT / 'docs' / docname).parent
    pages = {ROOT / path: ROOT / f'docs/{name}.md' for name, path in PAGES.items()}

    def turn(link: re.Match) -> str:
        path = Path(os.path.normpath(home.parent / link[1]))
        target = os.path.relpath(pages.get(path, path), here)
        return f']({target}{link[2] or ""})'

    text = home.read_text() if docname in PAGES else content[0]
    content[0] = _LINK.sub(turn, text)


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect('source-read', read_page)

"""The page that compares runs: parsed, and held against the runs' own files."""

import base64
import json
import math
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from densessl.visualization.curves import read_scalars
from densessl.visualization.report_page import flatten, main, thinned

VOID = {'meta', 'img'}
CONFIG = """
optim_wrapper = dict(optimizer=dict(lr={lr}, betas=(0.9, 0.999)))
pipeline = [dict(type='Crop', size={size}), dict(type='Flip')]
seed = 3
"""


class Page(HTMLParser):
    """Elements of a page, which must be closed in order, and its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.elements, self.tables, self.words = [], [], {}, ''
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == 'table':
            self.rows = self.tables[attrs['id']] = []
        elif tag == 'tr':
            self.rows.append([])
        elif tag in ('td', 'th'):
            self.rows[-1].append(attrs.get('data-value', ''))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data
        inside = {'td', 'th'} & set(self.open)
        if inside and not self.rows[-1][-1]:
            self.rows[-1][-1] = data


def make_run(folder, entries, config='', report=None, picture=True):
    for number, lines in enumerate(entries):
        data = folder / f'2025010{number}_000000/vis_data'
        data.mkdir(parents=True)
        text = '\n'.join(json.dumps(line) for line in lines)
        (data / 'scalars.json').write_text(text)
        (data / 'config.py').write_text(config)
    if report is not None:
        (folder / 'report.json').write_text(json.dumps(report))
    if picture:
        image = np.full((4, 4, 3), len(folder.name), np.uint8)
        cv2.imwrite(str(folder / 'features.png'), image)
    return folder


def line(step, loss, **others):
    return dict(step=step, loss=loss, **others)


@pytest.fixture
def runs(tmp_path):
    one = make_run(
        tmp_path / 'one',
        [
            [line(i, 5 - 0.1 * i, lr=0.1) for i in range(1, 20)],
            [line(i, 1 / 3 + i, **{'probe/miou': i / 100}) for i in (15, 25, 20)],
        ],
        CONFIG.format(lr=0.5, size=96),
        {'trained': dict(miou=0.25, pixel_accuracy=0.5), 'untrained': dict(miou=0.125)},
    )
    two = make_run(
        tmp_path / '<two> & "2"',
        [[line(1, 7.5), line(2, math.nan), line(3, 2.5), line(4, 2.0)]],
        CONFIG.format(lr=0.25, size=96),
        picture=False,
    )
    return one, two


def page_of(tmp_path, *folders):
    out = tmp_path / 'out/report.html'
    assert main([*map(str, folders), '--out', str(out)]) == 0
    return Page(out.read_text(encoding='utf-8')), out.read_text(encoding='utf-8')


def test_page_stands_alone_and_escapes_names(runs, tmp_path):
    page, text = page_of(tmp_path, *runs)
    assert '://' not in text and 'url(' not in text and '@import' not in text
    tags = {tag for tag, _ in page.elements}
    assert not tags & {'script', 'link', 'iframe', 'two'}
    for _, attrs in page.elements:
        for key in ('src', 'href', 'data', 'srcset'):
            assert attrs.get(key, 'data:image/png').startswith('data:image/png')
        assert not any(key.startswith('on') for key in attrs)
    assert '<two> & "2"' in page.words
    (picture,) = [attrs['src'] for tag, attrs in page.elements if tag == 'img']
    data = base64.b64decode(picture.partition('base64,')[2])
    assert data == (runs[0] / 'features.png').read_bytes()
    assert 'no features.png' in page.words


def test_last_values_are_those_of_the_logs(runs, tmp_path):
    page, _ = page_of(tmp_path, *runs)
    head, *rows = page.tables['values']
    assert head == ['logged value', 'one', '<two> & "2"']
    logs = [sorted(run.glob('*/vis_data/scalars.json')) for run in runs]
    series = [read_scalars(paths) for paths in logs]
    assert [row[0] for row in rows] == ['loss', 'lr', 'probe/miou']
    for name, *cells in rows:
        for cell, logged in zip(cells, series, strict=True):
            if name in logged:
                assert float(cell) == logged[name][1][-1]
            else:
                assert cell == ''
    assert float(rows[0][1]) == 1 / 3 + 25  # the later log holds, its last step last


def test_scores_of_probe_and_report(runs, tmp_path):
    page, _ = page_of(tmp_path, *runs)
    found = {row[0]: row[1:] for row in page.tables['scores'][1:]}
    assert found['probe/miou, greatest'] == ['0.25', '']
    assert found['probe/miou, last'] == ['0.25', '']
    assert found['report.json: miou, trained'] == ['0.25', '']
    assert found['report.json: miou, untrained'] == ['0.125', '']
    assert found['report.json: pixel_accuracy, trained'] == ['0.5', '']


def test_config_table_has_what_differs(runs, tmp_path):
    page, _ = page_of(tmp_path, *runs)
    assert page.tables['config'][1:] == [['optim_wrapper.optimizer.lr', '0.5', '0.25']]
    three = make_run(tmp_path / 'three', [[line(1, 1.0)]], 'seed = 3')
    page, _ = page_of(tmp_path, runs[0], three)
    rows = {row[0]: row[1:] for row in page.tables['config'][1:]}
    assert rows['pipeline.0.size'] == ['96', '(absent)']
    assert 'seed' not in rows
    page, _ = page_of(tmp_path, three)
    assert 'config' not in page.tables and 'configs are equal' in page.words


def test_curves_are_an_affine_map_of_the_logs(runs, tmp_path):
    page, _ = page_of(tmp_path, *runs)
    lines = [attrs for tag, attrs in page.elements if tag == 'polyline']
    drawn = {}
    for attrs in lines[:3]:  # of the loss, the first figure
        points = [tuple(map(float, p.split(','))) for p in attrs['points'].split()]
        drawn.setdefault(attrs['data-run'], []).append(points)
    assert [len(points) for points in drawn['<two> & "2"']] == [2, 2]  # a gap at NaN
    assert len(set(drawn['<two> & "2"'][0])) == 1  # a single point is a dot
    pixels = np.array(drawn['one'][0] + drawn['<two> & "2"'][0][:1])
    pixels = np.concatenate([pixels, drawn['<two> & "2"'][1]])
    one = read_scalars(sorted(runs[0].glob('*/vis_data/scalars.json')))['loss']
    steps = np.array([*one[0], 1, 3, 4], float)
    values = np.array([*one[1], 7.5, 2.5, 2.0])
    for found, axis, sign in ((pixels[:, 0], steps, 1), (pixels[:, 1], values, -1)):
        slope, offset = np.polyfit(axis, found, 1)
        assert np.sign(slope) == sign
        np.testing.assert_allclose(slope * axis + offset, found, atol=0.011)
        assert found.max() - found.min() > 100


def test_long_curves_keep_peaks_gaps_and_ends():
    steps = list(range(100_000))
    values = np.random.default_rng(0).normal(size=100_000).tolist()
    values[33_333], values[77_777], values[50_000] = 50.0, -50.0, math.nan
    at, kept = thinned(steps, values)
    assert len(at) <= 410 and at == sorted(at)
    np.testing.assert_array_equal(kept, [values[i] for i in at])
    assert {0, 33_333, 50_000, 77_777, 99_999} <= set(at)
    assert thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


def test_flatten():
    node = dict(a=dict(b=1, c={}), d=[1, 2], e=[dict(f=3), 'g'])
    assert flatten(node) == {'a.b': 1, 'a.c': {}, 'd': [1, 2], 'e.0.f': 3, 'e.1': 'g'}


def test_runs_of_one_name_go_by_their_paths(tmp_path):
    folders = [make_run(tmp_path / x / 'run', [[line(1, 1.0)]]) for x in 'ab']
    page, _ = page_of(tmp_path, *folders)
    assert page.tables['values'][0][1:] == [str(folder) for folder in folders]


def test_mistakes_end_in_one_line(runs, tmp_path, capsys):
    def error_of(*arguments):
        assert main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith('error: ') and error.count('\n') == 1
        return error

    assert 'no such folder' in error_of(tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    error = error_of(runs[0], tmp_path / 'empty')
    assert 'empty is no work dir (no training log in it)' in error
    assert 'named twice' in error_of(runs[0], runs[0])
    empty = make_run(tmp_path / 'no_loss', [[dict(step=1, lr=1.0)]])
    assert 'no line has a "loss"' in error_of(empty)
    for broken in ('[]', '{'):
        (runs[0] / 'report.json').write_text(broken)
        assert 'cannot be read' in error_of(runs[0])
    (runs[0] / 'report.json').unlink()
    newest = sorted(runs[0].glob('*/vis_data/config.py'))[-1]
    newest.write_text('a = b')
    assert 'config or report.json cannot be read' in error_of(runs[0])
    newest.write_text('')
    file = tmp_path / 'file'
    file.write_text('')
    assert 'cannot write' in error_of(runs[0], '--out', file / 'x.html')

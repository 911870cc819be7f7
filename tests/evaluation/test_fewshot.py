"""Lists of few labelled pictures, as MMSegmentation and the protocols read them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from mmengine import list_from_file

from densessl.evaluation.fewshot import class_lists, main, segmentation_lists
from densessl.evaluation.labelled import read_split


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'')
    return folder


@pytest.fixture
def pictures(tmp_path):
    names = (f'{"abc"[i % 3]}/{i:03d}.v{i}.jpg' for i in range(100))
    return touch(tmp_path / 'pictures', *names)


def test_folds_are_nested_seeded_and_of_the_right_size(pictures, tmp_path):
    written = segmentation_lists(pictures, tmp_path / 'one')
    assert len(written) == 25
    stems = {path.name: list_from_file(path) for path in written}
    sizes = {32: 3, 16: 6, 8: 12, 4: 25, 2: 50}
    for fold in range(5):
        kept = [stems[f'fold{fold}_1of{part}.txt'] for part in sizes]
        assert [len(names) for names in kept] == list(sizes.values())
        for smaller, greater in pairwise(kept):
            assert set(smaller) < set(greater)
    assert len({tuple(stems[f'fold{fold}_1of2.txt']) for fold in range(5)}) == 5
    for names in stems.values():  # MMSegmentation puts folder and ending around
        assert len(set(names)) == len(names)
        assert all((pictures / f'{name}.jpg').is_file() for name in names)
    again = segmentation_lists(pictures, tmp_path / 'two')
    assert [path.read_text() for path in again] == [p.read_text() for p in written]


def test_class_lists_are_balanced_and_read_back(pictures, tmp_path):
    (path,) = class_lists(pictures, tmp_path, fractions=[0.12])
    assert path.name == 'seed0_0.12.txt'
    split = read_split(tmp_path, 'pictures', list_file=path)
    assert split.labels.bincount().tolist() == [4, 4, 4]
    numbers = [int(line.rpartition(' ')[2]) for line in list_from_file(path)]
    assert numbers == split.labels.tolist()
    other, _ = class_lists(pictures, tmp_path, fractions=[0.12, 0.5], seed=1)
    assert other.read_text() != path.read_text()


def test_commands_print_what_they_write(pictures, tmp_path, capsys):
    words = ['segmentation', str(pictures), '--out', str(tmp_path / 'o')]
    assert main([*words, '--parts', '4', '2', '--folds', '2']) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [
        f'{tmp_path}/o/fold{fold}_1of{part}.txt' for fold in (0, 1) for part in (4, 2)
    ]


def test_mistakes_are_one_line(pictures, tmp_path, capsys):
    twins = touch(tmp_path / 'twins', 'a.jpg', 'a.k.jpg', 'a.png')
    flat = touch(tmp_path / 'flat', 'a.jpg', 'b.jpg')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('')
    for words, found in (
        (['segmentation', tmp_path / 'none'], 'none: no such folder'),
        (['segmentation', tmp_path / 'empty'], 'holds no pictures'),
        (['segmentation', flat], '2 pictures, too few for 1/32'),
        (['segmentation', twins, '--parts', '2'], 'two pictures are called a;'),
        (['segmentation', flat, '--parts', '0'], 'give 1 or more'),
        (['classes', flat], 'one folder a class'),
        (['classes', pictures, '--fractions', '2'], 'fraction=2.0'),
        (['classes', pictures, '--out', tmp_path / 'file/x'], 'choose another --out'),
    ):
        words = [str(word) for word in words]
        if '--out' not in words:
            words += ['--out', str(tmp_path / 'out')]
        assert main(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and found in lines[0], lines

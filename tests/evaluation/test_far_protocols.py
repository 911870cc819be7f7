"""Protocols keep their tensors on the features' device, whichever it is."""

import pytest
from far_device import run_apart
from far_protocols import PROTOCOLS


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('far')
    lines = run_apart('evaluation/far_protocols.py', folder)
    return {line['protocol']: line['scores'] for line in lines}


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_scores_do_not_depend_on_the_device(found, protocol):
    scores = found[protocol]
    assert scores['cpu'] and scores['far'] == pytest.approx(scores['cpu'], abs=1e-5)

"""What would fail or wait on a GPU, found without one."""

import pytest
from far_device import run_apart
from one_step import METHODS

MATCHES = 'distillation.py matched: tolist'  # how many rows have a partner
LOSSES = (
    'self_distillation.py _on_cpu: copy'  # whether they are finite, and for the log
)


@pytest.fixture(scope='module')
def steps():
    lines = run_apart('models/far_steps.py')
    return {line.pop('method'): line for line in lines}


@pytest.mark.parametrize('method', METHODS)
def test_a_step_on_another_device_is_that_of_the_cpu(steps, method):
    assert steps[method]['wrong'] == ''


@pytest.mark.parametrize('method', METHODS)
def test_a_step_waits_once_and_where_rows_are_counted(steps, method):
    expected = {LOSSES: 2 if method == 'selfpatch_in_parts' else 1}
    if method in ('esvit', 'glsd', 'loca'):
        expected[MATCHES] = 1
    assert steps[method]['waits'] == expected


@pytest.mark.parametrize('method', ['dino', 'selfpatch', 'esvit', 'glsd'])
def test_so_is_the_plain_formulation(steps, method):
    assert steps[f'plain {method}']['wrong'] == ''


def test_tensors_of_two_devices_are_refused(steps):
    assert steps['mixed']['wrong'] == 'add: tensors of two devices, far and cpu'

"The benchmarks' own arithmetic and bookkeeping; nothing is timed here"
import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / 'benchmarks'
spec = importlib.util.spec_from_file_location('benchmarks_run', HERE / 'run.py')
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


def row(name, number, seconds, **more):
    row = dict(name=name, round=number, peak_mb=100, setup_mb=90, updates=2346, updates_due=2346, versions={'x': '1'})
    row.update(accuracies=[0.96, 0.96], losses=[0.1, 0.1])
    for turn in 'first', 'later': row.update({turn: seconds, f'{turn}_cpu': seconds})
    return {**row, **more}


def test_every_contestant_is_described_and_pinned():
    readme, pinned = (HERE / 'README.md').read_text(), [line.split('==')[0] for line in run.requirements()]
    for name, (what, packages) in run.contestants().items():
        assert what and f'`{name}`' in readme
        assert all(p in [*pinned, 'torch', 'numpy', 'jaxlib'] for p in packages), name


def test_ratios_pair_runs_of_one_round():
    about = {name: (name, []) for name in ('ours', 'other')}
    rows = [row('ours', 0, 1.), row('other', 0, 2.), row('ours', 1, 10.), row('other', 1, 20.), row('other', 2, 2.)]
    lines, failed = run.summarise(rows, about)
    assert [line['name'] for line in lines] == ['other', 'ours'] and not failed
    assert lines[0]['later_ratio'] == 2 and lines[0]['rounds'] == 3 and not lines[0]['problems']


@pytest.mark.parametrize('more, word', [(dict(updates=2343), 'updates'), (dict(accuracies=[0.90] * 2), 'accuracy'),
                                        (dict(accuracies=[float('nan')] * 2), 'accuracy')])
def test_a_wrong_run_is_flagged(more, word):
    about = {name: (name, []) for name in ('ours', 'other', 'gone')}
    rows = [r for k in range(3) for r in (row('ours', k, 1.), row('other', k, 0.5, **more))]
    rows.append(dict(name='gone', error='no such module', round=0))
    lines, failed = run.summarise(rows, about)
    assert word in lines[0]['problems'][0] and not lines[1]['problems']
    assert failed == {'gone': 'no such module'}

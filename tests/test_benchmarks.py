"The benchmarks' own arithmetic and bookkeeping; nothing is timed here"
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
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


def test_targets_name_contestants():
    assert all({a, b} <= set(run.contestants()) for a, b, _ in run.TARGETS)


@pytest.fixture(scope='module')
def small_job(tmp_path_factory):
    "A folder with a job of 200 random examples, for the scripts to run on"
    folder, rng = tmp_path_factory.mktemp('job'), np.random.default_rng(0)
    shapes = dict(x=(200, 784), vx=(60, 784), w1=(50, 784), b1=(50,), w2=(10, 50), b2=(10,))
    for name, shape in shapes.items(): np.save(folder / f'{name}.npy', (rng.random(shape) / 10).astype('float32'))
    for name, n in dict(y=200, vy=60).items(): np.save(folder / f'{name}.npy', rng.integers(0, 10, n))
    (folder / 'job.json').write_text('{"epochs": 2}')
    return folder


def script(folder, *args):
    "The output of a script in `benchmarks/`"
    env = {**os.environ, 'BENCH_JOB': str(folder), 'PYTHONPATH': str(HERE.parent)}
    p = subprocess.run([sys.executable, *args], cwd=HERE, env=env, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    return p.stdout


@pytest.mark.parametrize('name', ['ours', 'fit_torch_nn', 'learner_callbacks', 'loop_plain'])
def test_a_contestant_of_ours_does_the_job(small_job, name):
    row = json.loads(script(small_job, f'contestants/{name}.py').splitlines()[-1])
    assert row['name'] == name and row['updates'] == row['updates_due'] == 8
    assert row['accuracies'] and all(0 <= a <= 1 for a in row['accuracies'])


def test_our_layers_end_at_the_loss_of_the_plain_loop(small_job):
    lines = script(small_job, 'overhead.py', '--pairs', '2', '--skip-loaders', '--no-write').splitlines()
    assert sum(' / plain loop' in line for line in lines) == 6  # three comparisons, by two clocks


def test_a_layer_is_measured_beside_torch(small_job):
    table = script(small_job, 'layers.py', '--rounds', '2', '--no-write', '--only', 'AdaptiveAvgPool2d(2)')
    assert table.count('| AdaptiveAvgPool2d(2) on') == 2  # in two layouts

"The first hour of a newcomer: five programs of at most 25 lines, and the notebook that shows them"
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
recipes = sorted((root / 'tests/recipes').glob('*.py'))
last = lambda name: lambda said: float(re.findall(rf'{name} ([0-9.]+)', said)[-1])
right = {   # a number of the output, and its range
    'tabular_regression': (lambda said: float(re.search(r'(\d+)% of the variance', said)[1]), 95, 100),
    'two_inputs': (last('valid loss'), .03, .09),
    'dict_batches': (last('valid accuracy'), .96, 1),
    'segmentation': (last('valid f1'), .92, .99),
    'fine_tuning': (last('valid accuracy'), .88, .97),
}


@pytest.mark.parametrize('path', recipes, ids=lambda p: p.stem)
def test_recipe(path, tmp_path):
    assert len(path.read_text().splitlines()) <= 25
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
    run = subprocess.run([sys.executable, path], cwd=tmp_path, env=env, text=True, capture_output=True, timeout=120)
    assert run.returncode == 0 and run.stderr == '', run.stderr
    read, low, high = right[path.stem]
    assert low <= read(run.stdout) <= high, run.stdout
    assert list(tmp_path.iterdir()) == [], 'a recipe leaves no files behind'


def test_the_notebook_shows_the_recipes():
    cells = json.loads((root / 'nbs/recipes.ipynb').read_text(encoding='utf-8'))['cells']
    shown = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    assert sorted(shown) == sorted(p.read_text().rstrip('\n') for p in recipes)

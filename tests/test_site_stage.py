"How the pages of the site are staged from notebooks; tests/browser reads them in a browser."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root / 'scripts'))
import site_stage  # noqa: E402


def code(source, *outputs, **metadata):
    return dict(cell_type='code', id='c0de0000', metadata=metadata, source=source, outputs=list(outputs))


def prose(source): return dict(cell_type='markdown', id='90e70000', metadata={}, source=source)


figure = dict(output_type='display_data', metadata={}, data={'image/png': ''})


@pytest.fixture
def stage(tmp_path, monkeypatch):
    "A course of one chapter and its solutions; returns a function that stages it from the given cells"
    (tmp_path / 'nbs/solutions').mkdir(parents=True)
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs/notation.md').write_text('# Notation\n\n| term | meaning | chapter |\n|---|---|---|\n| sum | of all | 03 |\n')
    (tmp_path / 'LICENSE').write_text('')
    (tmp_path / 'picture.png').write_text('')
    monkeypatch.setattr(site_stage, 'root', tmp_path)
    monkeypatch.setattr(site_stage, 'nbs', tmp_path / 'nbs')
    def write(*cells, solution=''):
        files = {'03_sums.ipynb': [prose('# 03 Sums\n\n> Why.'), *cells], 'solutions/03_sums.ipynb': [prose('# Solved\n' + solution)]}
        for name, content in files.items():
            (tmp_path / 'nbs' / name).write_text(json.dumps(dict(cells=content, metadata={}, nbformat=4, nbformat_minor=5)))
        out = tmp_path / 'out'
        shutil.rmtree(out, ignore_errors=True)
        site_stage.Stage(out).write()
        return [json.loads((out / name).read_text())['cells'] for name in files]
    return write


def test_directives_go_and_cells_that_held_nothing_else(stage):
    cells, _ = stage(code('#| default_exp sums'), code('#| export\nimport math'), code('#| hide\nsecret()'), code('x = 1 # | not one'))
    assert [c['source'] for c in cells[1:]] == ['import math', 'x = 1 # | not one']


def test_alt_text_and_collapsed_cells(stage):
    cells, _ = stage(code('#| fig-alt: a line that falls\nplot()', figure), code('check()', tags=['hide-cell']),
                     code('check()', jupyter={'source_hidden': True}))
    assert cells[1]['source'] == 'plot()' and cells[1]['metadata'] == {'mystnb': {'image': {'alt': 'a line that falls'}}}
    assert [c['metadata'] for c in cells[2:]] == [{'tags': ['hide-cell']}] * 2


def test_a_figure_without_alt_text_is_an_error(stage):
    with pytest.raises(SystemExit, match='c0de0000 shows a figure'): stage(code('plot()', figure))


def test_links(stage):
    links = '[a](solutions/03_sums.ipynb) [b](../LICENSE) [c](#The-Sum) [d](https://x.org) ![e](../picture.png) chapters 02 and 03'
    cells, solved = stage(prose(links), solution='[b](../03_sums.ipynb#A-B), chapter 03')
    assert cells[1]['source'] == (
        f'[a](solutions/03_sums.ipynb) [b]({site_stage.github}/blob/main/LICENSE) [c](#the-sum) [d](https://x.org) '
        '![e](/images/picture.png) chapters 02 and [03](03_sums.ipynb)')
    assert '[b](../03_sums.ipynb#a-b), [chapter 03](../03_sums.ipynb)' in solved[0]['source']
    with pytest.raises(SystemExit, match='nowhere.md leads nowhere'): stage(prose('[a](nowhere.md)'))


def test_names_lead_to_the_api_once(stage):
    export = code('#| export\ndef total(x): return sum(x)\ndef _own(x): return x')
    cells, _ = stage(code('#| default_exp sums'), prose('## `total`\n\nOur `total()`, `total` and `sum`; $`total`$.'), export)
    assert cells[1]['source'] == '## `total`\n\nOur {py:obj}`total() <miniai.sums.total>`, `total` and `sum`; $`total`$.'
    assert cells[2]['source'].startswith('(built-sums-total)=') and '_own' not in cells[2]['source']
    assert cells[3]['source'] == export['source'].partition('\n')[2]


def test_help():
    r = subprocess.run(['sh', root / 'scripts/make_site.sh', '--help'], capture_output=True, text=True)
    assert r.returncode == 0 and 'file://' in r.stdout and 'set -eu' not in r.stdout

"The rules of the house: what notebooks, modules, README and CI must agree on."
import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import miniai

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root / 'scripts'))
from chapter_form import Chapter  # noqa: E402
from make_course_map import PARTS, TITLES  # noqa: E402

nbs = sorted(p for p in (root / 'nbs').rglob('*.ipynb') if not any(x.startswith(('.', '_')) for x in p.relative_to(root).parts))
chapters = [p for p in nbs if re.match(r'\d\d_', p.name) and p.parent == root / 'nbs']
modules = sorted(p for p in (root / 'miniai').glob('*.py') if not p.name.startswith('_'))
settings = ConfigParser(delimiters=['='])
settings.read(root / 'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']


def ids(paths): return [str(p.relative_to(root)) for p in paths]


def python(code, *args):
    "What `code` prints in a Python of its own"
    r = subprocess.run([sys.executable, '-c', code, *args], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    return r.stdout


def text(lines): return lines if isinstance(lines, str) else ''.join(lines)


def code_cells(nb):
    "`(source, outputs)` of each code cell"
    return [(text(c['source']), c['outputs']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']


def directives(source): return re.findall(r'^#\s*\|\s*([\w-]+:?.*?)\s*$', source, flags=re.M)


def exported(nb):
    marks = re.compile(r'(export|exports|exporti|exec_export)\b')
    return [s for s, _ in code_cells(nb) if any(map(marks.match, directives(s)))]


def parse(source):
    "The syntax tree without what only IPython reads"
    return ast.parse('\n'.join('pass' if re.match(r'\s*[%!?]', line) else line for line in source.splitlines()))


def module_of(nb):
    names = [d.split()[1] for s, _ in code_cells(nb) for d in directives(s) if d.startswith('default_exp ')]
    return names[0] if names else None


number = {module_of(nb): nb.name[:2] for nb in chapters if module_of(nb)}


def imports(source):
    "`(module, name)` for every import in `source`; name is None for `import module`"
    for n in ast.walk(parse(source)):
        if isinstance(n, ast.Import): yield from ((a.name, None) for a in n.names)
        if isinstance(n, ast.ImportFrom): yield from (('.' * n.level + (n.module or ''), a.name) for a in n.names)


def needs(appendix):
    "The highest number of a chapter whose module this appendix imports: it may be used by any later chapter"
    found = re.findall(r'^from \.(\w+) import', (root / 'miniai' / f'{appendix}.py').read_text(encoding='utf-8'), re.M)
    return max((needs(m) if number[m] >= '70' else number[m] for m in found), default='')


# ---- README, CI and packaging

def sh_blocks(): return re.findall(r'^```sh\n(.*?)^```$', (root / 'README.md').read_text(encoding='utf-8'), flags=re.M | re.S)


def test_readme_is_made_from_the_index():
    command = [sys.executable, root / 'scripts' / 'make_readme.py', '--check']
    r = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert r.returncode == 0, r.stdout


def test_readme_starts_with_the_main_job_and_the_tests():
    job, tests, *_ = sh_blocks()
    assert 'scripts/setup.sh' in job and 'miniai_train' in job
    assert 'scripts/setup.sh' in tests and 'scripts/run_tests.py' in tests
    for block in job, tests: subprocess.run(['sh', '-n', '-c', block], check=True)


def test_readme_names_what_exists():
    readme = (root / 'README.md').read_text(encoding='utf-8')
    links = {m for m in re.findall(r'\]\(([^)\s#]+)', readme) if not re.match(r'[a-z]+:', m)}
    assert [m for m in links if not (root / m).exists()] == []
    assert [p.name for p in chapters if f'nbs/{p.name}' not in links] == [], 'chapters that the README does not link'


def test_every_chapter_is_on_the_map():
    drawn = [number for *_, numbers in PARTS for number in numbers]
    assert sorted(drawn) == sorted({*TITLES, *(p.name[:2] for p in chapters)}), 'change scripts/make_course_map.py and run it'


def test_workflow_runs_only_what_ci_run_runs():
    ci = subprocess.run(['bash', root / '.ci' / 'run', '--list'], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    assert sh_blocks()[1].splitlines() == ci[:len(sh_blocks()[1].splitlines())], '.ci/run starts with the README\'s test block'
    for path in (root / '.github' / 'workflows').glob('*.y*ml'):
        jobs = yaml.safe_load(path.read_text(encoding='utf-8'))['jobs'].values()
        runs = [line for j in jobs for s in j['steps'] if 'run' in s for line in s['run'].strip().splitlines()]
        assert runs and [line for line in runs if line not in ci] == [], path.name


def test_one_version():
    citation = yaml.safe_load((root / 'CITATION.cff').read_text(encoding='utf-8'))
    assert settings['version'] == miniai.__version__ == citation['version']
    assert f'## {settings["version"]}' in (root / 'CHANGELOG.md').read_text(encoding='utf-8')


def test_constraints_are_pins_that_exist_everywhere():
    lines = [line for line in (root / 'constraints.txt').read_text().splitlines() if line and not line.startswith('#')]
    assert [line for line in lines if not re.fullmatch(r'[\w-]+==[\d.]+', line)] == [], 'a plain version each: no +cpu, no range'
    pinned = {line.split('==')[0].lower() for line in lines}
    wanted = settings['requirements'].split() + settings['dev_requirements'].split()
    assert [w for w in wanted if re.split('[<>=]', w)[0].lower() not in pinned] == [], 'required but not pinned'


# ---- notebooks

own_path = r'(?<![\w.:/])(/tmp|/home|/root|/work|/Users|/private|/var/folders|[A-Z]:)[/\\].{0,60}'


@pytest.mark.parametrize('nb', nbs, ids=ids(nbs))
def test_stored_outputs_are_there_and_tidy(nb):
    cells = code_cells(nb)
    outputs = [o for _, out in cells for o in out]
    assert outputs or not cells, 'no stored output: a reader sees no result'
    for o in outputs:
        assert o['output_type'] != 'error', o
        assert o.get('name') != 'stderr', f'text on stderr (a warning, a progress bar): {text(o["text"])[:300]}'
        data = o.get('data', {})
        assert not any('widget' in kind for kind in data), 'a widget, whose id changes with every run'
        said = text(o.get('text', '')) + ''.join(text(v) for k, v in data.items() if k.startswith('text/') or k == 'image/svg+xml')
        assert not (m := re.search(r'\w*Warning\b.{0,60}', said)), m[0]
        assert not (m := re.search(own_path, said)), f'a path of one machine: {m[0]}'
        assert not (m := re.search(r'\b0x[0-9a-fA-F]{8,}\b', said)), f'an address in memory: {m[0]}'


@pytest.mark.parametrize('nb', nbs, ids=ids(nbs))
def test_every_cell_runs(nb):
    for source, _ in code_cells(nb):
        assert not [d for d in directives(source) if re.match(r'eval:\s*false', d, re.I)], source
        assert not re.search(r'^\s*!', source, re.M), f'a failing `!command` goes unnoticed by nbdev_test: {source}'


@pytest.mark.parametrize('nb', nbs, ids=ids(nbs))
def test_imports_point_to_lower_numbers_by_name(nb):
    if nb in chapters: limit = nb.name[:2]
    else: limit = nb.name[:2] + '+' if nb.name[:2].isdigit() else 'zz'   # solutions may import what their chapter made
    export = exported(nb)
    for source, _ in code_cells(nb):
        for module, name in imports(source):
            assert name != '*', f'from {module} import *'
            if not module.startswith('miniai.'): continue
            assert name or source not in export, f'import {module}: exported code imports names'
            made_in = number.get(module.split('.')[1], 'none')
            appendix = '70' <= made_in < 'none' and (source not in export or needs(module.split('.')[1]) < limit)
            assert made_in < limit or appendix, \
                f'{nb.name} imports {module}, which comes later or from no chapter'


# ---- the form of a chapter

formed = chapters
form = pytest.mark.parametrize('nb', formed, ids=ids(formed))


@form
def test_cells_are_small(nb): assert Chapter(nb).long_complaints() == []


@form
def test_lines_fit_a_page(nb): assert Chapter(nb).wide_complaints() == []


@form
def test_tests_do_not_drown_the_story(nb): assert Chapter(nb).share_complaints() == []


@form
def test_every_figure_has_an_alt_text_of_its_own(nb): assert Chapter(nb).figure_complaints() == []


@form
def test_prose_uses_the_terms_of_the_field(nb): assert Chapter(nb).term_complaints() == []


@pytest.mark.parametrize('nb', nbs, ids=ids(nbs))
def test_every_cell_has_an_id_of_its_own(nb): assert Chapter(nb).id_complaints() == []


def notebook(path, *cells):
    "A notebook of `(source, metadata, figures)`, for the tests of the rules above"
    png = dict(output_type='display_data', metadata={}, data={'image/png': ''})
    code = [dict(cell_type='code', id=f'c{i}', metadata=meta, source=source, outputs=[png] * figures)
            for i, (source, meta, figures) in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=code)))
    return Chapter(path)


def test_the_rules_complain(tmp_path):
    hidden = {'jupyter': {'source_hidden': True}}
    lines = '\n'.join(f'x{i} = {i}' for i in range(21))
    c = notebook(tmp_path / 'a.ipynb', ('#| export\n' + lines, {}, 0), (lines, {}, 0), ('#| fig-alt: a red line\n\nplot()', {}, 1),
                 ('#| fig-alt: a red line falls\nplot()', {}, 1), ('# a comment\n#| fig-alt: four words that are late\nplot()', {}, 1),
                 ('assert 1\n' * 6, {}, 0), ('assert 1\n' * 16, hidden, 0), ('x = 1 # ' + 'wide' * 25, {}, 0), ('# nobody refuses', {}, 0))
    assert [(m.kind, m.size, m.collapsed) for m in c.code[5:7]] == [('test', 6, False), ('test', 16, True)]
    assert c.long_complaints() == ['cell #c1 (story) has 21 lines: at most 20']
    assert (c.tests, c.collapsed) == (100 * 6 / 52, 100 * 16 / 52)
    assert len(c.share_complaints()) == 1 and 'collapsed test cells add 30.8%' in c.share_complaints()[0]
    assert [s.split()[1] for s in c.figure_complaints()] == ['#c2', '#c4']
    assert len(c.wide_complaints()) == 1 and c.wide_complaints()[0].startswith('cell #c7: 108 columns')
    assert len(c.term_complaints()) == 2 and len(c.complaints()) == 1 + 1 + 2 + 1 + 2 and c.id_complaints() == []
    c.cells.append(c.cells[0])
    assert c.id_complaints() == ['two cells have the id c0']


@pytest.mark.parametrize('nb', chapters, ids=ids(chapters))
def test_exports_need_runtime_requirements_only(nb):
    allowed = {'pillow': 'PIL'}
    needed = {allowed.get(n := re.split('[<>=]', w)[0].lower(), n) for w in settings['requirements'].split()}
    needed.add('sympy')     # for `miniai.exercises`, where a proof is optional and numbers decide
    needed.add('IPython')   # for ProgressCB, which uses it only where a notebook has imported it already
    for source in exported(nb):
        for module, _ in imports(source):
            top = module.split('.')[0]
            assert not module.startswith('.'), f'a relative import fails in a notebook: {module}'
            assert top in needed | {'miniai'} | sys.stdlib_module_names, f'{top} is no runtime requirement'


# ---- modules

@pytest.mark.parametrize('module,limit', [('module', 220), ('data', 300), ('training', 300), ('losses', 120), ('metrics', 280),
                                          ('progress', 300), ('callbacks', 500), ('checkpoints', 340), ('optim', 480), ('learner', 430),
                                          ('batches', 200), ('cli', 450), ('conv', 240), ('activations', 190), ('initialization', 130),
                                          ('norm', 220), ('resnet', 120)])
def test_modules_are_short(module, limit):
    assert len((root / 'miniai' / f'{module}.py').read_text(encoding='utf-8').splitlines()) <= limit


def test_the_core_uses_public_pytorch():
    private = r'torch\._C|_execution_engine|_post_accumulate_grad_hooks|_backward_hooks|\._version'
    assert re.findall(private, (root / 'miniai' / 'module.py').read_text(encoding='utf-8')) == []


def test_every_module_comes_from_a_chapter():
    assert sorted(number) == [p.stem for p in modules], 'run nbdev_export; a module whose notebook is gone is deleted by hand'


def test_every_exported_name_is_defined_once():
    seen = {}
    for p in modules:
        for n in ast.parse(p.read_text(encoding='utf-8')).body:
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_'): seen.setdefault(n.name, []).append(p.stem)
    assert {name: where for name, where in seen.items() if len(where) > 1} == {}


global_state = """
import locale, logging, os, random, signal, sys, warnings
import matplotlib as mpl, numpy as np, torch
from importlib import import_module
def state():
    return dict(
        torch_seed=torch.initial_seed(), torch_rng=torch.get_rng_state().tolist(),
        numpy_rng=str(np.random.get_state()), random=random.getstate(),
        dtype=torch.get_default_dtype(), device=str(torch.get_default_device()), grad=torch.is_grad_enabled(),
        threads=torch.get_num_threads(), interop=torch.get_num_interop_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        torch_print=str(vars(torch._tensor_str.PRINT_OPTS)), numpy_print=str(np.get_printoptions()), numpy_err=np.geterr(),
        rcParams=dict(mpl.rcParams), warnings=list(warnings.filters), environ=dict(os.environ), logging=logging.getLogger().level,
        excepthook=sys.excepthook, cwd=os.getcwd(), locale=locale.setlocale(locale.LC_ALL), sigint=signal.getsignal(signal.SIGINT),
        recursion=sys.getrecursionlimit(), path=list(sys.path))
before = state()
for m in sys.argv[1:]:
    import_module('miniai.' + m)
    after = state()
    changed = [k for k in before if before[k] != after[k]]
    assert not changed, f'import miniai.{m} changes {changed}'
"""


def test_import_changes_no_global_state(): python(global_state, *[p.stem for p in modules])


light = """
import sys, torch
before = set(sys.modules)
from importlib import import_module
import_module('miniai.' + sys.argv[1])
print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))
"""


@pytest.mark.parametrize('module', [p.stem for p in modules])
def test_import_is_light(module):
    heavy = {'matplotlib', 'tqdm', 'requests', 'PIL', 'safetensors', 'nbdev', 'fastcore', 'execnb', 'IPython', 'sympy', 'pandas', 'scipy'}
    assert heavy & set(python(light, module).split()) == set()

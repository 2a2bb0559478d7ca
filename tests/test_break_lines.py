"""scripts/break_lines.py finds the lines that neither a chapter nor its tests check, in a tiny checkout made for it."""
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip('execnb', reason='the script runs notebooks with execnb, which the dev extra brings')
SCRIPT = Path(__file__).resolve().parents[1]/'scripts'/'break_lines.py'
spec = importlib.util.spec_from_file_location('break_lines', SCRIPT)
B = importlib.util.module_from_spec(spec)
spec.loader.exec_module(B)

HALF = '''def half(x:int=-2): # 1 < 2 is no place, being a comment
    "Half of x + 0"
    if x < 0: raise ValueError(f'{x - 1} is below 0')
    return x/2'''
CHECK = '''from tiny.half import half as compiled
for f in half, compiled:
    assert f(3) == 1.5 and f(0) == 0
    try: f(-1)
    except ValueError: pass
    else: raise AssertionError('nothing raised')
assert half.__defaults__ == (-2,)'''


def tree(root, check, code=HALF, tests='', reasons=''):
    "A checkout with one chapter, one module, one check, and test files and reasons for survivors if given"
    sources = ['#| default_exp half', f'#| export\n{code}', check]
    cells = [dict(cell_type='markdown', id='aaaa', metadata={}, source='# 00 Half')]
    cells += [dict(cell_type='code', id=f'bbb{i}', metadata={}, outputs=[], execution_count=None, source=s) for i, s in enumerate(sources)]
    for f in 'nbs', 'tiny', 'tests', 'scripts': (root/f).mkdir(parents=True)
    (root/'settings.ini').write_text('[DEFAULT]\nlib_path = tiny\nnbs_path = nbs\n')
    (root/'nbs'/'00_half.ipynb').write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    (root/'tiny'/'__init__.py').write_text('')
    (root/'tiny'/'half.py').write_text(f"__all__ = ['half']\n\n# %% ../nbs/00_half.ipynb #bbb1\n{code}\n")
    if tests: (root/'tests'/'test_half.py').write_text(f'import pytest\nfrom tiny.half import half\n{tests}\n')
    (root/'scripts'/'break_lines_survivors.txt').write_text(reasons)
    return root


def run(root, *args, **env):
    command = [sys.executable, SCRIPT, '--root', root, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **env})
    return done.returncode, done.stdout + done.stderr


def changes(code): return {changed for *_, changed in B.breaks(code)}


@pytest.mark.parametrize('code,changed', [
    ('a = b + c', 'a = b - c'), ('a = b + c', 'a = b'), ('a = b*c', 'a = (2*(b*c))'), ('a = -b', 'a = b'), ('f(x @ y)', 'f((2*(x @ y)))'),
    ('a = (b +  # why\n  c)', 'a = (b)'), ('a -= b', 'a += b'), ('a -= b', 'pass'), ('a = é > 0', 'a = é >= 0'),
    ('a = b is not None', 'a = b is None'), ('a = b in c', 'a = b not in c'), ('a = b and not c', 'a = b or not c'),
    ('a = b and not c', 'a = b and c'), ('a = b and not c', 'a = not c'), ('if a:\n  f()\nelse: g()', 'if not (a):\n  f()\nelse: g()'),
    ('if a: raise E(1 + 1)', 'pass'), ('with no_grad(): f()', 'if True: f()'), ('f(x, keepdim=True)', 'f(x, keepdim=False)'),
    ('f(x, dim=-1)', 'f(x, dim=0)'), ('f(x, dim=-1)', 'f(x)'), ('f(x, y)', 'f(y, x)'), ('a = b[0]', 'a = b[1]'),
    ('a = b[:n]', 'a = b[n:]'), ('a = 1e-6', 'a = 0.001'), ('a = 2.', 'a = 4.'), ('a = 0x08', 'a = 0x9'),
    ('def f(): return x', 'def f(): return None'), ('a = x.detach()', 'a = x'), ('a = x.argmax(1)', 'a = x.argmin(1)'),
    ('o.a = b', 'pass'), ('a = [x for x in y if x]', 'a = [x for x in y if not (x)]'), ('a = lambda x, y=0: x', 'a = lambda x, y=1: x')])
def test_a_change_is_listed(code, changed): assert changed in changes(code)


@pytest.mark.parametrize('code', ['"words + 1"', 'import a', 'raise E(1 + 1)', 'def f(a:int=None)->1: "a > 1"', 'a = f(figsize=3)',
                                  'print(1, 2)', 'def __repr__(self): return 1 + 1', 'a = f"{b + 1}"', 'def f():\n  "x"\n  yield'])
def test_messages_are_left_alone(code): assert not changes(code)


def test_every_change_compiles_and_differs():
    code = inspect.getsource(B.known_survivors)
    for *_, changed in B.breaks(code): assert changed != code and compile(changed, 'x', 'exec')
    assert len(changes(code)) > 20


def test_a_checked_line_is_caught_in_notebook_and_module(tmp_path):
    code, said = run(tree(tmp_path/'t', CHECK), '--per-chapter', '0')
    assert code == 0 and 'caught 11 of 11 (100.0 %): 11 by 00_half.ipynb' in said, said
    assert 'tiny/half.py:7  half, factor: caught by 00_half.ipynb: cell 4 #bbb2: AssertionError\n     - return x/2\n     + ' in said


def test_an_unchecked_line_survives_until_a_reason_is_given(tmp_path):
    root, line = tree(tmp_path/'t', 'assert half(3) == 1.5'), HALF.splitlines()[2].strip()
    listed = run(root, '--per-chapter', '0', '--list')[1]
    only = '--per-chapter', '0', '--only', next(s.split()[0] for s in listed.splitlines() if 'guard' in s)
    code, said = run(root, *only)
    assert code == 1 and 'caught 0 of 1' in said and '  + pass\n  = NO REASON GIVEN' in said
    reasons = f'# looked at\ntiny/half.py\n- {line}\n+ pass\n= a known gap\n\ntiny/half.py\n- gone\n+ pass\n= old\n'
    (root/'scripts'/'break_lines_survivors.txt').write_text(reasons)
    code, said = run(root, *only)
    assert code == 1 and 'caught 0 of 1' in said and '  + pass\n  = a known gap' in said and 'no such line any more: gone' in said


def test_a_break_that_only_the_tests_notice_is_caught_in_the_broken_copy(tmp_path):
    tests = '''def test_half():
    assert half(3) == 1.5 and half(0) == 0 and half.__defaults__ == (-2,)
    with pytest.raises(ValueError): half(-1)'''
    root = tree(tmp_path/'t', '0', tests=tests)
    code, said = run(root, '--per-chapter', '0', '--only', '1', '11', PYTHONPATH=str(root))   # where the unbroken original lies, too
    assert code == 0 and 'caught 2 of 2 (100.0 %): 2 by tests/test_half.py' in said, said
    assert 'return x' in said and 'caught by tests/test_half.py: test_half - ' in said


def test_notebook_and_tests_share_the_work(tmp_path):
    root = tree(tmp_path/'t', 'assert half(3) == 1.5', tests='def test_default(): assert half.__defaults__ == (-2,)')
    code, said = run(root, '--per-chapter', '0', '--only', '1', '11')
    assert code == 0 and 'caught 2 of 2' in said and '1 by 00_half.ipynb' in said and '1 by tests/test_half.py' in said, said


def test_the_faster_check_runs_first(tmp_path):
    check = 'assert half(3) == 1.5'
    root = tree(tmp_path/'t', f'import time; time.sleep(2); {check}', 'def half(x): return x/2', f'def test(): {check}')
    code, said = run(root, '--only', '1')
    assert code == 0 and 'caught 1 of 1 (100.0 %): 1 by tests/test_half.py' in said, said


def test_a_check_that_fails_unbroken_is_not_used(tmp_path):
    code, said = run(tree(tmp_path/'t', 'assert half(3) == 2'))
    assert code == 1 and '00_half.ipynb: FAILS UNBROKEN, not used: cell 4 #bbb2: AssertionError' in said and 'nothing ran' in said
    code, said = run(tree(tmp_path/'u', CHECK, tests='def test(): assert half(3) == 2'), '--per-chapter', '2')
    assert code == 1 and 'caught 2 of 2' in said and 'these checks fail unbroken: tests/test_half.py' in said


@pytest.mark.parametrize('cell,words', [('import time; time.sleep(600)', 'timed out after 2 s; '),
                                        ('import os; os._exit(0)', 'ended with status 0; cell 4 #bbb2')])
def test_a_run_that_does_not_end_by_itself_fails(tmp_path, cell, words):
    root = tree(tmp_path/'t', cell)
    with B.copied(root, tmp_path) as copy: failure = B.Check('00', ['nbs/00_half.ipynb'], 2 if 'sleep' in cell else 60).run(copy)
    assert words in failure and not copy.exists() and not B.Children.running


def test_every_module_with_tests_has_them_as_a_check():
    root = SCRIPT.parents[1]
    for module in (root/'miniai').glob('[a-z]*.py'):
        checks = B.checks_of(root, B.Chapter('00_x.ipynb', f'miniai/{module.name}', []), 'nbs', 1.)
        assert len(checks) == 2 or not (root/'tests'/f'test_{module.stem}.py').exists(), module.name
    assert all((root/'tests'/f'test_{t}.py').exists() for tests in B.TESTS.values() for t in tests)


def test_the_choice_is_spread_and_repeats(tmp_path):
    code = '\n'.join(f'def f{i}(x, y):\n    x += {i}\n    return x*y + x/y - g(y, x > {i})' for i in range(12))
    root = tree(tmp_path/'t', '0', code)
    places = B.places_in(root, root/'nbs'/'00_half.ipynb', 'tiny').places
    taken = B.choose(places, 12, 0)
    assert taken == B.choose(places, 12, 0) != B.choose(places, 12, 1)
    assert len({p.function for p in taken}) == 12 and len({p.kind for p in taken}) >= 8
    assert max(B.Counter(p.line for p in B.choose(places, 1000, 0)).values()) == 2
    for p in places:
        assert p.text.splitlines()[:3] == (root/'tiny'/'half.py').read_text().splitlines()[:3]
        assert p.source.removeprefix('#| export\n') == p.text.split('#bbb1\n')[1].rstrip('\n')


@pytest.mark.parametrize('args,words', [(['07'], "begins with '07'"), (['--jobs', '0'], 'must be 1 or more'),
                                        (['--only', '99'], 'have the numbers'),
                                        (['--root', '/nowhere'], 'no settings.ini')])
def test_wrong_arguments(tmp_path, args, words):
    code, said = run(tree(tmp_path/'t', '0'), *args)
    assert code == 2 and words in said, said


def test_notebook_and_module_out_of_step(tmp_path):
    root = tree(tmp_path/'t', '0')
    (root/'tiny'/'half.py').write_text((root/'tiny'/'half.py').read_text().replace('x/2', 'x/3'))
    code, said = run(root, '--list')
    assert code == 1 and 'run nbdev_export' in said and 'Traceback' not in said


@pytest.mark.skipif(os.name != 'posix', reason='needs a POSIX system')
@pytest.mark.parametrize('sig,code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing_behind(tmp_path, sig, code):
    root, tmp = tree(tmp_path/'t', 'import time; time.sleep(600)'), tmp_path/'tmp'
    tmp.mkdir()
    env = {**os.environ, 'TMPDIR': str(tmp)}
    proc = subprocess.Popen([sys.executable, SCRIPT, '--root', root], env=env, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list(tmp.glob('*/*/.home')) and time.monotonic() < until: time.sleep(.05)
    proc.send_signal(sig)
    proc.communicate(timeout=60)
    assert proc.returncode == code and not list(tmp.iterdir())

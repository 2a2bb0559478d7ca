#!/usr/bin/env python3
"""Every notebook runs by itself on the sample: from a clean kernel, in a copy of the project that holds only the modules of
lower-numbered chapters, so neither its own module nor a later one can help it. A solution has its own chapter's module, too. What a
story imports from an appendix (70 and up) is there with all that the appendix imports.

    python scripts/check_alone.py           every chapter and solution
    python scripts/check_alone.py 02 04     these"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root = Path(__file__).resolve().parents[1]
probe = """
import sys
from importlib.util import find_spec
sys.path.insert(0, sys.argv[1])
found = [m for m in sys.argv[2:] if find_spec('miniai.' + m)]
if found: sys.exit(f'the modules {found} can be imported, though the copy does not hold them')
"""


def module_of(nb):
    m = re.search(r'#\s*\|\s*default_exp\s+(\w+)', nb.read_text(encoding='utf-8'))
    return m and m[1]


def modules_for(nb, made_by):
    "The modules that `nb` may import, those of lower numbers, and what they import"
    last = nb.name[:2] if nb.parent == root / 'nbs' else nb.name[:2] + '+'
    text, found = nb.read_text(encoding='utf-8'), set()
    todo = [m for m, number in made_by.items() if number < last or number >= '70' and f'from miniai.{m} import' in text]
    while todo:
        found.add(m := todo.pop())
        todo += set(re.findall(r'from \.(\w+) import', (root / 'miniai' / f'{m}.py').read_text(encoding='utf-8'))) - found
    return sorted(found)


def alone(nb, made_by, folder):
    "Exit status and output of `nb` in a copy with `modules_for(nb)` only"
    copy = Path(folder) / nb.parent.name / nb.stem
    lower = modules_for(nb, made_by)
    withheld = sorted(set(made_by) - set(lower))
    (copy / 'miniai').mkdir(parents=True)
    for name in 'settings.ini', 'pyproject.toml', 'scripts', 'nbs':
        src = root / name
        shutil.copytree(src, copy / name, ignore=shutil.ignore_patterns('.*', '__pycache__')) if src.is_dir() else shutil.copy(src, copy)
    needed = {nb.relative_to(root), Path('nbs', nb.name)} # a solution may read its chapter's notebook
    for p in (copy / 'nbs').rglob('*.ipynb'):
        if p.relative_to(copy) not in needed: p.unlink()
    for name in '__init__', *lower: shutil.copy(root / 'miniai' / f'{name}.py', copy / 'miniai')
    for p in (root / 'miniai').iterdir():
        if p.is_dir() and p.name != '__pycache__': shutil.copytree(p, copy / 'miniai' / p.name)
    env = {**os.environ, 'MINIAI_SAMPLE': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    for args in ([sys.executable, '-c', probe, str(copy), *withheld],
                 [sys.executable, str(copy / 'scripts' / 'run_tests.py'), '--only', nb.relative_to(root / 'nbs').as_posix()]):
        run = subprocess.run(args, env=env, cwd=copy, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if run.returncode: break
    return nb, lower, run.returncode, run.stdout


def main():
    chapters = sorted((root / 'nbs').glob('[0-9][0-9]_*.ipynb'))
    made_by = {module_of(nb): nb.name[:2] for nb in chapters if module_of(nb)}
    solutions = sorted((root / 'nbs' / 'solutions').glob('*.ipynb'))
    chosen = [nb for nb in chapters + solutions if not sys.argv[1:] or nb.name.startswith(tuple(sys.argv[1:]))]
    passed = failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for nb, lower, code, text in pool.map(lambda nb: alone(nb, made_by, folder), chosen):
            passed, failed = passed + (code == 0), failed + (code != 0)
            seconds = re.search(r'([\d.]+ s) ', text)
            state, time = 'failed' if code else 'passed', seconds[1] if seconds else ''
            print(f'{state}  {nb.relative_to(root / "nbs")}  with {", ".join(lower) or "no module"}  {time}', flush=True)
            if code: print('\n'.join('    ' + line for line in text.strip().splitlines()))
    print(f'sample: {passed} passed, {failed} failed')
    return 0 if passed and not failed else 1


if __name__ == '__main__': sys.exit(main())

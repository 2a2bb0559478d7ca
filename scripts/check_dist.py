#!/usr/bin/env python3
"""Build the sdist and the wheel, look into both, and use the wheel in a clean environment that has only what it requires:
import every module, train an epoch on the sample, predict a digit with the weights that this wrote."""
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
use = """
import importlib, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from PIL import Image
import miniai
where = Path(miniai.__file__).parent
assert sys.prefix in str(where), f'miniai was imported from {where}, not from the clean environment {sys.prefix}'
for name in 'nbdev', 'fastcore', 'execnb', 'jupyter_core', 'ipykernel', 'ipython', 'pytest':
    try: sys.exit(f'{name} {version(name)} is installed: it is no runtime requirement')
    except PackageNotFoundError: pass
modules = sorted(p.stem for p in where.glob('*.py') if not p.stem.startswith('_'))
for m in modules: importlib.import_module('miniai.' + m)
print('imported', version('miniai'), *modules)
from miniai.data import mnist
x, y = mnist(sample=True).test
Image.fromarray((x[0] * 256).clamp(0, 255).byte().reshape(28, 28).numpy()).save('digit.png')
print('digit.png shows', int(y[0]))
"""


def run(*args, cwd=root, **env):
    print('$', *[str(a) if len(str(a)) < 100 else '…' for a in args], flush=True)
    env = {**os.environ, 'PYTHONDONTWRITEBYTECODE': '', **env}
    r = subprocess.run([str(a) for a in args], cwd=cwd, env=env, stdin=subprocess.DEVNULL)
    if r.returncode: sys.exit(f'check_dist: {args[0]} ended with exit status {r.returncode}')


def has(names, *wanted):
    for w in wanted:
        if not any(w in n for n in names): sys.exit(f'check_dist: {w} is missing from {sorted(names)}')


def main():
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        with open(tmp / 'log', 'w+') as log:
            if subprocess.run([sys.executable, '-m', 'build', '--outdir', tmp], cwd=root, stdout=log, stderr=subprocess.STDOUT).returncode:
                log.seek(0)
                sys.exit(log.read() + 'check_dist: the build failed')
        sdist, wheel = next(tmp.glob('*.tar.gz')), next(tmp.glob('*.whl'))
        modules = [f'miniai/{p.name}' for p in (root / 'miniai').glob('*.py')]
        with tarfile.open(sdist) as f: has(f.getnames(), 'settings.ini', 'LICENSE', 'README.md', 'miniai/_sample/mnist_5k.npz', *modules)
        with zipfile.ZipFile(wheel) as f:
            names = f.namelist()
            has(names, 'LICENSE', 'entry_points.txt', 'miniai/_sample/mnist_5k.npz', *modules)
            extra = [n for n in names if not n.startswith(('miniai/', 'miniai-'))]
            if extra: sys.exit(f'check_dist: the wheel carries {extra}')
        print(f'{sdist.name} {sdist.stat().st_size / 2**20:.1f} MB, {wheel.name} {wheel.stat().st_size / 2**20:.1f} MB')
        clean, work = tmp / 'venv', tmp / 'work'
        work.mkdir()
        # pip reads PIP_NO_COMPILE=0 as --no-compile: what is imported is compiled then, not all of torch
        run('sh', 'scripts/setup.sh', wheel, VENV=str(clean), PYTHON=sys.executable, PIP_NO_COMPILE='0')
        run(clean / 'bin' / 'python', '-c', use, cwd=work)
        run(clean / 'bin' / 'miniai_train', '--sample', '--epochs', '1', '--out', 'out', cwd=work)
        weights = next((work / 'out').rglob('*.safetensors'), None)
        if not weights: sys.exit(f'check_dist: miniai_train wrote no weights: {sorted(p.name for p in (work / "out").rglob("*"))}')
        run(clean / 'bin' / 'miniai_predict', weights, 'digit.png', cwd=work)
    print('the wheel works with only what it requires')


if __name__ == '__main__': main()

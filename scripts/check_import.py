#!/usr/bin/env python3
"""What `import miniai.training` costs beyond `import torch`. The times are printed, not checked: they depend on the machine.
The modules that it must not import are checked, here and for every module in tests/test_house.py."""
import subprocess
import sys
from statistics import median

code = """
import sys, time
t = time.perf_counter()
import {0}
seconds = time.perf_counter() - t
print(seconds, *[m for m in ('matplotlib', 'nbdev', 'fastcore', 'IPython') if m in sys.modules])
"""


def cost(module):
    run = subprocess.run([sys.executable, '-c', code.format(module)], check=True, stdout=subprocess.PIPE, text=True)
    seconds, *heavy = run.stdout.split()
    return float(seconds), heavy


runs = [(cost('torch')[0], *cost('miniai.training')) for _ in range(3)]
torch, ours = median(r[0] for r in runs), median(r[1] for r in runs)
print(f'import torch {torch:.2f} s; import miniai.training {ours:.2f} s, {ours - torch:+.2f} s (medians of 3)')
if runs[0][2]: sys.exit(f'import miniai.training imports {", ".join(runs[0][2])}')

"""How long each notebook takes, and which of its cells takes longest: `.venv/bin/python benchmarks/notebooks.py`.

Runs every notebook of the series, and every notebook of solutions, one at a time and from the first cell to the last, as a reader
would; cells flagged `slow` are left out, as in the tests. Nothing is written into the notebooks. Writes `results/notebooks.md`: seconds,
the slowest cell, and why it is worth its time. The reasons are in `slowest_cells.json`, by the cell's id; the exit status is 1 if a
slowest cell of 3 seconds or more has none. Needs the environment of the developers, not the contestants'.
"""
import argparse
import datetime
import json
import os
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

from miniai.data import mnist
from run import commit

ROOT = Path(__file__).resolve().parents[1]
WHY = json.loads((Path(__file__).parent / 'slowest_cells.json').read_text())
LONG = 3 # seconds, from which on a cell needs a reason


def timed(path):
    "Seconds of each code cell, the first with the start of the kernel"
    nb = nbformat.read(path, 4)
    client = NotebookClient(nb, timeout=1200, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}})
    spent = []
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if cell.cell_type != 'code' or not cell.source.strip() or cell.source.startswith('#| slow'): continue
            start = time.perf_counter()
            client.execute_cell(cell, i)
            spent.append((time.perf_counter() - start, cell))
    return spent


def first_line(source):
    "The first line of code, for a table"
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith('#|')]
    return lines[0].strip().replace('|', '\\|')[:70] if lines else ''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', metavar='NN', help='notebooks whose names begin so; prints, and leaves results/ as it is')
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS='1', MPLBACKEND='agg', PYDEVD_DISABLE_FILE_VALIDATION='1')
    paths = [p for p in sorted((ROOT / 'nbs').glob('[0-9]*.ipynb')) + sorted((ROOT / 'nbs/solutions').glob('[0-9]*.ipynb'))
             if not args.only or p.name.startswith(tuple(args.only))]
    if not paths: parser.error(f'no notebook begins with {" or ".join(args.only)}')
    before, rows, total, missing, ids = os.getloadavg()[0], [], 0, [], set()
    for path in tqdm(paths):
        spent = timed(path)
        ids |= {cell.id for _, cell in spent}
        seconds, (longest, cell) = sum(t for t, _ in spent), max(spent, key=lambda pair: pair[0])
        why = WHY.get(cell.id, '')
        if longest >= LONG and not why: missing.append(f'{path.name} #{cell.id}')
        total += seconds
        rows.append(f'| {path.relative_to(ROOT / "nbs")} | {seconds:.1f} | {longest:.1f} | {longest/seconds:.0%} | `#{cell.id}` '
                    f'`{first_line(cell.source)}` | {why} |')
    data = 'the full data' if len(mnist().train.x) == 50_000 else 'the sample'
    load = f'load average {before:.1f} before, {os.getloadavg()[0]:.1f} after'
    text = '\n'.join(['# Time of the notebooks', '',
                      f'Each from the first cell to the last in a kernel of its own, one at a time, one thread, on {data}; '
                      f'{total:.0f} s in all. '
                      f'miniai at {commit()}; {datetime.date.today()}; {load}.', '',
                      '| notebook | s | slowest cell, s | share | its id and first line | why it takes that long |',
                      '|---|--:|--:|--:|---|---|', *rows, ''])
    if not args.only: (Path(__file__).parent / 'results/notebooks.md').write_text(text)
    print(text)
    if not args.only and (gone := set(WHY) - ids): print(f'cells that no longer exist, in slowest_cells.json: {", ".join(sorted(gone))}')
    if missing: raise SystemExit(f'no reason in benchmarks/slowest_cells.json: {", ".join(missing)}')


if __name__ == '__main__': main()

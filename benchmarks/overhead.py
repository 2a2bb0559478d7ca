"""What `fit` and `get_dls` cost: `benchmarks/.venv/bin/python benchmarks/overhead.py`, after `run.py` has made the environment.

The same network of `torch.nn`, loader, optimiser and validation pass, through miniai's `fit` and through a plain loop, one epoch each in
turn within one process, in random order. Prints the median ratio with its spread; at most 1.05 is the aim. Then the loaders that `get_dls`
makes for datasets without batches (`num_workers=`) against PyTorch's, an epoch of 10,000 rows each in turn; at most 1.03 is the aim.
Writes `results/overhead.md`.
"""
import job as common  # first: it sets the process to one thread

# isort: split
import argparse
import contextlib
import os
import random
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from miniai.training import SGD, Dataset, fit, get_dls


def loop(model, loss_func, opt, train_dl, valid_dl):
    "An epoch and a validation pass, and nothing more"
    model.train()
    for xb, yb in train_dl:
        loss = loss_func(model(xb), yb)
        loss.backward()
        opt.step()
        opt.zero_grad()
    model.eval()
    loss, right, n = 0., 0, 0
    with torch.no_grad():
        for xb, yb in valid_dl:
            out = model(xb)
            loss += loss_func(out, yb) * len(xb)
            right += (out.argmax(1) == yb).sum()
            n += len(xb)
    return loss.item() / n, right.item() / n


def compare(what, one, other, turns):
    "How many times as long as `other` `one` takes, as rows of a table; each, called with a seed, returns its seconds, clock and processor"
    took, draw = [], random.Random(0)
    for func in one, other: func(0)  # warm up
    for i in range(turns):
        pair = {func: func(i) for func in draw.sample([one, other], 2)}
        took.append([a / b for a, b in zip(pair[one], pair[other])])
    rows = []
    for name, ratios in zip(('clock', 'processor time'), zip(*took)):
        low, _, high = quantiles(ratios, n=4)
        rows.append(f'| {what} | {name} | {median(ratios):.3f} | {low:.3f} to {high:.3f} | {turns} |')
        print(rows[-1], flush=True)
    return rows


def loaders(x, y, bs, turns):
    "The loaders of `get_dls` for datasets of items, with and without workers, against PyTorch's own"
    rows = TensorDataset(x[:10_000], y[:10_000])

    def seconds(make):
        def run(seed):
            torch.manual_seed(seed)
            start, cpu = time.perf_counter(), common.cpu_seconds()
            for _ in make(): pass
            return time.perf_counter() - start, common.cpu_seconds() - cpu
        return run

    lines = []
    for k in 0, 2:
        ours = seconds(lambda k=k: get_dls(rows, rows, bs, num_workers=k)[0])
        theirs = seconds(lambda k=k: DataLoader(rows, bs, shuffle=True, num_workers=k))
        lines += compare(f"`get_dls` with `num_workers={k}` / PyTorch's `DataLoader`", ours, theirs, turns)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', type=int, default=30, help='epochs of each (default: 30)')
    args = parser.parse_args()
    if not (common.FOLDER / 'job.json').exists(): common.prepare()
    job = common.Job()
    x, y, vx, vy = job.tensors()
    dls = get_dls(Dataset(x, y), Dataset(vx, vy), job.bs)
    loss_func = nn.CrossEntropyLoss()

    def one(way, seed):
        model = job.load(job.torch_model())
        torch.manual_seed(seed)
        opt = SGD(model.parameters(), lr=job.lr)
        start, cpu = time.perf_counter(), time.process_time()
        if way == 'fit':
            with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null): scores = fit(1, model, loss_func, opt, *dls)[0][2:4]
        else: scores = loop(model, loss_func, opt, *dls)
        return time.perf_counter() - start, time.process_time() - cpu, scores

    scores = {}

    def timed(way):
        def run(seed):
            clock, cpu, scores[way, seed] = one(way, seed)
            other = scores.get(('loop' if way == 'fit' else 'fit', seed), scores[way, seed])
            assert all(abs(a - b) < 1e-4 for a, b in zip(scores[way, seed], other)), f'not the same work: {scores}'
            return clock, cpu
        return run

    lines = ['# What `fit` and `get_dls` cost', '', f'In turn within one process, one thread; torch {torch.__version__}.', '',
             '| what | by | median of the ratios | half of them lie from | pairs |', '|---|---|--:|--:|--:|']
    lines += compare('`fit` around `torch.nn` / plain loop', timed('fit'), timed('loop'), args.pairs)
    lines += loaders(x, y, job.bs, args.pairs)
    (Path(__file__).parent / 'results/overhead.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__': main()

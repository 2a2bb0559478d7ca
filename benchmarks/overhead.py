"""What `fit` costs over a bare loop: `benchmarks/.venv/bin/python benchmarks/overhead.py`, after `run.py` has made the environment.

The same network of `torch.nn`, loader, optimiser and validation pass, through miniai's `fit` and through a plain loop, one epoch each in
turn within one process, in random order. Prints the median ratio with its spread; at most 1.05 is the aim.
"""
import job as common  # first: it sets the process to one thread

# isort: split
import argparse
import contextlib
import os
import random
import time
from statistics import median, quantiles

import torch
from torch import nn

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

    for way in 'fit', 'loop': one(way, 0)  # warm up
    clock, cpu, draw = [], [], random.Random(0)
    for i in range(args.pairs):
        took = {way: one(way, i) for way in draw.sample(['fit', 'loop'], 2)}
        assert all(abs(a - b) < 1e-4 for a, b in zip(took['fit'][2], took['loop'][2])), f'not the same work: {took}'
        clock.append(took['fit'][0] / took['loop'][0])
        cpu.append(took['fit'][1] / took['loop'][1])
    for name, ratios in ('clock', clock), ('processor time', cpu):
        low, _, high = quantiles(ratios, n=4)
        print(f'fit / plain loop by {name}: median {median(ratios):.3f}, half of {len(ratios)} pairs from {low:.3f} to {high:.3f}')


if __name__ == '__main__': main()

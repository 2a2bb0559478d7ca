"""What our layers, `fit` and `get_dls` cost: `python benchmarks/overhead.py`, in any environment that has torch and miniai.

Each part trains one epoch in two ways, in turn within one process and in random order, on one thread: our layers through `fit`
against a plain autograd loop over the layers of `torch.nn`, at two sizes; `fit` around `torch.nn` against the same plain loop; and the
loaders that `get_dls` makes for datasets of single items (`num_workers=`) against PyTorch's. Both ways start from the same weights, use the
same loader, optimiser and validation pass, and must end at the same loss. Prints the median of the ratios with its spread, by the
clock and by processor time. Writes `results/overhead.md` unless `--no-write` is given.
"""
import job as common  # first: it sets the process to one thread

# isort: split
import argparse
import random
import time
from collections import namedtuple
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, ReLU, Sequential
from miniai.training import SGD, Dataset, fit, get_dls

# ours: our layers and loss, or those of torch.nn; hidden: units; bs: batch size; n: training examples; aim: the ratio, at most
Case = namedtuple('Case', 'what ours hidden bs n aim')
CASES = [Case('our layers through `fit` / plain loop, 784-50-10, batch 64', True, 50, 64, 50_000, 1.7),
         Case('our layers through `fit` / plain loop, 784-1024-10, batch 256', True, 1024, 256, 10_000, 1.15),
         Case('`fit` around `torch.nn` / plain loop, 784-50-10, batch 64', False, 50, 64, 50_000, 1.05)]


def loop(model, loss_func, opt, train_dl, valid_dl):
    "One epoch and a validation pass, and nothing else; returns loss and accuracy of the validation set"
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


def net(ours, hidden):
    "784-`hidden`-10 in our layers or in those of `torch.nn`; the initial weights depend on torch's seed alone"
    if ours: return Sequential(Linear(784, hidden), ReLU(), Linear(hidden, 10))
    return nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def compare(what, one, other, turns, aim):
    "Lines of a table: the ratio of the times of `one` and `other`; each is called with a seed and returns its seconds, clock and processor"
    took, draw = [], random.Random(0)
    for func in one, other: func(0)  # warm up
    for i in range(turns):
        pair = {func: func(i) for func in draw.sample([one, other], 2)}
        took.append([a / b for a, b in zip(pair[one], pair[other])])
    lines = []
    for name, ratios in zip(('clock', 'processor time'), zip(*took)):
        low, _, high = quantiles(ratios, n=4)
        lines.append(f'| {what} | {name} | {median(ratios):.3f} | {low:.3f} to {high:.3f} | {aim} | {turns} |')
        print(lines[-1], flush=True)
    return lines


def training(case, tensors, turns):
    "Compare the case's way through `fit` with the plain loop over `torch.nn`"
    x, y, vx, vy = tensors
    dls = get_dls(Dataset(x[:case.n], y[:case.n]), Dataset(vx[:2000], vy[:2000]), case.bs)
    ends = {}

    def way(train, ours):
        def run(seed):
            torch.manual_seed(seed)
            model, loss_func = net(ours, case.hidden), (CrossEntropyLoss if ours else nn.CrossEntropyLoss)()
            opt = SGD(model.parameters(), lr=0.1)  # at a larger one, rounding alone makes two runs drift apart
            start, cpu = time.perf_counter(), time.process_time()
            loss, accuracy = train(model, loss_func, opt, *dls)
            spent = time.perf_counter() - start, time.process_time() - cpu
            # a seed gives both ways the same weights and the same batches
            assert abs(ends.setdefault(seed, loss) - loss) < 1e-3, f'{case.what}: losses {ends[seed]} and {loss}, not the same work'
            return spent
        return run

    def with_fit(*args): return fit(1, *args, progress=False)[0][2:4]
    return compare(case.what, way(with_fit, case.ours), way(loop, False), turns, case.aim)


def loaders(x, y, bs, turns):
    "Compare the loaders of `get_dls` for datasets of items, without and with workers, with PyTorch's own"
    items = TensorDataset(x[:10_000], y[:10_000])

    def seconds(make):
        def run(seed):
            torch.manual_seed(seed)
            start, cpu = time.perf_counter(), common.cpu_seconds()
            for _ in make(): pass
            return time.perf_counter() - start, common.cpu_seconds() - cpu
        return run

    lines = []
    for k in 0, 2:
        ours = seconds(lambda k=k: get_dls(items, items, bs, num_workers=k)[0])
        theirs = seconds(lambda k=k: DataLoader(items, bs, shuffle=True, num_workers=k))
        lines += compare(f"`get_dls` with `num_workers={k}` / PyTorch's `DataLoader`", ours, theirs, turns, 1.03)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', type=int, default=15, help='epochs of each way (default: %(default)s)')
    parser.add_argument('--skip-loaders', action='store_true', help='measure layers and fit only')
    parser.add_argument('--no-write', action='store_true', help='print only, and leave results/ as it is')
    args = parser.parse_args()
    if args.pairs < 2: parser.error('--pairs must be 2 or more')
    if not (common.FOLDER / 'job.json').exists(): common.prepare()
    job = common.Job()
    tensors = job.tensors()
    lines = ['# What our layers, `fit` and `get_dls` cost', '', f'In turn within one process, one thread; torch {torch.__version__}.', '',
             '| what | by | median of the ratios | half of them lie from | at most (aim) | pairs |', '|---|---|--:|--:|--:|--:|']
    print('\n'.join(lines))
    for case in CASES: lines += training(case, tensors, args.pairs)
    if not args.skip_loaders: lines += loaders(*tensors[:2], job.bs, args.pairs)
    if not args.no_write: (Path(__file__).parent / 'results/overhead.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__': main()

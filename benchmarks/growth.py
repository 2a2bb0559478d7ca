"""How time and memory of training grow: `.venv/bin/python benchmarks/growth.py`; needs torch and miniai only.

Our layers through `fit`, one thread. Time per example from 10,000 to 400,000 examples (repeated); batches of 16 to 1,024 and hidden layers
of 50 to 1,024 against multiply-adds, with the measured peak of a matmul as the limit; memory over 100 epochs; what training holds
beside the data. Times are processor time, the least of several runs: on a quiet machine that is the time on the clock.
Writes `results/growth.png` and `results/growth.json`.
"""
import job as common  # first: it sets the process to one thread

# isort: split
import argparse
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, ReLU, Sequential
from miniai.training import SGD, Dataset, fit, get_dls

RESULTS = Path(__file__).parent / 'results'
EXAMPLES = 10_000, 25_000, 50_000, 100_000, 200_000, 400_000
BATCHES = 16, 32, 64, 128, 256, 512, 1024
HIDDEN = 50, 100, 200, 400, 700, 1024


def memory_mb():
    "Memory of this process now; NaN where there is no /proc"
    try: return int(Path('/proc/self/statm').read_text().split()[1]) * 4096 / 2**20
    except OSError: return float('nan')


def multiply_adds(hidden):
    "Of training on one example: forward, weights' gradients, and the gradient that goes from the second layer to the first"
    return 2 * (784 * hidden + hidden * 10) + hidden * 10


def matmul_peak():
    "The most multiply-adds a second of a square float32 matmul"
    best = 0
    for n in 256, 512, 1024, 2048:
        a, b, out = torch.rand(n, n), torch.rand(n, n), torch.empty(n, n)
        for _ in range(12):
            start = time.process_time_ns()
            for _ in range(k := max(1, 2**28 // n**3)): torch.mm(a, b, out=out)
            best = max(best, k * n**3 / ((time.process_time_ns() - start) / 1e9))
    return best


def train(x, y, valid, hidden=50, bs=64, epochs=1, after_epoch=None):
    "Processor seconds of training on all examples, with a small validation set"
    torch.manual_seed(0)
    model = Sequential(Linear(784, hidden), ReLU(), Linear(hidden, 10))
    dls = get_dls(Dataset(x, y), valid, bs)
    start = time.process_time()
    fit(epochs, model, CrossEntropyLoss(), SGD(model.parameters(), lr=0.1), *dls, progress=False, after_epoch=after_epoch)
    return time.process_time() - start


def least(jobs, repeats, name):
    "Seconds of each job, the least of several rounds, one job after the other"
    best = [float('inf')] * len(jobs)
    for _ in range(repeats):
        for i, job in enumerate(tqdm(jobs, desc=name, leave=False)): best[i] = min(best[i], job())
    return best


def plot(r, path):
    "Four panels: examples, arithmetic, rate by batch size, memory"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(10, 7.5), layout='constrained', dpi=100)
    ns, us = zip(*r['examples'])
    a.semilogx(ns, us, 'o-')
    a.set_xticks(ns, [f'{n // 1000}k' for n in ns])
    a.minorticks_off()
    a.set(xlabel='training examples', ylabel='µs per example', ylim=(0, 1.3 * max(us)), title='Time per example')
    macs = [multiply_adds(h) for h, _, _ in r['arithmetic']]
    for bs, mark in zip(r['batches'], 'os^Dvp*'):
        own = [(multiply_adds(h), us) for h, k, us in r['arithmetic'] if k == bs]
        if own: b.loglog(*zip(*own), mark + '-', label=f'batch {bs}', lw=0.8)
    line = [min(macs), max(macs)]
    b.loglog(line, [m / r['peak'] * 1e6 for m in line], 'k--', label=f'matmul peak, {r["peak"] / 1e9:.0f} G a second')
    b.set(xlabel='multiply-adds per example', ylabel='µs per example', title='Time against arithmetic')
    b.legend(fontsize=7)
    for h, mark in zip(r['hidden'], 'os^Dvp'):
        own = [(k, 100 * multiply_adds(h) / (us * 1e-6) / r['peak']) for hidden, k, us in r['arithmetic'] if hidden == h]
        if own: c.semilogx(*zip(*sorted(own)), mark + '-', label=f'hidden {h}', lw=0.8, base=2)
    c.axhline(100, color='k', ls='--')
    c.set(xlabel='batch size', ylabel='% of the matmul peak', ylim=(0, 105), title='How near the peak')
    c.legend(fontsize=7)
    d.plot(range(1, len(r['memory']) + 1), r['memory'])
    d.set(xlabel='epoch', ylabel='MB held', ylim=(0, 1.3 * max(r['memory'])), title='Memory over epochs')
    fig.savefig(path)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='fewer and smaller points, to see that everything runs; writes to .job/quick')
    args = parser.parse_args()
    results = common.FOLDER / 'quick' if args.quick else RESULTS
    results.mkdir(parents=True, exist_ok=True)
    if not (common.FOLDER / 'job.json').exists(): common.prepare()
    x, y, vx, vy = common.Job().tensors()
    valid = Dataset(vx[:128], vy[:128])
    repeats, sizes = (1, EXAMPLES[:3]) if args.quick else (3, EXAMPLES)
    batches, hiddens = (BATCHES[::3], HIDDEN[::5]) if args.quick else (BATCHES, HIDDEN)
    r = dict(peak=matmul_peak(), batches=batches, hidden=hiddens)

    small = Dataset(x[:2000], y[:2000])
    r['memory'] = []
    train(small.x, small.y, valid, epochs=20 if args.quick else 100, after_epoch=lambda _: r['memory'].append(memory_mb()))
    settled = len(r['memory']) // 10
    print(f'memory: {r["memory"][settled]:.1f} MB after {settled + 1} epochs, {r["memory"][-1]:.1f} MB after {len(r["memory"])}')

    n = 8192 if args.quick else 16384
    pairs = [(h, bs) for h in hiddens for bs in batches if h == 50 or bs in (batches[0], 64, batches[-1])]
    took = least([lambda h=h, bs=bs: train(x[:n], y[:n], valid, h, bs) for h, bs in pairs], repeats, 'batch and hidden size')
    r['arithmetic'] = [(h, bs, 1e6 * t / n) for (h, bs), t in zip(pairs, took)]
    for h, bs, us in r['arithmetic']:
        print(f'hidden {h:5d}, batch {bs:5d}: {us:7.2f} µs per example, '
              f'{100 * multiply_adds(h) / (us * 1e-6) / r["peak"]:5.1f}% of the peak')

    r['examples'] = []
    for size in sizes:
        where = torch.arange(size) % len(x)
        bx, by = x[where], y[where]
        jobs = [lambda bx=bx, by=by: train(bx, by, valid)]
        before = common.peak_mb()
        r['examples'].append((size, 1e6 * least(jobs, repeats, f'{size} examples')[0] / size))
        r.update(extra_mb=common.peak_mb() - before, data_mb=(bx.nbytes + by.nbytes) / 2**20)
        print(f'{size:7d} examples: {r["examples"][-1][1]:.2f} µs per example; beside the data of {r["data_mb"]:.0f} MB '
              f'training held at most {r["extra_mb"]:.0f} MB')
        del bx, by, jobs
    per_example = [us for _, us in r['examples']]
    print(f'largest by smallest time per example: {max(per_example) / min(per_example):.2f}; '
          f'matmul peak {r["peak"] / 1e9:.1f} G multiply-adds a second')
    (results / 'growth.json').write_text(json.dumps(r, indent=1) + '\n')
    plot(r, results / 'growth.png')
    print(f'written: {results / "growth.png"}')


if __name__ == '__main__': main()

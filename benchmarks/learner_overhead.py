"""What the `Learner` costs over a bare loop, and what other trainers cost:
`benchmarks/.venv/bin/python benchmarks/learner_overhead.py`, after `run.py` has made the environment.

The same network, loader, optimiser and validation pass, one epoch each in turn within one process, in a new random order each round, on a
terminal of its own, so that each tool shows the progress that a user sees. Writes `results/learner_overhead.md`: for each trainer the
median ratio to the bare loop with the same layers, with its spread. The aims: at most 1.05 without callbacks, at most 1.10 with
accuracy, progress and a record of every batch.
"""
import job as common  # first: it sets the process to one thread

# isort: split
import argparse
import os
import pty
import random
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

from torch import nn

from overhead import loop

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / 'contestants'))
target = HERE / 'results' / 'learner_overhead.md'


def bare(job, layers):
    "One epoch and a validation pass, and nothing else"
    from miniai.losses import CrossEntropyLoss
    from miniai.module import Linear, ReLU, Sequential
    from miniai.training import SGD, Dataset, get_dls
    x, y, vx, vy = job.tensors()
    dls = get_dls(Dataset(x, y), Dataset(vx, vy), job.bs)

    def go():
        if layers == 'torch': model, loss = job.torch_model(), nn.CrossEntropyLoss()
        else: model, loss = job.load(Sequential(Linear(784, len(job.b1)), ReLU(), Linear(len(job.b1), 10))), CrossEntropyLoss()
        loop(model, loss, SGD(model.parameters(), lr=job.lr), *dls)
        return common.Result(common.arrays(model), None, len(dls[0]))
    return go


def trainers(job):
    "Name to (a function that does the job once, the name of the loop it is compared with); those that are not installed are left out"
    import fastai_learner
    import fit_torch_nn
    import learner
    import learner_callbacks
    import lightning_trainer
    import ours
    by_batch, callbacks = dict(by_batch=True), dict(callbacks=learner_callbacks.callbacks)
    rows = {'fastai Learner': (partial(fastai_learner.setup, **by_batch), 'bare loop, torch'),
            'Lightning Trainer': (partial(lightning_trainer.setup, **by_batch), 'bare loop, torch')}
    for layers, fit in ('torch', fit_torch_nn), ('ours', ours):
        base = f'bare loop, {layers}'
        rows |= {base: (partial(bare, layers=layers), None), f'fit, {layers}': (fit.setup, base),
                 f'Learner, {layers}': (partial(learner.setup, layers=layers), base),
                 f'Learner with callbacks, {layers}': (partial(learner.setup, layers=layers, **callbacks), base)}
    found = {}
    for name, (setup, base) in rows.items():
        try: found[name] = setup(job), base
        except ImportError as e: print(f'{name} is left out: {e}')
    return found


def measure(rounds):
    if not (common.FOLDER / 'job.json').exists(): common.prepare()
    job = common.Job()
    job.epochs, took, draw = 1, {}, random.Random(0)
    ways = trainers(job)
    for name, (go, _) in ways.items():
        go()
        took[name] = []
    for i in range(rounds):
        job.seed, losses = i, {}
        for name in draw.sample(list(ways), len(ways)):
            start, cpu = time.perf_counter(), time.process_time()
            result = ways[name][0]()
            took[name].append((time.perf_counter() - start, time.process_time() - cpu))
            losses[name] = job.evaluate(result.weights)[1]
        for name, (_, base) in ways.items():  # fastai draws its orders in its own way
            if base and 'fastai' not in name: assert abs(losses[name] - losses[base]) < 1e-3, f'not the same work: {losses}'
    return took, {name: base for name, (_, base) in ways.items()}


def table(took, bases, rounds):
    "The measurements as Markdown"
    versions = ', '.join(f'{name} {version(name).split("+")[0]}' for name in ('torch', 'fastai', 'lightning'))
    lines = [f'One epoch of the job and a validation pass, {rounds} rounds; {versions}; load average {os.getloadavg()[0]:.1f} at the end.',
             'Ratios within a round, to the bare loop with the same layers.', '',
             '| trainer | seconds | × bare loop, median | half of the rounds | by processor time |', '|---|--:|--:|--:|--:|']
    for name, base in bases.items():
        seconds = median(clock for clock, _ in took[name])
        if base is None:
            lines.append(f'| {name} | {seconds:.3f} | 1.00 | | |')
            continue
        clock, cpu = ([a[k]/b[k] for a, b in zip(took[name], took[base])] for k in (0, 1))
        low, middle, high = quantiles(clock, n=4)
        lines.append(f'| {name} | {seconds:.3f} | {middle:.2f} | {low:.2f} to {high:.2f} | {median(cpu):.2f} |')
    return '\n'.join(lines) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=15, help='epochs of each (default: %(default)s)')
    parser.add_argument('--on-terminal', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.on_terminal:
        target.write_text(table(*measure(args.rounds), args.rounds))
        return
    shown = open(os.devnull, 'wb')
    def read(fd):
        data = os.read(fd, 65536)
        shown.write(data)
        return b''.join(line for line in data.splitlines(True) if b'Error' in line or b'left out' in line) or b' '
    status = pty.spawn([sys.executable, __file__, '--on-terminal', '--rounds', str(args.rounds)], read)
    if os.waitstatus_to_exitcode(status): sys.exit('the measurement failed; run it with --on-terminal to see why')
    print(target.read_text())


if __name__ == '__main__': main()

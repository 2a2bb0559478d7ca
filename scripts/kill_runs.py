#!/usr/bin/env python3
"""Kill training runs at random moments, resume them, and compare their last weights with those of a run that was never killed.

    python scripts/kill_runs.py                          30 moments for each engine, our modules and torch.nn
    python scripts/kill_runs.py --moments 5 --engine ours
    python scripts/kill_runs.py --seed 3                 other moments

A run trains a small net on 800 digits of the sample: shuffled examples, dropout, an optimiser with state, a learning rate that
changes from step to step, gradients accumulated over two batches, a checkpoint every few batches. It runs in a process of its own,
which gets SIGKILL at a random moment. Then a new process, with other seeds, resumes the run (or starts again with the first seed, if
there is no checkpoint yet). Its weights must be equal to the last bit.

So that many kills hit the middle of a save, the process that will be killed has a slow disk: the tensors of a checkpoint are written
in small portions. It logs each portion and each batch. From the log the parent reads what the process was doing when it was killed.

It prints one line per moment: what the killed process was doing, where the new one resumed, and whether the weights are identical.
Exit status: 0 if all are, and at least a quarter of the kills of each engine fell between the first and the last byte of a save; 1
otherwise; 2 for wrong arguments."""
import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save, save_file  # noqa: E402
from torch import nn  # noqa: E402

from miniai.checkpoints import CheckpointCB, list_checkpoints, read_checkpoint  # noqa: E402
from miniai.data import mnist  # noqa: E402
from miniai.learner import Callback, CancelStep, Learner  # noqa: E402
from miniai.losses import CrossEntropyLoss  # noqa: E402
from miniai.module import Linear, Module, ReLU, Sequential  # noqa: E402
from miniai.training import Dataset, get_dls  # noqa: E402

EPOCHS, BATCHES, PORTION = 3, 16, 4096


class Dropout(Module):
    "In training, a random half of the values, doubled; the rest becomes 0"
    def forward(self, x):
        mask = 2*(torch.rand_like(x) < .5) if self.training else torch.ones_like(x)
        return x*mask, mask

    def bwd(self, grad, out, x, mask): return grad*mask


class Accumulate(Callback):
    "A step every second batch"
    count = 0
    def after_get_loss(self, learn): learn.loss = learn.loss/2 if learn.training else learn.loss
    def before_step(self, learn):
        self.count += 1
        if self.count % 2: raise CancelStep
    def state_dict(self): return {'count': self.count}
    def load_state_dict(self, state_dict): self.count = state_dict['count']


class Schedule(Callback):
    "A learning rate that falls from step to step, by a count of its own"
    steps = 0
    def before_step(self, learn):
        self.steps += 1
        for g in learn.opt.param_groups: g['lr'] = self.lr*.98**self.steps
    def before_fit(self, learn):
        self.lr = learn.lr
        for g in learn.opt.param_groups: g['lr'] = self.lr
    def state_dict(self): return {'steps': self.steps}
    def load_state_dict(self, state_dict): self.steps = state_dict['steps']


class Log(Callback):
    "Logs each batch"
    def __init__(self, note): self.note = note
    def before_batch(self, learn): self.note(learn.where())


def slow_disk(note):
    "From now on safetensors writes files in small portions and logs each; the rename of a checkpoint is logged, too"
    real_replace = os.replace
    def save_file(tensors, path):
        data, before = save(tensors), sum(f.stat().st_size for f in Path(path).parent.iterdir())
        with open(path, 'wb', buffering=0) as f:
            for i in range(0, len(data), PORTION):
                f.write(data[i:i + PORTION])
                note(f'save {before + min(i + PORTION, len(data))} {Path(path).name}')
                time.sleep(.0004)
    def replace(a, b):
        if Path(b).name.startswith('checkpoint-'): note('written')
        real_replace(a, b)
    safetensors.torch.save_file, os.replace = save_file, replace


def train(folder, engine, seed, slow):
    "In a process of its own: start or resume, and save the last weights as `end`"
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    random.seed(seed)
    def note(line): os.write(log, f'{line}\n'.encode()) # one call: a kill leaves no half lines
    if slow: slow_disk(note)
    digits = mnist(sample=True)
    dls = get_dls(Dataset(digits.train.x[:800], digits.train.y[:800]), Dataset(*digits.valid), 50, torch.Generator().manual_seed(seed))
    if engine == 'ours': net, loss = Sequential(Linear(784, 12), ReLU(), Dropout(), Linear(12, 10)), CrossEntropyLoss()
    else: net, loss = nn.Sequential(nn.Linear(784, 12), nn.ReLU(), nn.Dropout(.5), nn.Linear(12, 10)), nn.CrossEntropyLoss()
    cbs = [Schedule(), Accumulate(), Log(note), CheckpointCB(folder/'run', every=5, resume=True)]
    learn = Learner(net, dls, loss, lambda params, lr: torch.optim.Adam(params, lr=lr), .01, cbs)
    log = os.open(folder/'log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    note('start')
    with warnings.catch_warnings():
        warnings.simplefilter('error') # a damaged checkpoint would be skipped with a warning: here there must be none
        learn.fit(EPOCHS, progress=False)
    save_file(net.state_dict(), folder/'end')


def phase(folder):
    "From the last line of the log: what the process was doing, and whether that was between the first and the last byte of a save"
    line = (folder/'log').read_text().splitlines()[-1]
    if not line.startswith('save '): return line if line != 'written' else 'after the last byte, before or after the rename', False
    _, done, name = line.split()
    part = next((folder/'run').glob('.checkpoint-*.part'), None) # what is left of it
    done = sum(f.stat().st_size for f in part.iterdir()) if part else int(done)
    return f'in a save, {done:,} bytes written, in or after {name}', True


def one_moment(context, engine, folder, seconds, seed, end):
    "Kill a run after some seconds; None if it had ended by then, else a row of the table"
    folder.mkdir()
    child = context.Process(target=train, args=(folder, engine, 1, True))
    child.start()
    while not (folder/'log').exists() and child.is_alive(): time.sleep(.001)
    child.join(seconds)
    child.kill()
    child.join()
    if (folder/'end').exists(): return None
    if child.exitcode != -9: sys.exit(f'kill_runs: the process ended with status {child.exitcode} before it was killed')
    doing, in_save = phase(folder)
    kept = list_checkpoints(folder/'run')
    at = read_checkpoint(kept[-1]).manifest if kept else None
    where = f'epoch {at["epochs_done"] + 1}, {at["batches_done"]} batches' if at else 'the start'
    child = context.Process(target=train, args=(folder, engine, seed if kept else 1, False))
    child.start()
    child.join(120)
    if child.is_alive(): child.kill()
    same = child.exitcode == 0 and (folder/'end').read_bytes() == end
    shutil.rmtree(folder)
    return doing, in_save, where, same


def kill_runs(moments, engine, seed, work):
    "Rows of the table for one engine; prints them"
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch._dynamo', 'safetensors.torch', 'miniai.data', 'miniai.checkpoints', 'miniai.module'])
    dice = random.Random(f'{seed} {engine}')
    for name, slow in ('unbroken', True), ('quick', False):
        (work/name).mkdir()
        child = context.Process(target=train, args=(work/name, engine, 1, slow))
        child.start()
        while not (work/name/'log').exists() and child.is_alive(): time.sleep(.001)
        start = time.monotonic()
        child.join()
        if child.exitcode: sys.exit(f'kill_runs: a run that was not killed ended with status {child.exitcode}')
        if slow: seconds = time.monotonic() - start
    end = (work/'unbroken'/'end').read_bytes()
    if end != (work/'quick'/'end').read_bytes(): sys.exit('kill_runs: two runs that were not killed differ')
    print(f'{engine}: a run takes {seconds:.1f} s', flush=True)
    rows, tries = [], 0
    while len(rows) < moments:
        tries += 1
        moment = dice.uniform(0, seconds)
        row = one_moment(context, engine, work/str(tries), moment, dice.randrange(2, 10**6), end)
        if row is None: continue
        doing, in_save, where, same = row
        rows.append(row)
        print(f'{len(rows):3d}  {moment:5.2f} s  {doing:62s}  resumed from {where:24s}  {"identical" if same else "DIFFERENT"}', flush=True)
    return rows


def number(text):
    if not text.isdigit() or int(text) < 1: raise argparse.ArgumentTypeError(f'{text!r} is not an integer of 1 or more')
    return int(text)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--moments', type=number, default=30, metavar='N', help='for each engine (default: %(default)s)')
    p.add_argument('--engine', choices=('ours', 'torch', 'both'), default='both')
    p.add_argument('--seed', type=int, default=0, metavar='N', help='of the moments')
    args = p.parse_args()
    good = True
    for engine in ('ours', 'torch') if args.engine == 'both' else (args.engine,):
        with tempfile.TemporaryDirectory() as work: rows = kill_runs(args.moments, engine, args.seed, Path(work))
        same, in_save = sum(row[3] for row in rows), sum(row[1] for row in rows)
        print(f'{engine}: {len(rows)} kills, {in_save} of them between the first and the last byte of a save; '
              f'{same} of {len(rows)} ended with identical weights\n', flush=True)
        good &= same == len(rows) and in_save*4 >= len(rows)
    return 0 if good else 1


if __name__ == '__main__': sys.exit(main())

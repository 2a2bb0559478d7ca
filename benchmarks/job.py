"""The job that every contestant does, and the little that the contestants share.

784-50-10 with ReLU and cross entropy, SGD at learning rate 0.5, batches of 64, 3 epochs of the 50,000 training examples of MNIST, shuffled
anew each epoch, a validation pass over 10,000 examples after each; float32; one thread; the same initial weights for all.

`python job.py` writes data and weights to `.job/` as NumPy files, so that a contestant needs neither miniai nor torch to read them.
A contestant's script calls `run(setup)`: `setup(job)` imports its tool and returns a function that does the full job once, from the
initial weights, and returns a `Result`. Importing this module sets the process to one thread, so it comes before any tool.
"""
import os

for _name in 'OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'NUMEXPR_NUM_THREADS', 'VECLIB_MAXIMUM_THREADS':
    os.environ[_name] = '1'
os.environ['NPROC'] = '1'  # XLA sizes its pool of threads by this
for _name in 'OPENBLAS_CORETYPE', 'OPENBLAS_L2_SIZE': os.environ.pop(_name, None)  # each BLAS chooses the kernels for this processor

import argparse  # noqa: E402
import contextlib  # noqa: E402
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections import namedtuple  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402

FOLDER = Path(os.environ.get('BENCH_JOB', Path(__file__).parent / '.job'))
NAMES = 'x', 'y', 'vx', 'vy', 'w1', 'b1', 'w2', 'b2'
# weights: arrays w1 (50,784), b1 (50,), w2 (10,50), b2 (10,) after training; accuracy: as the tool reports it, 0 to 1; updates: steps taken
Result = namedtuple('Result', 'weights accuracy updates')
Turn = namedtuple('Turn', 'seconds cpu accuracy loss updates')  # accuracy and loss on the validation set, from the final weights


class Job:
    "Data, initial weights and settings, as NumPy arrays"
    bs, lr, valid_bs = 64, 0.5, 128

    def __init__(self):
        import numpy as np
        for name in NAMES: setattr(self, name, np.load(FOLDER / f'{name}.npy'))
        self.epochs = json.loads((FOLDER / 'job.json').read_text())['epochs']
        self.seed = 0  # `run` sets another for each turn
        self.updates = self.epochs * -(-len(self.x) // self.bs)  # a last, short batch included

    @property
    def weights(self):
        "Copies of the initial weights: w1, b1, w2, b2"
        return [getattr(self, name).copy() for name in NAMES[4:]]

    def tensors(self):
        "x, y, vx, vy as tensors that share the arrays' memory; torch is set to one thread"
        import torch
        torch.set_num_threads(1)
        return [torch.from_numpy(getattr(self, name)) for name in NAMES[:4]]

    def load(self, model):
        "The initial weights copied into a model of `torch.nn`'s or miniai's layers; torch is seeded, so that orders are the same too"
        import torch
        with torch.no_grad():
            for p, w in zip(model.parameters(), self.weights, strict=True): p.copy_(torch.from_numpy(w))
            torch.manual_seed(self.seed)
        return model

    def torch_model(self):
        "The network in `torch.nn`'s layers, with the initial weights"
        from torch import nn
        return self.load(nn.Sequential(nn.Linear(784, len(self.b1)), nn.ReLU(), nn.Linear(len(self.b1), 10)))

    def evaluate(self, weights):
        "Accuracy and loss on the validation set, computed from the weights alone, in the same way for all"
        import numpy as np
        w1, b1, w2, b2 = [np.asarray(w, dtype=np.float64) for w in weights]
        z = np.maximum(self.vx @ w1.T + b1, 0) @ w2.T + b2
        z -= z.max(1, keepdims=True)
        loss = np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), self.vy]
        return float((z.argmax(1) == self.vy).mean()), float(loss.mean())


def arrays(model):
    "Weights of a torch or miniai model, as a `Result` holds them"
    return [p.detach().numpy().copy() for p in model.parameters()]


def peak_mb():
    "The most memory this process has held so far, in MB"
    try:  # what getrusage says on Linux includes the process that started this one
        for line in Path('/proc/self/status').read_text().splitlines():
            if line.startswith('VmHWM:'): return int(line.split()[1]) / 1024
    except OSError: pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 1024)


def cpu_seconds():
    "Processor time of this process, all its threads, and of its worker processes that have ended"
    t = os.times()
    return time.process_time() + t.children_user + t.children_system


def run(setup, packages, jit=False):
    """Time what `setup(job)` returns, and print one line of JSON; what the tool prints goes to stderr.

    The job is done once, and then again, up to four times or until 6 seconds are over: the median of these is the time of a later run.
    One run alone may be a tenth slower or faster by where its tensors happen to lie in memory."""
    with contextlib.redirect_stdout(sys.stderr):
        job, turns = Job(), []
        job.seed = 5 * int(os.environ.get('BENCH_ROUND', 0))
        go = setup(job)
        row = dict(name=Path(sys.argv[0]).stem, setup_mb=peak_mb(), examples=len(job.x), epochs=job.epochs)
        while len(turns) < 2 or len(turns) < 5 and sum(t.seconds for t in turns[1:]) < 6:
            turns.append(timed(go, job))
            if len(turns) == 1: row['peak_mb'] = peak_mb()
            if not jit and turns[0].seconds > 20: break  # a second long run adds nothing
            job.seed += 1
        first, *later = turns
        row.update(first=first.seconds, first_cpu=first.cpu, updates_due=job.updates)
        row['updates'] = next((t.updates for t in turns if t.updates != job.updates), job.updates)
        if later: row.update(later=median(t.seconds for t in later), later_cpu=median(t.cpu for t in later))
        row.update(accuracies=[t.accuracy for t in turns], losses=[t.loss for t in turns])
        row['versions'] = {name: importlib.metadata.version(name) for name in packages}
        row['python'] = platform.python_version()
    print(json.dumps(row), flush=True)


def timed(go, job):
    "Do the job once; the result is evaluated after the clock has stopped"
    start, cpu = time.perf_counter(), cpu_seconds()
    result = go()
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    accuracy, loss = job.evaluate(result.weights)
    told = None if result.accuracy is None else float(result.accuracy)
    if told is not None and abs(told - accuracy) > 1e-3:
        raise RuntimeError(f'reported an accuracy of {told:.4f}, its weights have {accuracy:.4f}')
    return Turn(seconds, cpu, accuracy, loss, int(result.updates))


def prepare(examples=None, epochs=3, hidden=50):
    "Write the job to `FOLDER`; the full MNIST, found as `miniai.data` finds it"
    import numpy as np
    import torch
    from torch import nn

    from miniai.data import mnist
    data = mnist(sample=False)
    torch.manual_seed(0)
    layers = nn.Linear(784, hidden), nn.Linear(hidden, 10)
    arrays = [data.train.x[:examples], data.train.y[:examples], *data.valid, *(p.detach() for l in layers for p in l.parameters())]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, a in zip(NAMES, arrays, strict=True): np.save(FOLDER / f'{name}.npy', a.numpy())
    (FOLDER / 'job.json').write_text(json.dumps(dict(epochs=epochs)))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Write the data and the initial weights of the job to .job/')
    parser.add_argument('--examples', type=int, help='training examples, from the first (default: all 50,000)')
    parser.add_argument('--epochs', type=int, default=3)
    args = parser.parse_args()
    prepare(args.examples, args.epochs)

"""What a step of miniai's optimisers costs beside PyTorch's: `.venv/bin/python benchmarks/optimizers.py`.

Three networks with gradients, one thread: that of chapter 04, one with six layers, one with a million parameters. Each of ours, PyTorch's
default (on a CPU a loop over the parameters, like ours) and its list version (`foreach=True`) take a number of steps in turn within one
process, in random order. Prints a table of medians by processor time, and the median ratio of ours to the default with its spread. Ours
are plain loops; list functions (`torch._foreach_*`) would be worth their name if a step took more than 1.1 times the default's. Needs torch
and miniai, nothing else."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')

# isort: split
import argparse
import itertools
import random
import time
from statistics import median, quantiles

import torch
from torch.testing import assert_close

from miniai.optim import Adam, AdamW, Momentum, RMSprop

torch.set_num_threads(1)

PAIRS = [  # ours, PyTorch's, arguments
    (Momentum, torch.optim.SGD, dict(lr=.01, momentum=.9)),
    (Momentum, torch.optim.SGD, dict(lr=.01, momentum=.9, nesterov=True, weight_decay=.01)),
    (RMSprop, torch.optim.RMSprop, dict(lr=.001)),
    (RMSprop, torch.optim.RMSprop, dict(lr=.001, momentum=.9, centered=True)),
    (Adam, torch.optim.Adam, dict(lr=.001)),
    (Adam, torch.optim.Adam, dict(lr=.001, weight_decay=.01, amsgrad=True)),
    (AdamW, torch.optim.AdamW, dict(lr=.001)),
]
WIDTHS = {'784-50-10': (784, 50, 10), 'six layers': (784, *[100] * 5, 10), 'a million': (784, 1000, 250, 10)}
SHAPES = {name: [s for a, b in itertools.pairwise(w) for s in ((b, a), (b,))] for name, w in WIDTHS.items()}


def ready(kind, shapes, **kwargs):
    "An optimiser whose parameters have gradients"
    gen = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=gen).requires_grad_() for s in shapes]
    for p in params: p.grad = torch.randn(p.shape, generator=gen)
    return kind(params, **kwargs)


def clock(opt, steps):
    "Processor time of a step, in microseconds"
    start = time.process_time()
    for _ in range(steps): opt.step()
    return (time.process_time() - start) / steps * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=40, help='turns of each (default: 40)')
    parser.add_argument('--steps', type=int, default=5, help='steps a turn (default: 5)')
    args = parser.parse_args()
    draw = random.Random(0)
    print(f'torch {torch.__version__}, one thread, {args.rounds} rounds of {args.steps} steps; µs a step by processor time')
    print(f'{"":12}{"":62}{"ours":>7}{"default":>9}{"foreach":>9}  ours / default (half of the rounds)')
    for (size, shapes), (ours, theirs, kwargs) in ((s, p) for s in SHAPES.items() for p in PAIRS):
        opts = {'ours': ready(ours, shapes, **kwargs), 'default': ready(theirs, shapes, **kwargs),
                'foreach': ready(theirs, shapes, foreach=True, **kwargs)}
        for opt in opts.values(): clock(opt, 3)                                        # the states are made
        took = {name: [] for name in opts}
        for _ in range(args.rounds):
            for name in draw.sample(list(opts), len(opts)): took[name].append(clock(opts[name], args.steps))
        end = [o.param_groups[0]['params'] for o in opts.values()]
        assert_close(end[0], end[1], rtol=1e-3, atol=1e-4, msg='not the same work')
        ratios = [a / b for a, b in zip(took['ours'], took['default'])]
        low, _, high = quantiles(ratios, n=4)
        label = f'{ours.__name__}({", ".join(f"{k}={v}" for k, v in kwargs.items())})'
        print(f'{size:12}{label:62}' + ''.join(f'{median(took[k]):{w}.0f}' for k, w in (('ours', 7), ('default', 9), ('foreach', 9)))
              + f'  {median(ratios):.2f} ({low:.2f} to {high:.2f})', flush=True)


if __name__ == '__main__': main()

"""What our layers cost beside those of `torch.nn`, in time and in memory: `python benchmarks/layers.py`, in any environment that has torch
and miniai.

Each layer, forward and backward pass, on contiguous and on channels_last images; then steps of nets (forward, loss, backward, update);
then an epoch of `Learner` around a net of `torch.nn` beside the plain loop. Ours and PyTorch's take turns within one process, in random
order, on one thread; both start from the same weights and must end at the same numbers. A ratio is the median of the ratios of
neighbouring turns, by processor time. Meanwhile the C library keeps the memory that is freed. By default it returns a part of it after a
pass and takes it back in the next one; how much depends on what the process did before, and in small nets it costs ours more (`--default-
malloc`). The memory is the peak of the process above what it held before the pass, as Linux counts it, so that it includes what PyTorch's
kernels take for themselves. Writes `results/layers.md` and `results/layers.json` unless `--no-write` is given.

A new layer is one line in `LAYERS`, and its class one name in `OURS`; a new net is one line in `NETS`.
"""
import job  # noqa: F401 -- first: it sets the process to one thread

# isort: split
import argparse
import ctypes
import json
import os
import random
import time
from collections import namedtuple
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import nn

from miniai import activations, conv, losses, module
from miniai.learner import Learner
from miniai.optim import Momentum
from miniai.training import Dataset, get_dls
from overhead import loop

LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
OURS = {name: getattr(where, name) for where, names in [
    (module, 'Linear ReLU Flatten Sequential'), (conv, 'Conv2d MaxPool2d AvgPool2d AdaptiveAvgPool2d'),
    (activations, 'LeakyReLU GELU SiLU'), (losses, 'CrossEntropyLoss')] for name in names.split()}
THEIRS = {name: getattr(nn, name) for name in OURS}

# text: the layer, built from OURS and from THEIRS; shape: of the input; aim: the ratio, at most (None: none is set)
# first: the layer is the first of a net, so its input requires no gradient
Layer = namedtuple('Layer', 'text shape aim first', defaults=(1.3, False))
LAYERS = [
    Layer('Conv2d(1, 8, 5, 2, 2)', (128, 1, 28, 28), first=True), Layer('Conv2d(1, 24, 5)', (128, 1, 28, 28), first=True),
    Layer('Conv2d(1, 24, 5)', (128, 1, 28, 28)),
    Layer('Conv2d(8, 16, 3, 2, 1)', (128, 8, 14, 14)), Layer('Conv2d(16, 32, 3, 2, 1)', (128, 16, 7, 7)),
    Layer('Conv2d(32, 64, 3, 2, 1)', (128, 32, 4, 4)), Layer('Conv2d(32, 64, 3, 2, 1)', (128, 32, 14, 14)),
    Layer('Conv2d(16, 16, 3, 1, 1)', (128, 16, 7, 7)), Layer('Conv2d(24, 48, 3)', (128, 24, 12, 12)),
    Layer('Conv2d(48, 64, 3)', (128, 48, 10, 10)), Layer('Conv2d(48, 48, 3, 1, 1)', (128, 48, 14, 14)),
    Layer('Conv2d(96, 96, 3, 1, 1)', (128, 96, 7, 7)), Layer('Conv2d(32, 32, 3, 1, 1)', (128, 32, 28, 28)),
    Layer('Conv2d(64, 128, 1)', (128, 64, 7, 7)), Layer('Conv2d(64, 128, 1, 2)', (128, 64, 14, 14)),
    Layer('MaxPool2d(2)', (128, 24, 24, 24)), Layer('MaxPool2d(2)', (128, 64, 8, 8)), Layer('MaxPool2d(3, 2, 1)', (128, 32, 28, 28)),
    Layer('AvgPool2d(2)', (128, 24, 24, 24)), Layer('AvgPool2d(2)', (128, 64, 8, 8)), Layer('AvgPool2d(3, 2, 1)', (128, 32, 28, 28)),
    Layer('AdaptiveAvgPool2d(1)', (128, 64, 7, 7)), Layer('AdaptiveAvgPool2d(1)', (128, 32, 28, 28)),
    Layer('AdaptiveAvgPool2d(2)', (128, 64, 8, 8)), Layer('AdaptiveAvgPool2d(4)', (128, 32, 28, 28)),
    *(Layer(f'{name}()', (128, 24, 24, 24), None) for name in ('ReLU', 'LeakyReLU', 'GELU', 'SiLU')),
    Layer('Linear(784, 50)', (128, 784), None), Layer('Linear(1024, 1024)', (256, 1024), None),
]

# the nets of chapters 11 and 13, for digits of 28 x 28
STAGE = 'Conv2d({0}, {0}, 3, 1, 1), ReLU(), '
DEEPER = {k: STAGE.format(k) * 2 for k in (8, 16, 32, 64)}
NETS = {
    'four convolutions, stride 2 (8, 16, 32, 64 channels)':
        'Conv2d(1, 8, 5, 2, 2), ReLU(), Conv2d(8, 16, 3, 2, 1), ReLU(), Conv2d(16, 32, 3, 2, 1), ReLU(), Conv2d(32, 64, 3, 2, 1), ReLU(), '
        'AdaptiveAvgPool2d(1), Flatten(), Linear(64, 10)',
    'twelve convolutions: two more a stage':
        f'Conv2d(1, 8, 5, 2, 2), ReLU(), {DEEPER[8]}Conv2d(8, 16, 3, 2, 1), ReLU(), {DEEPER[16]}'
        f'Conv2d(16, 32, 3, 2, 1), ReLU(), {DEEPER[32]}Conv2d(32, 64, 3, 2, 1), ReLU(), {DEEPER[64]}'
        'AdaptiveAvgPool2d(1), Flatten(), Linear(64, 10)',
    'three convolutions, two max pools (24, 48, 64 channels)':
        'Conv2d(1, 24, 5), MaxPool2d(2), ReLU(), Conv2d(24, 48, 3), ReLU(), Conv2d(48, 64, 3), MaxPool2d(2), ReLU(), Flatten(), '
        'Linear(1024, 10)',
}
STEP_AIM, LEARNER_AIM = 1.25, 1.05


def build(text, kinds):
    "The module that `text` describes, of our classes or of PyTorch's"
    torch.manual_seed(0)
    return eval(text, dict(kinds))


def layer_passes(case, layout):
    "Two functions, ours and theirs, that run a layer's forward and backward pass; they return output and gradients, and keep nothing"
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    if x.ndim == 4: x = x.to(memory_format=LAYOUTS[layout])
    layers = [build(case.text, kinds).to(memory_format=LAYOUTS[layout]) for kinds in (OURS, THEIRS)]
    grad = torch.randn_like(layers[1](x).detach())
    x.requires_grad_(not case.first)

    def way(layer):
        def run():
            out = layer(x)
            out.backward(grad)
            leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
            found = [out.detach(), *(t.grad for t in leaves)]
            for t in leaves: t.grad = None
            return found
        return run
    return [way(layer) for layer in layers]


def net_steps(text, layout, bs=128):
    "Two functions, ours and theirs, that run a step of a net: forward, loss, backward, update; returns the loss"
    gen = torch.Generator().manual_seed(0)
    x = torch.rand(bs, 1, 28, 28, generator=gen).to(memory_format=LAYOUTS[layout])
    y = torch.randint(10, (bs,), generator=gen)

    def way(kinds):
        net, loss_func = build(f'Sequential({text})', kinds).to(memory_format=LAYOUTS[layout]), kinds['CrossEntropyLoss']()
        opt = torch.optim.SGD(net.parameters(), lr=.01, momentum=.9)
        def run():
            loss = loss_func(net(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            return [loss.detach()]
        return run
    return way(OURS), way(THEIRS)


def learner_epochs(text, n=2560, bs=128):
    "Two functions, `Learner` and the plain loop, that train a net of `torch.nn` for an epoch; returns the weights"
    gen = torch.Generator().manual_seed(0)
    x, y = torch.rand(n + n//5, 1, 28, 28, generator=gen), torch.randint(10, (n + n//5,), generator=gen)
    dls = get_dls(Dataset(x[:n], y[:n]), Dataset(x[n:], y[n:]), bs)

    def way(train):
        def run():
            net = build(f'Sequential({text})', THEIRS)  # seeds torch, so that the orders of the batches are the same
            train(net, nn.CrossEntropyLoss())
            return [p.detach() for p in net.parameters()]
        return run

    def with_learner(net, loss_func): Learner(net, dls, loss_func, Momentum, lr=.01).fit(1, progress=False)
    def with_loop(net, loss_func): loop(net, loss_func, Momentum(net.parameters(), lr=.01), *dls)
    return way(with_learner), way(with_loop)


def clock(run, repeat):
    "Processor time of a call, in seconds"
    start = time.process_time()
    for _ in range(repeat): run()
    return (time.process_time() - start) / repeat


def timed(ways, rounds, what):
    "Median seconds of the second way, and the ratios of the first to the second: their median and quartiles"
    for a, b in zip(*(way() for way in ways), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=f'{what}: not the same work')
    repeat = max(1, int(.003 / clock(ways[1], 3)))  # of a short pass, several a turn
    draw, ratios, theirs = random.Random(0), [], []
    for _ in range(rounds):
        took = {way: clock(way, repeat) for way in draw.sample(ways, 2)}
        ratios.append(took[ways[0]] / took[ways[1]])
        theirs.append(took[ways[1]])
    low, middle, high = quantiles(ratios, n=4)
    return dict(ms=median(theirs)*1e3, ratio=middle, low=low, high=high)


def allocator(keep):
    "Make glibc keep memory that is freed, or return it to the system at once; nothing happens where there is another C library"
    options = {'trim_threshold': -1, 'mmap_threshold': -3, 'mmap_max': -4}  # numbers from malloc.h
    values = dict(mmap_max=0, trim_threshold=2**31 - 1) if keep else dict(mmap_max=2**16, mmap_threshold=2**16, trim_threshold=2**16)
    try: libc = ctypes.CDLL(None)
    except TypeError: return  # Windows
    for name, value in values.items():
        if hasattr(libc, 'mallopt'): libc.mallopt(options[name], value)
    if not keep and hasattr(libc, 'malloc_trim'): libc.malloc_trim(0)


def peak(run):
    "MB that a call takes above what the process held before, at most; `None` where Linux does not tell"
    def status(key):
        return next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(key))
    try:
        allocator(keep=False)
        for _ in range(2): run()
        allocator(keep=False)  # returns what the two passes left
        before = status('VmRSS')
        Path('/proc/self/clear_refs').write_text('5')  # sets the peak back to what the process holds
        run()
        return max(0, status('VmHWM') - before) / 1024
    except OSError: return None


def measure(args):
    "One dict per line of the tables; memory first, while no large heap exists, and then the times"
    passes = [('layer', f'{c.text}{", no gradient of the input" * c.first} on {"x".join(map(str, c.shape))}', c.aim, layout,
               lambda c=c, layout=layout: layer_passes(c, layout)) for c in LAYERS for layout in LAYOUTS
              if len(c.shape) == 4 or layout == 'contiguous']
    passes += [('step', name, STEP_AIM, layout, lambda text=text, layout=layout: net_steps(text, layout))
               for name, text in NETS.items() for layout in LAYOUTS]
    passes += [('Learner', name, LEARNER_AIM, 'contiguous', lambda text=text: learner_epochs(text)) for name, text in NETS.items()]
    # a line is chosen by a word of its kind, its layer or net, and its layout
    passes = [p for p in passes if any(word in f'{p[0]} {p[1]} {p[3]}' for word in args.only)]
    memory = [[None] * 2 if kind == 'Learner' else [peak(way) for way in make()] for kind, *_, make in passes]
    allocator(keep=not args.default_malloc)
    rows = []
    for (kind, what, aim, layout, make), (mb, theirs) in zip(passes, memory):
        rounds = args.rounds if kind != 'Learner' else max(2, args.rounds // 2)
        rows.append(dict(kind=kind, what=what, layout=layout, aim=aim, **timed(make(), rounds, what), mb=mb, their_mb=theirs))
        print('{kind:8}{what:75}{layout:15}{ms:9.2f} ms  x {ratio:.2f} ({low:.2f} to {high:.2f})'.format(**rows[-1]), flush=True)
    return rows


HEADS = {'layer': 'A layer, forward and backward', 'step': 'A step of a net: forward, loss, backward, update; batches of 128',
         'Learner': '`Learner` around the layers of `torch.nn` / the plain loop, an epoch with validation'}


def table(rows, rounds):
    "The measurements as Markdown"
    lines = ['# What our layers cost beside those of `torch.nn`', '',
             f'In turn within one process, one thread, {rounds} turns; torch {torch.__version__}; load average {os.getloadavg()[0]:.1f} at '
             'the end. Times by processor time; ratios: ours to theirs. ⚠: above the aim.']
    for kind, head in HEADS.items():
        chosen = [row for row in rows if row['kind'] == kind]
        if not chosen: continue
        lines += ['', f'## {head}', '', '| what | layout | theirs, ms | time, median ratio | half of them lie from | at most (aim) '
                  '| peak memory, theirs, MB | ratio |', '|---|---|--:|--:|--:|--:|--:|--:|']
        for row in chosen:
            aim = '' if row['aim'] is None else f'{row["aim"]}{" ⚠" * (row["ratio"] > row["aim"])}'
            mb, theirs = row['mb'], row['their_mb']
            memory = f'{theirs:.1f} | {mb/theirs:.2f}' if mb and theirs else '| '
            lines.append('| {what} | {layout} | {ms:.2f} | {ratio:.2f} | {low:.2f} to {high:.2f} | '.format(**row) + f'{aim} | {memory} |')
    return '\n'.join(lines) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=21, help='turns of each (default: %(default)s)')
    parser.add_argument('--only', nargs='+', default=[''], metavar='WORD', help='lines that contain one of these words, e.g. Conv2d step')
    parser.add_argument('--default-malloc', action='store_true', help='leave it to the C library when it returns memory to the system')
    parser.add_argument('--no-write', action='store_true', help='print only, and leave results/ as it is')
    args = parser.parse_args()
    if args.rounds < 2: parser.error('--rounds must be 2 or more')
    rows = measure(args)
    if not rows: parser.error(f'no line contains {" or ".join(args.only)}')
    print(table(rows, args.rounds))
    if args.no_write: return
    results = Path(__file__).parent / 'results'
    (results / 'layers.md').write_text(table(rows, args.rounds))
    (results / 'layers.json').write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__': main()

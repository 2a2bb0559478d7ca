"Callbacks that steer a run: edge cases, errors at every event, killed and resumed runs, matrices of options."
import contextlib
import functools
import io
import itertools
import math
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, tensor
from torch.testing import assert_close

from miniai.callbacks import (
    EMACB,
    AccumulateCB,
    DeviceCB,
    EarlyStoppingCB,
    GradClipCB,
    LRFinderCB,
    MixedPrecisionCB,
    NaNGuardCB,
    SingleBatchCB,
    default_device,
    lr_find,
)
from miniai.learner import EVENTS, Callback, CancelEpoch, CancelFit, CancelStep, Learner, random_state
from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, Module, ReLU, Sequential
from miniai.training import SGD, DataLoader, Dataset

ROOT = Path(__file__).resolve().parents[1]
OURS = Sequential, Linear, ReLU, CrossEntropyLoss
TORCH = nn.Sequential, nn.Linear, nn.ReLU, nn.CrossEntropyLoss
engines = pytest.mark.parametrize('layers', [OURS, TORCH], ids=['ours', 'torch'])
momentum = functools.partial(torch.optim.SGD, momentum=.9)
adam = functools.partial(torch.optim.Adam, amsgrad=True)


def learner(layers=TORCH, cbs=(), opt_func=SGD, lr=.1, seed=0, n=90, kind=Learner):
    torch.manual_seed(seed)
    y = torch.randint(3, (n,))
    ds, g = Dataset(torch.randn(n, 5) + 2*F.one_hot(y, 5), y), torch.Generator().manual_seed(seed)
    dls = DataLoader(ds, 8, shuffle=True, generator=g), DataLoader(ds, 32)
    net, linear, relu, loss = layers
    return kind(net(linear(5, 6), relu(), linear(6, 3)), dls, loss(), opt_func, lr, cbs)


def weights(learn): return [t.detach().clone() for t in learn.model.state_dict().values()]
def numbers(records): return [{k: v for k, v in r.items() if k != 'seconds'} for r in records]


def same(a, b):
    "Equal structures, tensors bit for bit"
    if isinstance(a, (list, tuple, dict)):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(*((o.items() if isinstance(o, dict) else o) for o in (a, b))): same(x, y)
    elif isinstance(a, torch.Tensor): assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    else: assert a == b


class Stop(Exception): pass


class Save(Callback):
    "Saves what a checkpoint contains, whose weights are those that evaluation sees, and ends the run"
    order = 1000
    def __init__(self, at): self.at = at

    def save(self, learn):
        with learn.evaluating(): model = {k: t.clone() for k, t in learn.model.state_dict().items()}
        parts = model, [p.grad for p in learn.model.parameters()], *(o.state_dict() for o in (learn.opt, learn, *learn.cbs))
        torch.save(parts, file := io.BytesIO())
        self.saved = file.getvalue()
        raise Stop

    def after_batch(self, learn):
        if learn.training and (learn.epoch, learn.batch_idx) == self.at: self.save(learn)

    def after_epoch(self, learn):
        if (learn.epoch, 'end') == self.at: self.save(learn)


class Load(Callback):
    "Loads a checkpoint at the moment at which chapter 09 does"
    order = 1001
    def __init__(self, saved): self.saved = saved
    def before_fit(self, learn):
        model, grads, *states = torch.load(io.BytesIO(self.saved), weights_only=True)
        for o, state in zip((learn.opt, learn, *learn.cbs), states, strict=True): o.load_state_dict(state)
        learn.model.load_state_dict(model)
        for p, grad in zip(learn.model.parameters(), grads): p.grad = grad


def resumed(make, at=(2, 4), epochs=3):
    "A run, and one that was killed and resumed: they end alike"
    straight, save, other = make(), Save(at), make()
    straight.fit(epochs, progress=False)
    with contextlib.suppress(Stop): make().fit(epochs, cbs=[save], progress=False)
    other.fit(epochs, cbs=[Load(save.saved)], progress=False)
    same(weights(other), weights(straight))
    same([cb.state_dict() for cb in other.cbs], [cb.state_dict() for cb in straight.cbs])
    assert numbers(other.records) == numbers(straight.records)
    for learn in straight, other: learn.fit(1, progress=False) # and so do the fits that follow
    same(weights(other), weights(straight))
    return straight, other


# ---- no error leaves anything behind

ALL = {
    'device': lambda: DeviceCB('cpu'), 'single': SingleBatchCB, 'clip': lambda: GradClipCB(1.), 'guard': NaNGuardCB,
    'accumulate': lambda: AccumulateCB(3), 'stopping': lambda: EarlyStoppingCB(restore_best=True), 'ema': lambda: EMACB(.9),
    'bfloat16': lambda: MixedPrecisionCB(torch.bfloat16), 'float16': lambda: MixedPrecisionCB(torch.float16),
}


def failing(event, at, error):
    "A callback that raises at the `at`th call of an event"
    calls = itertools.count(1)
    def fail(self, learn):
        if next(calls) == at: raise error
    return type('Failing', (Callback,), {event: fail, 'order': 500})()


def hooks_of(model):
    return [[*m._forward_hooks] for m in model.modules()] + [[*(p._backward_hooks or ())] for p in model.parameters()]


def where(learn):
    "Everything that a callback may have changed"
    modes = [m.training for m in learn.model.modules()]
    return [hooks_of(learn.model), modes, learn.dls, learn.opt, learn.loss_func, learn.model, learn.cbs, learn._calls,
            torch.is_grad_enabled(), torch.is_autocast_enabled('cpu'), {k for k in vars(learn) if callable(getattr(learn, k))}]


class Weights(Callback):
    "The weights after the latest step"
    order, latest = 400, None
    def cleanup_step(self, learn): self.latest = weights(learn)


@engines
@pytest.mark.parametrize('name', ALL)
def test_an_error_at_any_event_leaves_nothing_behind(name, layers):
    at, error = (1, Stop) if layers is OURS else (2, KeyboardInterrupt)
    for event in EVENTS:
        learn = learner(layers, [ALL[name](), seen := Weights()], torch.optim.Adam, .01, n=24)
        learn.create_opt()
        before = where(learn)
        with contextlib.suppress(Stop, KeyboardInterrupt): learn.fit(2, cbs=[failing(event, at, error)], progress=False)
        assert where(learn) == before, event
        ended = event in ('after_fit', 'cleanup_fit') # then the model is the average, or the best
        if seen.latest is not None and not ended and event not in ('after_step', 'cleanup_step') and at == 1:
            same(weights(learn), seen.latest)
        learn.fit(1, progress=False)
        assert where(learn) == before, event


@engines
@pytest.mark.parametrize('event, at', [('before_fit', 1), ('before_train', 1), ('after_forward', 7), ('after_backward', 14),
                                       ('after_step', 3), ('after_validate', 1), ('before_evaluate', 1), ('after_epoch', 2)])
def test_many_callbacks_and_an_error(layers, event, at):
    learn = crowd(layers)
    learn.create_opt()
    before = where(learn)
    with pytest.raises(Stop): learn.fit(2, cbs=[failing(event, at, Stop)], progress=False)
    assert where(learn) == before
    ema = learn.cbs[4]
    if ema.steps > 1: assert not torch.equal(ema.averages[0], weights(learn)[0]) # the training weights are back
    assert len(learn.fit(1, progress=False)) == 1


def crowd(layers):
    cbs = (DeviceCB('cpu'), AccumulateCB(3), NaNGuardCB(), GradClipCB(1.), EMACB(.9), EarlyStoppingCB('valid_loss', 5, restore_best=True),
           MixedPrecisionCB(torch.bfloat16))
    return learner(layers, cbs, momentum, .05)


@engines
@pytest.mark.parametrize('at', [(1, 0), (2, 4), (2, 'end'), (3, 11)], ids=str)
def test_many_callbacks_killed_and_resumed(layers, at): resumed(lambda: crowd(layers), at)


def test_no_callback_keeps_a_graph():
    def tensors(x):
        if isinstance(x, torch.Tensor): yield x
        elif isinstance(x, (list, tuple, dict)):
            for v in x.values() if isinstance(x, dict) else x: yield from tensors(v)
    class Holds(Callback):
        order = 300
        def after_batch(self, learn):
            for cb in learn.running_cbs:
                assert not [t for t in tensors(vars(cb)) if t.requires_grad and not isinstance(t, nn.Parameter)], cb
    for cbs in crowd(OURS).cbs, [MixedPrecisionCB(torch.float16), SingleBatchCB()]: learner(OURS, [*cbs, Holds()]).fit(1, progress=False)


def test_who_is_needed_in_a_trial():
    kinds = (DeviceCB, LRFinderCB, SingleBatchCB, AccumulateCB, MixedPrecisionCB, NaNGuardCB, GradClipCB, EMACB, EarlyStoppingCB)
    assert [k.__name__ for k in kinds if k.needed] == ['DeviceCB', 'AccumulateCB', 'MixedPrecisionCB', 'GradClipCB']


def test_importing_the_module_imports_nothing_that_draws():
    code = "import sys, miniai.callbacks; print([m for m in ('matplotlib', 'IPython', 'pandas') if m in sys.modules])"
    got = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert got.stdout == '[]\n', got.stderr


# ---- optimisers and schedules of torch

OPTIMISERS = {
    'nesterov': lambda p, lr: torch.optim.SGD(p, lr, momentum=.9, nesterov=True, weight_decay=.01), 'adam': torch.optim.Adam,
    'adamw': lambda p, lr: torch.optim.AdamW(p, lr, amsgrad=True),
    'rmsprop': lambda p, lr: torch.optim.RMSprop(p, lr, momentum=.5, centered=True),
    'adagrad': torch.optim.Adagrad, 'fused': lambda p, lr: torch.optim.Adam(p, lr, fused=True),
    'groups': lambda p, lr: torch.optim.SGD([{'params': [q], 'lr': lr*i} for i, q in enumerate(p)], lr, momentum=.9),
}


@engines
@pytest.mark.parametrize('name', OPTIMISERS)
def test_every_optimiser_of_torch(name, layers):
    opt_func = OPTIMISERS[name]
    straight, other = resumed(lambda: learner(layers, (AccumulateCB(3), GradClipCB(.5), EMACB(.8), NaNGuardCB()), opt_func, .01))
    same(straight.cbs[2].averages, other.cbs[2].averages)
    learn, plain = (learner(layers, opt_func=opt_func, lr=.01) for _ in range(2))
    for l in learn, plain: l.fit(1, progress=False)
    lr_find(learn, num=10)
    for l in learn, plain: l.fit(1, progress=False)
    same(weights(learn), weights(plain))


def test_a_schedule_of_torch_is_left_alone_by_the_finder():
    class Schedule(Callback):
        def before_fit(self, learn): self.it = torch.optim.lr_scheduler.ExponentialLR(learn.opt, .9)
        def after_step(self, learn): self.it.step()
    learn = learner(cbs=[schedule := Schedule()], opt_func=torch.optim.SGD)
    learn.fit(1, progress=False)
    lr_find(learn, num=5)
    assert schedule.it.last_epoch == 12 and learn.opt.param_groups[0]['lr'] == schedule.it.get_last_lr()[0]


# ---- devices

@pytest.mark.parametrize('cuda, mps, best', [(True, True, 'cuda'), (False, True, 'mps'), (False, False, 'cpu')])
def test_default_device(monkeypatch, cuda, mps, best):
    monkeypatch.setattr('torch.cuda.is_available', lambda: cuda)
    monkeypatch.setattr('torch.backends.mps.is_available', lambda: mps)
    assert default_device() == torch.device(best)
    if best == 'cpu': assert DeviceCB().device == torch.device('cpu')


class Stub:
    "Stands in for a model, loss function or optimiser and records the calls"
    def __init__(self, name, calls): self.name, self.calls, self.tensors = name, calls, [torch.ones(2)]
    def to(self, device): self.calls.append(f'{self.name} to {device.type}')
    def parameters(self): return self.tensors
    def buffers(self): return []
    def state_dict(self): return 'its state'
    def load_state_dict(self, state): self.calls.append(f'{self.name} loads {state}')


def test_the_model_moves_before_the_optimiser_and_only_if_it_must():
    for device, moved in ('meta', ['loss to meta', 'model to meta', 'opt loads its state']), ('cpu', ['loss to cpu']):
        calls = []
        fake = SimpleNamespace(model=Stub('model', calls), loss_func=Stub('loss', calls), opt=Stub('opt', calls))
        DeviceCB(device).before_fit(fake)
        assert calls == moved
        fake.batch = [torch.ones(1), {'y': [torch.ones(1)]}]
        DeviceCB(device).before_batch(fake)
        assert [fake.batch[0].device.type, fake.batch[1]['y'][0].device.type] == [device]*2
    fake.model.tensors.append(torch.ones(2, device='meta'))         # only a part of the model has been moved
    DeviceCB('cpu').before_fit(fake)
    assert calls[-2:] == ['model to cpu', 'opt loads its state']
    fake.opt = None                                                 # a learner that only evaluates
    DeviceCB('meta').before_fit(fake)
    assert calls[-1] == 'model to meta'


@engines
@pytest.mark.parametrize('opt_func', [SGD, momentum], ids=['ours', 'momentum'])
def test_a_device_in_a_second_fit(layers, opt_func):
    here, there = learner(layers, opt_func=opt_func), learner(layers, opt_func=opt_func)
    for learn in here, there: learn.fit(1, progress=False)          # now the optimiser has a state
    params = list(there.model.parameters())
    here.fit(1, progress=False)
    there.fit(1, cbs=[DeviceCB()], progress=False)                  # a graphics card, if this machine has one
    assert all(p is q for p, q in zip(params, there.model.parameters(), strict=True))
    assert_close([t.cpu() for t in weights(there)], weights(here), rtol=1e-3, atol=1e-4)


# ---- learning rate search

class Replaces(nn.Module):
    "Replaces its buffer by a new tensor, as some layers do"
    def __init__(self):
        super().__init__()
        self.calls = nn.Buffer(torch.zeros(()))
    def forward(self, x):
        self.calls = self.calls + 1
        return x


class Countdown(Callback):
    "Needed, with a state; raises at a chosen step"
    needed, seen = True, 0
    def __init__(self, at=-1, error=None): self.at, self.error = at, error
    def after_step(self, learn):
        self.seen += 1
        if self.seen == self.at: raise self.error
    def state_dict(self): return {'seen': self.seen}


def everything(learn):
    "Everything that a trial may have changed"
    grads = [p.grad is not None and p.grad.clone() for p in learn.model.parameters()]
    opt = learn.opt and learn.opt.state_dict()
    return [weights(learn), grads, random_state(learn.dls), opt, learn.records, [cb.state_dict() for cb in learn.cbs], learn.lr,
            learn.steps, [m.training for m in learn.model.modules()], sorted(vars(learn))]


@engines
@pytest.mark.parametrize('error', [None, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize('opt_func, fitted', [(SGD, False), (adam, True)], ids=['fresh', 'fitted'])
def test_the_finder_restores_everything(layers, error, opt_func, fitted):
    def make(*cbs):
        learn = learner(layers, cbs, opt_func, .01)
        if layers is TORCH: learn.model.insert(1, nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(.1), Replaces()))
        return learn
    counter, other = Countdown(-1 if error is None else 5 + fitted*12, error), make()
    learn = make(counter, EMACB(.9)) if fitted and layers is OURS else make(counter)
    def fit(learn):
        torch.manual_seed(7)                                        # for dropout
        learn.fit(1, progress=False)
    for l in [learn, other]*fitted: fit(l)
    fit(other)
    for p in learn.model.parameters(): p.grad = torch.ones_like(p)
    learn.model.eval()
    before, grads = everything(learn), [p.grad for p in learn.model.parameters()]
    with contextlib.suppress(error or Stop): assert len(lr_find(learn, num=40).lrs) <= 40
    same(everything(learn), before)
    assert all(p.grad is g for p, g in zip(learn.model.parameters(), grads)) and (learn.opt is not None) == fitted
    counter.at = -1
    ema = next((cb for cb in learn.cbs if isinstance(cb, EMACB)), None)
    fit(learn)                                                      # continues as if nothing had happened
    same(ema.state_dict()['training'] if ema else weights(learn), weights(other))


def test_the_finder_with_callbacks_that_it_needs():
    cbs = [DeviceCB('cpu'), AccumulateCB(2), MixedPrecisionCB(torch.float16), GradClipCB(1.)]
    learn, plain = (learner(cbs=[type(cb)(*args) for cb, args in zip(cbs, (['cpu'], [2], [torch.float16], [1.]))]) for _ in range(2))
    for l in learn, plain: l.fit(1, progress=False)
    scale = learn.cbs[2].scaler.state_dict()
    assert len(lr_find(learn, num=30).losses) > 5 and learn.cbs[2].scaler.state_dict() == scale
    for l in learn, plain: l.fit(1, progress=False)
    same(weights(learn), weights(plain))


def test_rates_suggestions_and_the_end_of_a_search():
    few = lr_find(learner(), start=.001, end=1., num=4)
    assert_close(few.lrs, [.001, .01, .1, 1.])
    assert len(few.losses) == 4
    default = lr_find(learner(n=100))
    assert_close(default.lrs, [1e-5*1e6**(i/99) for i in range(len(default.lrs))])
    average, beta = 0., .9
    for i, (loss, smooth) in enumerate(zip(default.losses, default.smooth, strict=True)):
        average = beta*average + (1 - beta)*loss
        assert_close(smooth, average/(1 - beta**(i + 1)))

    finder = LRFinderCB()
    assert [finder.steepest, finder.tenth, repr(finder)] == [None, None, 'LRFinderCB()']
    finder.lrs = [10.**i for i in range(-6, 1)]
    finder.losses = finder.smooth = [5., 4.8, 4., 2., 1., 3., 9.]
    assert [finder.steepest, finder.tenth] == [1e-3, 1e-3] # s[i+1] - s[i-1] is -2.8 from 4.8 to 2, and -3 from 4 to 1
    assert repr(finder) == 'LRFinderCB(steepest 0.001, tenth 0.001)'
    finder.losses = finder.smooth = [1., 2., 3.]
    assert [finder.steepest, finder.tenth] == [None, None]


class Explode(Learner):
    "Batch i has the i-th loss of the list"
    course = [2., 1., 3.75, 4.25, 1.]
    def get_loss(self):
        super().get_loss()
        self.loss = self.loss*0 + self.course[self.batch_idx]


def test_a_search_ends_when_the_loss_explodes():
    learn = learner(kind=Explode)
    assert lr_find(learn, beta=0.).losses == [2., 1., 3.75, 4.25]     # more than four times the lowest
    assert lr_find(learn, beta=0., stop=3.).losses == [2., 1., 3.75]
    for bad in math.nan, math.inf:
        learn.course = [2., 1., bad, 1.]
        finder = lr_find(learn)
        assert len(finder.losses) == 3 and finder.tenth == finder.lrs[1]/10
    for wrong in dict(start=0.), dict(start=2., end=1.), dict(start=1., end=1.), dict(num=1):
        with pytest.raises(ValueError, match='must be 0 < start < end'): LRFinderCB(**wrong)


def test_a_search_takes_as_many_epochs_as_it_needs_and_prints_nothing(capsys):
    assert len(lr_find(learner(n=16), num=7, end=1e-4).lrs) == 7      # two batches an epoch
    assert capsys.readouterr().out == ''
    short = LRFinderCB(num=40)                                        # validation losses do not count
    learner().fit(1, cbs=[short], progress=False)
    assert len(short.lrs) == len(short.losses) == 12


def test_a_search_needs_a_loader_whose_order_can_be_restored():
    learn = learner()
    loader = torch.utils.data.DataLoader(Dataset(torch.randn(8, 5), torch.zeros(8).long()), 4, num_workers=1, persistent_workers=True)
    learn.dls = loader, None
    with pytest.raises(ValueError, match='persistent_workers=False'): lr_find(learn)


def test_the_curve_of_a_search():
    plt = pytest.importorskip('matplotlib.pyplot')
    finder = LRFinderCB()
    finder.lrs, finder.losses = [10.**i for i in range(-6, 1)], [5., 4.8, 4., 2., 1., 3., 9.]
    finder.smooth = [5., 4.9, 4.5, 3., 2., 2.5, 6.]
    ax = finder.plot()
    assert [[[*xy] for xy in line.get_data()] for line in ax.lines[:2]] == [[finder.lrs, finder.losses], [finder.lrs, finder.smooth]]
    assert [line.get_xdata()[0] for line in ax.lines[2:]] == [finder.steepest, finder.tenth]
    assert_close([*ax.get_ylim()], [.8*1, 1.25*5])                    # the explosion is cut off
    finder.losses = finder.smooth = [1., 2., 3.]
    ax = finder.plot()
    assert len(ax.lines) == 2
    assert_close([*ax.get_ylim()], [.8*1, 1.25*1.5])
    plt.close('all')


def test_a_cell_that_ends_with_a_plot_shows_one_picture():
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    setup = """%matplotlib inline
from miniai.callbacks import LRFinderCB
finder = LRFinderCB()
finder.lrs, finder.losses, finder.smooth = [.1, 1., 10.], [2., 1., 3.], [2., 1.5, 2.]"""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (setup, 'finder.plot()')])
    nbclient.NotebookClient(nb, kernel_name='python3', timeout=60).execute()
    assert sum('image/png' in o.get('data', {}) for o in nb.cells[1].outputs) == 1


# ---- a single batch

def test_a_single_batch_is_always_the_same():
    class Look(Callback):
        order = 10
        def __init__(self): self.seen = {True: [], False: []}
        def before_batch(self, learn): self.seen[learn.training].append(learn.batch[0])
    learn = learner(cbs=[SingleBatchCB(), look := Look()])
    loaders = learn.dls
    learn.fit(3, progress=False)
    assert learn.steps == 3 and learn.dls is loaders and learn.cbs[0]._kept == {}
    for training, n in (True, 8), (False, 32):
        assert len(look.seen[training]) == 3 and all(x is look.seen[training][0] and len(x) == n for x in look.seen[training])
    first = look.seen[True][0]
    learn.fit(1, progress=False)                                      # a new fit draws a new one
    assert not torch.equal(look.seen[True][3], first)


# ---- clipping

@engines
@pytest.mark.parametrize('opt_func', [SGD, momentum], ids=['ours', 'momentum'])
def test_clipping_is_that_of_torch(layers, opt_func):
    class Keep(Callback):
        "Stores the gradients before clipping"
        order = -21
        def __init__(self): self.grads = []
        def before_step(self, learn): self.grads.append([p.grad for p in learn.model.parameters()])
    class TorchClip(Callback):
        def before_step(self, learn): torch.nn.utils.clip_grad_norm_(learn.model.parameters(), 1.)
    clip, keep = GradClipCB(1.), Keep()
    learn, twin, plain, loose = (learner(layers, cbs, opt_func) for cbs in ([clip, keep], [TorchClip()], [], [GradClipCB(1e9)]))
    for l in learn, twin, plain, loose: l.fit(2, progress=False)
    same(weights(learn), weights(twin))
    same(weights(loose), weights(plain))
    norms = tensor([torch.cat([g.flatten() for g in grads]).norm() for grads in keep.grads])
    assert_close(clip.norm, norms[-1])
    assert norms.max() > 1.1 and norms.min() < .9                     # some were clipped, and the stored ones did not change


def test_clipping_to_nothing_raises():
    for wrong in 0, -1., math.nan:
        with pytest.raises(ValueError, match='max_norm is'): GradClipCB(wrong)


# ---- accumulation

def double(layers, sizes, opt_func=SGD, cbs=(), n=300, kind=Learner):
    "A float64 learner whose loader splits the same examples into batches of given sizes"
    torch.manual_seed(2)
    dl = DataLoader(Dataset(torch.randn(n, 5).double(), torch.randint(3, (n,))), batch_sampler=[*torch.arange(n).split(sizes)])
    net, linear, relu, loss = layers
    return kind(net(linear(5, 6), relu(), linear(6, 3)).double(), (dl, None), loss(), opt_func, .1, cbs)


UNEVEN = [40, 10, 25, 25, 60, 15, 5, 20, 100] # groups of three: 75, 100 and 125 examples; of four: 100, 100 and 100

@engines
@pytest.mark.parametrize('opt_func', [SGD, adam], ids=['sgd', 'adam'])
@pytest.mark.parametrize('small, k, large', [(50, 2, 100), (UNEVEN, 3, [75, 100, 125]), (UNEVEN, 4, 100), (30, 4, [120, 120, 60]),
                                             (7, 100, 300), (100, np.int64(1), 100)], ids=str)
def test_accumulated_steps_are_those_of_the_large_batch(layers, opt_func, small, k, large):
    class Notes(Callback):
        order = -60
        def __init__(self): self.seen = 0
        def before_backward(self, learn): self.before = learn.loss
        def after_backward(self, learn): assert learn.loss is self.before
        def after_batch(self, learn): self.seen += 1
    pieces, whole = double(layers, small, opt_func, [AccumulateCB(k), notes := Notes()]), double(layers, large, opt_func)
    for learn in pieces, whole: learn.fit(2, progress=False)
    assert_close(weights(pieces), weights(whole), rtol=1e-7, atol=1e-9)
    assert pieces.steps == whole.steps and notes.seen == 2*len(pieces.dls[0])


class DictLearner(Learner):
    "Batches are dicts"
    def inputs(self): return self.batch['x']
    def targets(self): return self.batch['y']


def test_accumulation_weighs_by_the_examples_of_any_batch():
    large = double(TORCH, [75, 100, 125])
    small = double(TORCH, UNEVEN, cbs=[AccumulateCB(3)], kind=DictLearner)
    small.dls = [{'id': 'any', 'y': y, 'x': x} for x, y in small.dls[0]], None
    for learn in small, large: learn.fit(2, progress=False)
    assert_close(weights(small), weights(large), rtol=1e-7, atol=1e-9)


@engines
@pytest.mark.parametrize('at', [(1, 0), (2, 2), (2, 3), (2, 11), (2, 'end')], ids=str)
def test_a_group_is_resumed(layers, at):
    resumed(lambda: learner(layers, [AccumulateCB(5), GradClipCB(1.)], momentum), at)


@engines
def test_the_group_of_a_cancelled_epoch_is_dropped(layers):
    class Leave(Callback):
        order = 99
        def after_batch(self, learn):
            if learn.epoch == 1 and learn.batch_idx == 0: raise CancelEpoch
    left, fresh = double(layers, 100, cbs=[AccumulateCB(2), Leave()]), double(layers, 100, cbs=[AccumulateCB(2)])
    left.fit(2, progress=False)
    fresh.fit(1, progress=False)
    same(weights(left), weights(fresh))


class Branches(nn.Module):
    "Uses its second weight only for inputs larger than 1"
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(tensor([[1.]])) for _ in range(2))
    def forward(self, x): return x*self.a + (x*self.b if x.max() > 1 else 0)


@pytest.mark.parametrize('order', [(1., 2.), (2., 1.)])
def test_a_weight_without_a_gradient_in_one_batch_of_a_group(order):
    batches = [(torch.full((2, 1), v),)*2 for v in order]
    learn = Learner(Branches(), (batches, None), nn.MSELoss(), lr=1., cbs=[AccumulateCB(2)])
    learn.fit(1, progress=False)
    # input 1 gives 2·(a - 1)·1 = 0 for a, and nothing for b; input 2 gives 2·(2a + 2b - 2)·2 = 8 for both; the mean is half the sum
    assert [p.item() for p in learn.model.parameters()] == [1 - 4., 1 - 4.]


@pytest.mark.parametrize('wrong, error', [(0, ValueError), (-1, ValueError), (2., TypeError)])
def test_a_group_has_a_whole_number_of_batches(wrong, error):
    with pytest.raises(error): AccumulateCB(wrong)


class Inf(Callback):
    "Makes a gradient infinite in one batch, before other callbacks see it"
    order = -60
    def __init__(self, at): self.at = at
    def after_backward(self, learn):
        if learn.training and learn.batch_idx == self.at: next(learn.model.parameters()).grad.fill_(torch.inf)


def test_a_group_whose_step_is_skipped_counts_for_nothing():
    "Batches 0, 1 | 2, 3 | 4, 5: the second group overflows, so the weights are those of the first and the third"
    def make(cbs, sizes): # weights and inputs that float16 holds exactly do not matter: both runs round alike
        learn = double(TORCH, sizes, cbs=[MixedPrecisionCB(torch.float16), *cbs])
        learn.model.float()
        learn.dls = [(x.float(), y) for x, y in learn.dls[0]], None
        return learn
    groups, plain = make([AccumulateCB(2), Inf(2)], 50), make([AccumulateCB(2)], 50)
    plain.dls = [b for i, b in enumerate(plain.dls[0]) if i not in (2, 3)], None
    for learn in groups, plain: learn.fit(1, progress=False)
    assert groups.steps == plain.steps == 2
    assert_close(weights(groups), weights(plain), rtol=1e-3, atol=1e-4)   # another loss scale rounds differently
    assert groups.cbs[1].state_dict()['count'] == 0


# ---- early stopping

class Course(Learner):
    "Epochs whose validation losses are those of a list"
    course = [5., 4., 4.5, 3.875, 3.75, 4., 4., 4., 1.]
    def get_loss(self):
        super().get_loss()
        if not self.training: self.loss = self.loss*0 + self.course[self.epoch - 1]


@pytest.mark.parametrize('kwargs, best, last', [
    ({}, 5, 8), (dict(patience=1), 2, 3), (dict(patience=2), 5, 7), (dict(patience=1, min_delta=.125), 2, 3),
    (dict(patience=2, min_delta=.125), 2, 4), (dict(patience=2, min_delta=.12), 5, 7), (dict(patience=4), 9, 9),
    (dict(patience=2, mode='max'), 1, 3)], ids=str)
def test_the_epoch_at_which_a_fit_stops(kwargs, best, last):
    stop = EarlyStoppingCB(**kwargs)
    records = learner(cbs=[stop], kind=Course).fit(9, progress=False)
    assert [r['epoch'] for r in records] == [*range(1, last + 1)]
    assert [stop.best_epoch, stop.best] == [best, Course.course[best - 1]]


class After(Callback):
    "What later callbacks see at the end of a fit"
    order, calls = 1000, ()
    def after_epoch(self, learn): self.calls = *self.calls, learn.epoch
    def after_fit(self, learn): self.calls, self.weights = (*self.calls, 'fit'), weights(learn)


@engines
@pytest.mark.parametrize('ema', [False, True])
def test_the_best_weights_are_restored_before_later_callbacks_end_the_fit(layers, ema):
    averages = [EMACB(.9)]*ema
    learn = learner(layers, [*averages, stop := EarlyStoppingCB(restore_best=True), after := After()], kind=Course)
    learn.fit(9, progress=False)
    assert after.calls == (*range(1, 9), 'fit')                       # every epoch complete, `after_fit` once
    five = learner(layers, [EMACB(.9)]*ema, kind=Course)
    five.fit(5, progress=False)
    for got in weights(learn), after.weights, stop.weights: same(got, weights(five))
    assert_close(learn.predict(learn.dls[1]), five.predict(five.dls[1]), rtol=0, atol=0)


def test_an_evaluation_counts_nothing_and_restores_nothing():
    learn = learner(cbs=[stop := EarlyStoppingCB(restore_best=True)], kind=Course)
    learn.fit(9, progress=False)
    with torch.no_grad(): learn.model[0].weight.zero_()
    learn.course = [2.]*9
    learn.evaluate()
    assert not learn.model[0].weight.any() and stop.wait == 3
    learn.course = Course.course
    assert len(learn.fit(3, progress=False)) == 3 and [stop.best_epoch, stop.wait] == [2, 1] # a new fit counts anew


class Told(Callback):
    "Puts given numbers into the record"
    order = -1
    def __init__(self, *values): self.values = values
    def after_validate(self, learn): learn.record['valid_r'] = self.values[learn.epoch - 1]


@pytest.mark.parametrize('mode, values, best, last', [
    ('max', [math.nan]*12, None, 2), ('min', [math.nan]*12, None, 2), ('max', [math.nan, 2., 3., 4.], 4, 4),
    ('max', [2., math.nan, 3., math.nan, math.nan, 9.], 3, 5), ('min', [math.inf, 3., math.nan, math.inf, 1.], 2, 4),
    ('max', [-math.inf, -3., math.nan, 2.], 4, 4)], ids=str)
def test_nan_is_never_an_improvement(mode, values, best, last):
    stop = EarlyStoppingCB('valid_r', patience=2, mode=mode, restore_best=True)
    learn = learner(cbs=[Told(*values), stop])
    before = weights(learn)
    assert len(learn.fit(len(values), progress=False)) == last and stop.best_epoch == best
    if best is None: assert not torch.equal(weights(learn)[0], before[0])  # nothing to restore: the last weights


def test_what_is_watched():
    learn = learner(cbs=[EarlyStoppingCB('train_loss', patience=1, min_delta=10, restore_best=True)])
    learn.dls = learn.dls[0], None
    assert len(learn.fit(5, progress=False)) == 2                     # works without validation
    with pytest.raises(KeyError, match='the record has no valid_accuracy, only epoch, train_loss, valid_loss'):
        learner(cbs=[EarlyStoppingCB('valid_accuracy')]).fit(1, progress=False)
    assert [EarlyStoppingCB(k).sign for k in ('valid_accuracy', 'train_loss', 'accuracy')] == [-1, 1, -1]
    for wrong, text in ((dict(monitor='valid_f1'), "'min' if a smaller valid_f1 is better"), (dict(mode='up'), "mode is 'up'"),
                        (dict(patience=0), 'patience is 0'), (dict(min_delta=-1.), 'min_delta -1.0')):
        with pytest.raises(ValueError, match=text): EarlyStoppingCB(**wrong)


def test_the_weights_that_were_evaluated_are_restored_without_validation():
    learn, one = (learner(cbs=[EMACB(.9), *cbs]) for cbs in ([EarlyStoppingCB('train_loss', 1, min_delta=10., restore_best=True)], []))
    for l, epochs in (learn, 5), (one, 1):
        l.dls = l.dls[0], None
        l.fit(epochs, progress=False)
    assert learn.steps == 24
    same(weights(learn), weights(one))                                # the average at the end of the first epoch


@engines
def test_a_resumed_run_stops_where_it_would_have_stopped(layers):
    make = lambda: learner(layers, [EarlyStoppingCB('valid_loss', 2, min_delta=10., restore_best=True)])
    straight, other = resumed(make, epochs=9)
    save, stopped = Save((3, 'end')), make()
    with contextlib.suppress(Stop): make().fit(9, cbs=[save], progress=False)
    assert len(stopped.fit(9, cbs=[Load(save.saved)], progress=False)) == 3   # it had stopped, and stays so


# ---- averages of weights

class History(Callback):
    "The weights after each step, those that a validation uses, and those at the start of each epoch"
    order = 60
    def __init__(self): self.after, self.validated, self.begun = [], [], []
    def after_step(self, learn): self.after.append(weights(learn))
    def before_evaluate(self, learn): self.validated.append(weights(learn))
    def before_train(self, learn): self.begun.append(weights(learn))


def average(history, d):
    "The average by its definition, in float64"
    shares = d**torch.arange(len(history) - 1, -1, -1, dtype=torch.float64)
    return [sum(s*w.double() for s, w in zip(shares, ws))/shares.sum() for ws in zip(*history)]


@engines
@pytest.mark.parametrize('d', [.9, 0.])
def test_the_average_by_its_definition(layers, d):
    plain, learn = learner(layers), learner(layers, [EMACB(d), seen := History()])
    for l in plain, learn: l.fit(2, progress=False)
    same(seen.after[-1], weights(plain))                              # training is the same
    for epoch in 0, 1:
        want = average(seen.after[:12*(epoch + 1)], d)
        assert_close([t.double() for t in seen.validated[epoch]], want, rtol=1e-4, atol=1e-6)
    same(seen.begun[1], seen.after[11])                               # and continues with the same weights
    same(weights(learn), seen.validated[1])                           # after the fit the average is the model
    assert learn.evaluate()['loss'] == learn.records[-1]['valid_loss']
    if d == 0: same(weights(learn), seen.after[-1])


def loss_of(learn, preds): return learn.loss_func(preds, learn.dls[1].dataset.y).item()

@engines
def test_every_evaluation_sees_the_average(layers):
    class Looks(Callback):
        "`predict` in each event of a training batch, of a validation and of an epoch, and after the fit"
        order = 500
        def look(self, learn):
            now, expected = weights(learn), ema.averages if ema.steps else weights(learn)
            with learn.evaluating(): same(weights(learn), [a.clone() for a in expected])
            got = learn.predict(learn.dls[1])
            same(weights(learn), now)
            with learn.evaluating(): assert_close(got, learn.predict(learn.dls[1].dataset.x), rtol=0, atol=0) # nested
            return loss_of(learn, got)
        before_train = after_step = before_validate = look
        def after_validate(self, learn): assert_close(self.look(learn), learn.record['valid_loss'])
        def after_epoch(self, learn): assert_close(self.look(learn), learn.record['valid_loss'])
        def after_fit(self, learn): assert_close(self.look(learn), learn.records[-1]['valid_loss'])
    learn, plain = learner(layers, [ema := EMACB(.9), Looks()]), learner(layers)
    for l in learn, plain: l.fit(2, progress=False)
    assert_close(loss_of(learn, learn.predict(learn.dls[1])), learn.records[-1]['valid_loss'])
    same(ema.state_dict()['training'], weights(plain))                # the looks changed nothing


@engines
def test_a_second_fit_continues_from_the_training_weights(layers):
    cbs = [ema := EMACB(.9)], [], [EMACB(.9)]
    learn, plain, straight = (learner(layers, c, momentum) for c in cbs)
    for epochs in 2, 1:
        learn.fit(epochs, progress=False)
        plain.fit(epochs, progress=False)
        learn.evaluate()
        same(ema.state_dict()['training'], weights(plain))
    assert ema.steps == 36
    straight.fit(3, progress=False)
    same(weights(learn), weights(straight))                           # two fits average as one does

    with torch.no_grad():                                             # other weights in between: they are trained
        for p in (*learn.model.parameters(), *plain.model.parameters()): p.fill_(.1)
    for l in learn, plain: l.fit(1, progress=False)
    same(ema.state_dict()['training'], weights(plain))
    assert ema.steps == 12                                            # and the average begins anew

    with torch.no_grad(): learn.model[0].bias[0] += 1.                # one changed number is enough
    plain.model.load_state_dict(learn.model.state_dict())
    for l in learn, plain: l.fit(1, progress=False)
    same(ema.state_dict()['training'], weights(plain))

    learn.fit(0, progress=False)                                      # no step, nothing changes
    same(ema.state_dict()['training'], weights(plain))
    for loaded in False, True:
        if loaded: ema.load_state_dict(ema.state_dict())              # loaded weights are for the next fit that trains
        learn.fit(1, train=False, progress=False)
        learn.fit(1, progress=False)
        plain.fit(1, progress=False)
        same(ema.state_dict()['training'], weights(plain))


def test_a_fit_without_a_step_keeps_no_weights():
    class No(Callback):
        def before_step(self, learn): raise CancelStep
    learn = learner(cbs=[ema := EMACB(.9)])
    learn.fit(1, cbs=[No()], progress=False)
    with torch.no_grad(): learn.model[0].weight.zero_()
    learn.fit(1, cbs=[No()], progress=False)
    assert ema.steps == 0 and not learn.model[0].weight.any()
    assert EMACB().decay == .99 and learner(cbs=[EMACB(.9)]).evaluate() == learner().evaluate()


@engines
def test_an_error_in_a_validation_puts_the_training_weights_back(layers):
    class Fail(Callback):
        order = 99
        def after_forward(self, learn):
            if not learn.training and learn.batch_idx == 2: raise Stop
    learn = learner(layers, [EMACB(.9), seen := History()])
    with pytest.raises(Stop): learn.fit(1, cbs=[Fail()], progress=False)
    same(weights(learn), seen.after[-1])


@engines
@pytest.mark.parametrize('at', [(1, 0), (2, 4), (2, 11), (2, 'end'), (3, 'end')], ids=str)
def test_a_checkpoint_that_holds_the_average_resumes_bit_for_bit(layers, at):
    make = lambda: learner(layers, [EMACB(.9), EarlyStoppingCB(restore_best=True)], momentum)
    resumed(make, at)
    save = Save(at)
    with contextlib.suppress(Stop): make().fit(3, cbs=[save], progress=False)
    model, _, *_, ema, _ = torch.load(io.BytesIO(save.saved), weights_only=True)
    same([*model.values()], ema['averages'])                          # the weights file is what evaluation sees


def test_states_are_copies():
    mine, given = EMACB(.5), {'steps': 1, 'averages': [torch.zeros(1, 2), torch.zeros(1)], 'training': None}
    mine.load_state_dict(given)
    handed, run = mine.state_dict(), SimpleNamespace(model=nn.Linear(2, 1), will_train=True)
    mine.before_fit(run)
    mine.before_epoch(run)
    mine.after_step(run)
    assert not any(a.any() for state in (given, handed) for a in state['averages']) and mine.averages[0].all()
    there = EMACB(.5)
    there.load_state_dict(given)
    run.model = nn.Linear(2, 1, device='meta')
    there.before_fit(run)
    there.before_epoch(run)
    assert [a.device.type for a in there.averages] == ['meta']*2      # averages move to the model's device
    there.load_state_dict(given)
    run.model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    with pytest.raises(ValueError, match='longer'): there.before_epoch(run) # another model
    with pytest.raises(ValueError): there.put(nn.Sequential())
    for wrong in -.1, 1., math.nan:
        with pytest.raises(ValueError, match='must be 0 to below 1'): EMACB(wrong)


class Buffers(nn.Module):
    "A net with buffers of several kinds, an infinite one among them, and a frozen parameter"
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.frozen = nn.BatchNorm1d(5), nn.Linear(5, 3), nn.Parameter(torch.randn(3), requires_grad=False)
        self.mask, self.on = nn.Buffer(tensor([0., -torch.inf, 0.])), nn.Buffer(tensor([True, False]))
    def forward(self, x): return self.linear(self.norm(x)) + self.frozen + self.mask.clamp(min=-1.)


def test_buffers_and_frozen_parameters():
    base = learner(lr=.05)
    learn = Learner(Buffers(), base.dls, nn.CrossEntropyLoss(), lr=.1, cbs=[ema := EMACB(.9), seen := History()])
    frozen = learn.model.frozen.clone()
    learn.fit(2, progress=False)
    names = [name for name, _ in (*learn.model.named_parameters(), *learn.model.named_buffers())]
    got, at = dict(zip(names, ema.averages, strict=True)), list(learn.model.state_dict())
    same(got['frozen'], frozen)
    same(got['mask'], tensor([0., -torch.inf, 0.]))
    same([got['on'], got['norm.num_batches_tracked']], [tensor([True, False]), tensor(24)])
    for name in 'norm.running_mean', 'norm.running_var', 'linear.weight':
        want, = average([[ws[at.index(name)]] for ws in seen.after], .9)
        assert_close(got[name].double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_the_average_of_16_bit_weights_is_kept_in_32_bits(dtype):
    exact, d = None, .999
    class Exact(Callback):
        "The average in float64"
        def after_step(self, learn):
            nonlocal exact
            now = [p.detach().double() for p in learn.model.parameters()]
            exact = [a.lerp(w, (1 - d)/(1 - d**ema.steps)) for a, w in zip(exact or now, now)]
    learn = learner(lr=.1, n=400, cbs=[ema := EMACB(d), Exact()])
    learn.model.to(dtype)
    learn.dls = [(x.to(dtype), y) for x, y in learn.dls[0]], None
    learn.fit(6, progress=False)
    assert [a.dtype for a in ema.averages] == [torch.float64 if dtype == torch.float64 else torch.float32]*4
    for a, e in zip(ema.averages, exact): assert (a.double() - e).norm() < 1e-4*e.norm()
    same(weights(learn), [e.to(dtype) for e in (a.clone() for a in ema.averages)]) # rounded once, into the model
    learn.fit(1, progress=False)                                      # rounding is no change of the model's weights
    assert ema.steps == 7*50


# ---- mixed precision

@engines
@pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.float16])
def test_mixed_precision_is_autocast_by_hand(layers, dtype):
    kind = dtype or torch.bfloat16
    learn, hand = learner(layers, [MixedPrecisionCB(dtype)]), learner(layers)
    learn.fit(2, progress=False)
    opt, scaler = hand.create_opt(), torch.amp.GradScaler('cpu', enabled=kind == torch.float16)
    for _ in range(2):
        for xb, yb in hand.dls[0]:
            with torch.autocast('cpu', kind): loss = hand.loss_func(hand.model(xb), yb)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    if default_device().type == 'cpu': same(weights(learn), weights(hand))
    assert not torch.is_autocast_enabled('cpu')


def test_no_step_that_overflowed_counts_anywhere():
    torch.manual_seed(0)
    x, y, net = torch.randn(33, 6)*3000, torch.randint(0, 3, (33,)), nn.Linear(6, 3)
    class Steps(Callback):
        count = 0
        def after_step(self, learn): self.count += 1
    start, cbs = net.weight.detach().clone(), [MixedPrecisionCB(torch.float16), ema := EMACB(.9), seen := Steps(), AccumulateCB(1)]
    learn = Learner(net, (DataLoader(Dataset(x, y), 11), None), nn.CrossEntropyLoss(), lr=.1, cbs=cbs)
    learn.fit(2, progress=False)
    same(net.weight.detach(), start)
    assert [learn.steps, ema.steps, seen.count] == [0, 0, 0] and cbs[0].scaler.get_scale() == 2.**(16 - 6)
    assert all(p.grad is None for p in net.parameters())


def test_clipping_and_the_guard_see_unscaled_gradients():
    class Overflow(Callback):
        order = -60
        def after_backward(self, learn):
            if learn.training and learn.batch_idx == 3: next(learn.model.parameters()).grad[0, 0] = torch.inf
    half, plain = (GradClipCB(1e9) for _ in range(2))
    learn, truth = learner(cbs=[amp := MixedPrecisionCB(torch.float16), half, NaNGuardCB(), Overflow()]), learner(cbs=[plain])
    for l in learn, truth: l.fit(2, progress=False)
    assert learn.steps == 22 and amp.scaler.get_scale() == 2.**(16 - 2)
    assert .5 < (half.norm/plain.norm).item() < 2
    scaler = amp.scaler
    learn.fit(1, progress=False)
    assert amp.scaler is scaler                                       # the next fit keeps the scaler


def test_the_state_of_the_scaler():
    resumed(lambda: learner(cbs=[MixedPrecisionCB(torch.float16), AccumulateCB(5), EMACB(.9)]))
    learn, state = learner(cbs=[half := MixedPrecisionCB(torch.float16)]), torch.amp.GradScaler('cpu').state_dict()
    half.load_state_dict({**state, 'scale': 8., 'growth_interval': 10, '_growth_tracker': 8})
    assert half.state_dict()['scale'] == 8.
    learn.fit(1, progress=False)
    assert [half.state_dict()[k] for k in ('scale', '_growth_tracker')] == [32., 0] # 12 steps: doubled after 2, and after 10 more
    assert MixedPrecisionCB().state_dict() == {}


def test_an_error_leaves_no_autocast():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
        def forward(self, x): raise Stop
    learn = Learner(Broken(), learner().dls, nn.CrossEntropyLoss(), lr=.1, cbs=[MixedPrecisionCB(torch.bfloat16)])
    with pytest.raises(Stop): learn.fit(1, progress=False)
    assert not torch.is_autocast_enabled('cpu')
    learn = learner(cbs=[MixedPrecisionCB(torch.bfloat16)])
    assert learn.predict(torch.randn(2, 5)).dtype == torch.float32    # without a fit no callback is called
    learn.fit(1, progress=False)


# ---- the first NaN

class Sqrt(nn.Module):
    "At 0 its value is 0, and its gradient infinite"
    def forward(self, x): return x.sqrt()

class OurSqrt(Module):
    def forward(self, x): return x.sqrt()
    def bwd(self, grad, out, x): return grad/(2*out)

class Log(nn.Module):
    def forward(self, x): return x.log()

class OurLog(Module):
    def forward(self, x): return x.log()
    def bwd(self, grad, out, x): return grad/x


def guarded(layers, *parts, lr=.1, spoil=None, cbs=(), valid=None, kind=Learner, wrap=lambda x: x):
    "The message of a run with the guard"
    torch.manual_seed(3)
    x, y = torch.rand(96, 5), torch.randint(3, (96,))
    if spoil: x[70, 4] = spoil
    batches = [(wrap(xb), yb) for xb, yb in zip(x.split(32), y.split(32))]
    learn = kind(layers[0](*parts), (batches, valid), layers[3](), SGD, lr, [NaNGuardCB(), *cbs])
    try: learn.fit(1, progress=False)
    except FloatingPointError as e: text = f'{e} {e.__notes__[0]}'
    else: text = 'no alarm'
    assert hooks_of(learn.model) == hooks_of(layers[0](*parts))
    return text


def first(found, what, fine, counts=''):
    start, end = f'NaNGuardCB: {what}: {counts}', f'; the last finite one before it: {fine} in epoch 1, '
    assert found.startswith(start) and 'numbers are not finite, the first at [' in found and end in found, found


@engines
def test_the_first_nan_is_found(layers):
    _, L, R, _ = layers
    root, logarithm = (OurSqrt, OurLog) if layers is OURS else (Sqrt, Log)
    assert guarded(layers, L(5, 6), R(), L(6, 3)) == 'no alarm'
    found = guarded(layers, L(5, 6), R(), L(6, 3), spoil=torch.nan)
    first(found, 'inputs', 'none', '1 of 160 numbers are not finite, the first at [6, 4]')
    assert found.endswith('training batch 2 (counted from 0)')
    first(guarded(layers, L(5, 6), R(), logarithm(), L(6, 3)), f'the output of 2 ({logarithm.__name__})', 'the output of 1 (ReLU)')
    zero, huge, steep = L(5, 6), L(6, 3), L(6, 3)
    with torch.no_grad():
        for p in zero.parameters(): p.zero_()
        huge.weight.fill_(3e38)
        steep.weight.mul_(-1e6)
    found = guarded(layers, zero, root(), L(6, 3))                   # the gradient of the root at 0
    first(found, 'the gradient at the output of 0 (Linear)', f'the gradient at the output of 1 ({root.__name__})')
    first(guarded(layers, L(5, 6), R(), huge), 'the output of 2 (Linear)', 'the output of 1 (ReLU)')
    class Overflow(Callback):
        "A step that was far too large"
        def after_step(self, learn): next(learn.model.parameters()).data.mul_(1e38).mul_(1e38)
    found = guarded(layers, L(5, 6), R(), L(6, 3), cbs=[Overflow()])  # found one batch later
    first(found, '0.weight', 'inputs')
    assert found.endswith('training batch 1 (counted from 0)')
    blind = L(5, 6)
    with torch.no_grad(): blind.weight[:, 4] = 0.                     # a column of zeros has a gradient, too
    found = guarded(layers, blind, R(), steep, spoil=1e36, lr=1e-20)
    assert found.startswith('NaNGuardCB: the gradient of 0.weight: '), found
    bad_valid = DataLoader(Dataset(torch.full((40, 5), torch.nan), torch.zeros(40).long()), 20)
    found = guarded(layers, L(5, 6), R(), L(6, 3), valid=bad_valid)
    first(found, 'inputs', 'none', '100 of 100')
    assert found.endswith('in epoch 1, validation batch 0 (counted from 0)')


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
    def forward(self, a, more): return self.linear(a) + more['list'][1][0].sum()


def one(module, *rest): return module # in the place of `Sequential`

def test_inputs_in_any_nesting_are_looked_at():
    Pair, ones = namedtuple('Pair', 'one two'), torch.ones(2)
    wrap = lambda x: {'a': torch.zeros(32, 5), 'more': {'id': 'text', 'list': [ones, Pair(x, None)]}}
    found = guarded((one, *TORCH[1:]), Nested(), spoil=torch.nan, wrap=wrap)
    first(found, "inputs['more']['list'][1][0]", "inputs['more']['list'][0]")
    found = guarded((one, *TORCH[1:]), nn.Bilinear(5, 5, 3), spoil=torch.nan, wrap=lambda x: (x*0 + 1, torch.ones(32, 5)))
    first(found, 'inputs[0]', 'none')
    found = guarded((nn.Sequential, 0, 0, nn.MSELoss), nn.Linear(5, 5), spoil=torch.nan, kind=Swapped)
    first(found, 'targets', 'inputs')


class Swapped(Learner):
    "The first part of a batch is the target"
    def inputs(self): return torch.ones(len(self.batch[0]), 5)
    def targets(self): return self.batch[0]


def test_a_healthy_run_is_not_searched():
    class NoTrial(Learner):
        def trial(self): raise Stop
    for cbs in [], [MixedPrecisionCB(torch.float16)]: learner(cbs=[NaNGuardCB(), *cbs], kind=NoTrial).fit(2, progress=False)


def test_a_false_alarm_changes_nothing():
    class FalseAlarm(Callback):
        "Finite gradients whose sum is not finite"
        order = -31
        def after_backward(self, learn):
            for p in learn.model.parameters(): p.grad = torch.full_like(p, 3e38)
            self.kept = [learn.loss, learn.preds, learn.batch, *(p.grad for p in learn.model.parameters())]
            self.was = weights(learn), random_state(learn.dls)
        def before_step(self, learn):
            now = [learn.loss, learn.preds, learn.batch, *(p.grad for p in learn.model.parameters())]
            assert all(a is b for a, b in zip(now, self.kept, strict=True))
            assert all((p.grad == 3e38).all() for p in learn.model.parameters())
            same((weights(learn), random_state(learn.dls)), self.was)
            for p in learn.model.parameters(): p.grad = None
    parts = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(.5), nn.Linear(6, 3)
    assert guarded(TORCH, *parts, cbs=[FalseAlarm()]) == 'no alarm'


@pytest.mark.parametrize('cbs', [[], [AccumulateCB(2)], [EMACB(.9)]], ids=str)
def test_an_overflow_of_16_bits_is_found_in_16_bits(cbs):
    big = nn.Linear(5, 6)
    with torch.no_grad(): big.weight.fill_(5e4)
    found = guarded(TORCH, big, nn.ReLU(), nn.Linear(6, 3), cbs=[MixedPrecisionCB(torch.float16), *cbs])
    first(found, 'the output of 0 (Linear)', '2.bias')


def test_the_guard_leaves_gradients_to_the_scaler():
    assert len(learner(cbs=[MixedPrecisionCB(torch.float16), Inf(2), NaNGuardCB()]).fit(1, progress=False)) == 1
    with pytest.raises(RuntimeError, match='fit is running'): # an unrelated error is reported as it is
        class Again(Callback):
            def after_step(self, learn): learn.fit(1)
        learner(cbs=[NaNGuardCB(), Again()]).fit(1, progress=False)


def test_an_early_end_by_a_callback_ends_averages_and_stopping_in_order():
    class Enough(Callback):
        def after_batch(self, learn):
            if learn.epoch == 3: raise CancelFit
    learn = learner(cbs=[EMACB(.9), EarlyStoppingCB(restore_best=True), Enough(), after := After()])
    learn.fit(5, progress=False)
    assert after.calls == (1, 2, 'fit')
    same(after.weights, weights(learn))
    assert_close(loss_of(learn, learn.predict(learn.dls[1])), min(r['valid_loss'] for r in learn.records))

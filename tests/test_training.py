"Training: what does not belong in a chapter. Each refusal has a test of its own; processes, signals and terminals are real."
import os
import pickle
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, Module, ReLU, Sequential
from miniai.training import SGD, BatchSampler, DataLoader, Dataset, accuracy, evaluate, fit, get_dls, report

root = Path(__file__).resolve().parents[1]


def rows(n=40, c=3, seed=0, dtype=torch.float32):
    "Rows of 5 numbers in `c` classes that a line can tell apart"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(c, (n,), generator=g)
    return Dataset(torch.randn(n, 5, generator=g, dtype=dtype) + 3*F.one_hot(y, 5), y)


def line(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(5, 3, dtype=dtype)


def train(epochs=1, model=None, loss=F.cross_entropy, opt=None, train_dl=None, valid_dl=None, **kwargs):
    model = model or line()
    ds = rows()
    return fit(epochs, model, loss, opt or SGD(model.parameters(), lr=.1), DataLoader(ds, 8) if train_dl is None else train_dl,
               DataLoader(ds, 16) if valid_dl is None else valid_dl, **{'progress': False, **kwargs})


def spoilt(value, batch=2):
    "Four batches, `value` in one of them"
    batches = list(DataLoader(rows(16), 4))
    batches[batch][0][1, 3] = value
    return batches


# ---- refusals, one a test

scores, labels = torch.tensor([[.1, 2., 0.], [3., 0., 1.]]), torch.tensor([1, 0])
weight = torch.ones(2, requires_grad=True)
heavy = torch.optim.SGD([weight], lr=.1, momentum=.9).state_dict()
refusals = {
    'accuracy_column': (ValueError, r'labels \(2, 1\), needs \(n,c\) and \(n,\)', lambda: accuracy(scores, labels[:, None])),
    'accuracy_scores_flat': (ValueError, r'scores \(2,\)', lambda: accuracy(scores[:, 0], labels)),
    'accuracy_lengths': (ValueError, r'scores \(1, 3\) and labels \(2,\)', lambda: accuracy(scores[:1], labels)),
    'accuracy_empty': (ValueError, 'n at least 1', lambda: accuracy(scores[:0], labels[:0])),
    'accuracy_float_labels': (ValueError, 'torch.float32, needs integers', lambda: accuracy(scores, labels.float())),
    'accuracy_label_too_large': (ValueError, 'run from 2 to 3, but 3 columns', lambda: accuracy(scores, labels + 2)),
    'accuracy_label_negative': (ValueError, 'run from -1 to 0', lambda: accuracy(scores, labels - 1)),
    'accuracy_nan': (ValueError, 'NaN, first in row 1', lambda: accuracy(scores.masked_fill(scores == 3, torch.nan), labels)),
    'report_column': (ValueError, r'labels \(2, 1\)', lambda: report(1., scores, labels[:, None])),
    'dataset_lengths': (ValueError, 'x has 2 rows and y has 1', lambda: Dataset(scores, labels[:1])),
    'dataset_int_too_far': (IndexError, 'out of range', lambda: Dataset(scores, labels)[2]),
    'dataset_int_too_negative': (IndexError, 'out of range', lambda: Dataset(scores, labels)[-3]),
    'dataset_row_too_far': (IndexError, 'rows 0 to 2 asked for, there are 0 to 1', lambda: Dataset(scores, labels)[[0, 2]]),
    'dataset_row_negative': (IndexError, 'rows -1 to -1', lambda: Dataset(scores, labels)[torch.tensor([-1])]),
    'dataset_mask': (TypeError, r'mask.nonzero\(\)', lambda: Dataset(scores, labels)[labels > 0]),
    'dataset_list_of_bools': (TypeError, 'torch.bool', lambda: Dataset(scores, labels)[[True, False]]),
    'dataset_float': (TypeError, 'needs integers', lambda: Dataset(scores, labels)[torch.tensor([0.])]),
    'dataset_table': (TypeError, r'index \(1, 2\)', lambda: Dataset(scores, labels)[torch.tensor([[0, 1]])]),
    'sampler_zero': (ValueError, 'batch_size is 0', lambda: BatchSampler(labels, 0)),
    'sampler_none': (ValueError, 'batch_size is None', lambda: BatchSampler(labels, None)),
    'loader_zero': (ValueError, 'batch_size is 0', lambda: DataLoader(rows(), 0)),
    'loader_twice_size': (ValueError, 'leave out batch_size', lambda: DataLoader(rows(), 2, batch_sampler=[])),
    'loader_twice_shuffle': (ValueError, 'leave out', lambda: DataLoader(rows(), shuffle=True, batch_sampler=[])),
    'loader_twice_drop': (ValueError, 'leave out', lambda: DataLoader(rows(), drop_last=True, batch_sampler=[])),
    'loader_twice_generator': (ValueError, 'leave out', lambda: DataLoader(rows(), generator=torch.Generator(), batch_sampler=[])),
    'loader_unknown_word': (TypeError, 'num_workers', lambda: DataLoader(rows(), num_workers=2)),
    'loader_fourth_position': (TypeError, 'positional', lambda: DataLoader(rows(), 2, False, None)),
    'sgd_empty': (ValueError, 'of 0 parameters none requires a gradient', lambda: SGD([], lr=.1)),
    'sgd_empty_model': (ValueError, 'of 0 parameters', lambda: SGD(nn.ReLU().parameters(), lr=.1)),
    'sgd_frozen': (ValueError, 'of 1 parameters none requires a gradient', lambda: SGD([torch.ones(2)], lr=.1)),
    'sgd_one_tensor': (TypeError, 'put it into a list', lambda: SGD(weight, lr=.1)),
    'sgd_named': (TypeError, 'holds a tuple', lambda: SGD(line().named_parameters(), lr=.1)),
    'sgd_mixed': (TypeError, 'holds a dict', lambda: SGD([weight, {'params': []}], lr=.1)),
    'sgd_computed': (ValueError, 'computed from others', lambda: SGD([weight*2], lr=.1)),
    'sgd_twice_in_a_group': (ValueError, 'given twice', lambda: SGD([weight, weight], lr=.1)),
    'sgd_twice_in_groups': (ValueError, 'given twice', lambda: SGD([{'params': weight}, {'params': weight}], lr=.1)),
    'sgd_no_lr': (TypeError, 'lr', lambda: SGD([weight])),
    'sgd_negative_lr': (ValueError, 'lr is -1, needs 0 or more', lambda: SGD([weight], lr=-1)),
    'sgd_nan_lr': (ValueError, 'lr is nan', lambda: SGD([weight], lr=float('nan'))),
    'sgd_group_lr': (ValueError, 'lr is -1', lambda: SGD([{'params': weight, 'lr': -1}], lr=.1)),
    'sgd_unknown_word': (TypeError, 'momentum', lambda: SGD([weight], lr=.1, momentum=.9)),
    'sgd_group_momentum': (ValueError, 'momentum is 0.9', lambda: SGD([{'params': weight, 'momentum': .9}], lr=.1)),
    'sgd_group_differentiable': (ValueError, 'differentiable is True', lambda: SGD([{'params': weight, 'differentiable': True}], lr=.1)),
    'sgd_load_momentum': (ValueError, 'momentum is 0.9', lambda: SGD([weight], lr=.1).load_state_dict(heavy)),
    'sgd_load_groups': (ValueError, r'groups of \[1\], this optimiser has groups of \[2\]|groups of \[1\] parameters',
                        lambda: SGD(line().parameters(), lr=.1).load_state_dict(SGD([weight], lr=.1).state_dict())),
    'evaluate_empty': (ValueError, 'gave no batch', lambda: evaluate(line(), F.cross_entropy, [])),
    'evaluate_sum': (ValueError, "reduction='sum'", lambda: evaluate(line(), nn.CrossEntropyLoss(reduction='sum'), spoilt(0.))),
    'evaluate_our_sum': (ValueError, "reduction='sum'", lambda: evaluate(line(), CrossEntropyLoss(reduction='sum'), spoilt(0.))),
    'evaluate_none': (ValueError, "reduction='none'", lambda: evaluate(line(), nn.CrossEntropyLoss(reduction='none'), spoilt(0.))),
    'evaluate_nan': (FloatingPointError, r'nan at batch 2 \(counted', lambda: evaluate(line(), F.cross_entropy, spoilt(torch.nan))),
    'evaluate_inf': (FloatingPointError, 'is inf at batch 1', lambda: evaluate(line(), lambda o, y: o.abs().max(), spoilt(torch.inf, 1))),
    'fit_negative': (ValueError, 'epochs is -3, needs 0 or more', lambda: train(-3)),
    'fit_half_an_epoch': (TypeError, 'float', lambda: train(1.5)),
    'fit_frozen': (ValueError, 'no parameter of the model', lambda: train(model=line().requires_grad_(False), opt=SGD([weight], lr=.1))),
    'fit_no_parameters': (ValueError, 'no parameter of the model', lambda: train(model=nn.ReLU(), opt=SGD([weight], lr=.1))),
    'fit_other_optimiser': (ValueError, 'none of the 2 parameters of the optimiser', lambda: train(opt=SGD(line().parameters(), lr=.1))),
    'fit_other_torch_optimiser': (ValueError, 'none of the 2', lambda: train(opt=torch.optim.Adam(line().parameters()))),
    'fit_empty_train': (ValueError, 'train_dl has no batch', lambda: train(train_dl=[])),
    'fit_empty_valid': (ValueError, 'valid_dl has no batch', lambda: train(valid_dl=[])),
    'fit_spent_generator': (ValueError, 'no batch in epoch 2', lambda: train(2, train_dl=iter(spoilt(0.)))),
    'fit_spent_validation': (ValueError, 'evaluate: the loader gave no batch', lambda: train(2, valid_dl=iter(spoilt(0.)))),
    'fit_sum': (ValueError, "reduction='sum'", lambda: train(loss=CrossEntropyLoss(reduction='sum'))),
    'fit_nan': (FloatingPointError, r'nan in epoch 1 at batch 2 \(counted from 0\)', lambda: train(train_dl=spoilt(torch.nan))),
    'fit_nan_in_validation': (FloatingPointError, 'evaluate: the loss is nan at batch 2', lambda: train(valid_dl=spoilt(torch.nan))),
    'fit_column_of_labels': (ValueError, 'target must be of shape',
                             lambda: train(loss=CrossEntropyLoss(), train_dl=[(torch.ones(4, 5), torch.ones(4, 1).long())])),
}


@pytest.mark.parametrize('name', refusals)
def test_refused(name):
    error, words, func = refusals[name]
    with pytest.raises(error, match=words): func()


def test_loss_becomes_infinite_in_a_later_epoch():
    batches, calls = spoilt(0.), []
    def loss(out, yb):
        calls.append(1)
        return F.cross_entropy(out, yb)*(torch.inf if len(calls) == 4 + 4 + 3 else 1)
    with pytest.raises(FloatingPointError, match='became inf in epoch 2 at batch 2'):
        train(2, loss=loss, train_dl=batches, valid_dl=batches)


# ---- long runs and other people's parts

def test_a_thousand_epochs():
    model, ds = line(torch.float64), rows(30, dtype=torch.float64)
    records = fit(1000, model, F.cross_entropy, SGD(model.parameters(), lr=.5), DataLoader(ds, 30), DataLoader(ds, 7), progress=False)
    assert [r.epoch for r in records] == list(range(1, 1001))
    assert all(b.train_loss < a.train_loss for a, b in zip(records, records[1:])), 'whole-batch steps of a convex loss only go down'
    assert records[-1].valid_accuracy == 1
    # the loss met in epoch k is the validation loss after epoch k-1
    assert_close([r.train_loss for r in records[1:]], [r.valid_loss for r in records[:-1]], rtol=1e-10, atol=0)


@pytest.mark.parametrize('make', [SGD, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW], ids=['ours', 'SGD', 'Adam', 'AdamW'])
def test_both_engines_through_every_optimiser(make):
    results = []
    for layers, loss in ((nn.Sequential, nn.Linear, nn.ReLU), nn.CrossEntropyLoss()), ((Sequential, Linear, ReLU), CrossEntropyLoss()):
        torch.manual_seed(3)
        net = layers[0](layers[1](5, 7, dtype=torch.float64), layers[2](), layers[1](7, 3, dtype=torch.float64))
        ds = rows(dtype=torch.float64)
        dls = get_dls(ds, rows(15, seed=1, dtype=torch.float64), 8, torch.Generator().manual_seed(0))
        records = fit(20, net, loss, make(net.parameters(), lr=.05), *dls, progress=False)
        results.append(([r[:4] for r in records], [p.detach() for p in net.parameters()]))
    assert_close(*results, rtol=0, atol=1e-10)


def test_sgd_is_the_twin_for_a_thousand_steps():
    ends = []
    for kind in SGD, torch.optim.SGD:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        opt = kind([{'params': net[0].parameters(), 'lr': .3}, {'params': list(net[2].parameters())}], lr=.01)
        ds = rows(dtype=torch.float64)
        for k in range(1000):
            F.cross_entropy(net(ds.x), ds.y).backward()
            if k == 500: opt.param_groups[0]['lr'] = .1
            opt.step()
            opt.zero_grad()
        ends.append(([p.detach() for p in net.parameters()], opt.state_dict()))
    assert_close(ends[0][0], ends[1][0], rtol=1e-13, atol=1e-13)
    assert ends[0][1] == ends[1][1]


def test_a_state_keeps_words_of_others():
    opt, twin = SGD([weight], lr=.1), torch.optim.SGD([weight], lr=.1)
    torch.optim.lr_scheduler.StepLR(twin, 2)
    opt.load_state_dict(twin.state_dict())
    assert opt.param_groups[0]['initial_lr'] == .1
    twin.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))


def test_records_can_be_pickled(): assert pickle.loads(pickle.dumps(r := train(2))) == r


def test_dataset_on_another_device_takes_indices_from_the_cpu():
    xb, yb = Dataset(torch.zeros(4, 2, device='meta'), torch.zeros(4, device='meta'))[torch.tensor([0, 3])]
    assert xb.device.type == yb.device.type == 'meta' and xb.shape == (2, 2)


@pytest.mark.parametrize('start', sorted({'spawn', torch.multiprocessing.get_context().get_start_method()}))
def test_workers_of_torch_deliver_our_batches(start):
    ds = rows(50)
    make = lambda: BatchSampler(ds, 8, shuffle=True, generator=torch.Generator().manual_seed(5))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # one core, or threads at the time of a fork
        theirs = torch.utils.data.DataLoader(ds, sampler=make(), batch_size=None, num_workers=2, multiprocessing_context=start)
        ours = DataLoader(ds, batch_sampler=make())
        for _ in range(2):
            got, want = [tuple(b) for b in theirs], list(ours)
            assert len(got) == len(want) == 7
            assert_close(got, want)
        model = line()
        assert len(fit(1, model, F.cross_entropy, SGD(model.parameters(), lr=.1), theirs, ours, progress=False)) == 1


# ---- own engine

def test_nothing_keeps_the_graph_alive():
    "The losses that `fit` collects must not hold on to the forward passes they came from"
    import gc
    import weakref
    alive, most = [], [0]
    class Watch(Module):
        def forward(self, x): return x*1
        def bwd(self, grad, out, x):
            alive.append(weakref.ref(out))
            return grad
    torch.manual_seed(0)
    net = Sequential(Linear(5, 3), Watch())
    ce = CrossEntropyLoss()
    def loss(out, yb):
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return ce(out, yb)
    gc.disable()
    try: train(3, model=net, loss=loss)
    finally: gc.enable()
    assert most[0] <= 2


# ---- Ctrl-C, terminals, imports

slow = """
import sys, time, torch, torch.nn.functional as F
from torch import nn
from miniai.training import SGD, DataLoader, Dataset, fit
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 3), nn.Dropout())
def loss(out, yb):
    time.sleep(.02)
    return F.cross_entropy(out, yb)
ds = Dataset(torch.randn(400, 5), torch.randint(3, (400,)))
opt, done = SGD(model.parameters(), lr=.1), []
print('ready', flush=True)
try: fit(int(sys.argv[1]), model, loss, opt, DataLoader(ds, 8), DataLoader(ds, 200), after_epoch=done.append)
except KeyboardInterrupt:
    assert all(p.isfinite().all() for p in model.parameters())
    model[1].train()
    more = fit(1, model, F.cross_entropy, opt, DataLoader(ds, 8), DataLoader(ds, 200), progress=False)
    print('interrupted, then', len(more), 'more epoch', flush=True)
    sys.exit(130)
print('finished', len(done), flush=True)
"""


def environment(): return {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}


def in_a_terminal(*args, interrupt=False):
    "Run `slow` with a terminal for stderr; its stdout, what the terminal showed, and the exit status"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))   # tqdm draws nothing on a terminal without columns
    p = subprocess.Popen([sys.executable, '-c', slow, *args], stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment(), cwd=root)
    os.close(theirs)
    shown = bytearray()
    def read():
        while True:
            try: some = os.read(ours, 4096)
            except OSError: return
            if not some: return
            shown.extend(some)
            if interrupt and re.search(rb'\b[1-4]\d/50', shown) and not sent: sent.append(p.send_signal(signal.SIGINT))
    sent = []
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    out, _ = p.communicate(timeout=120)
    thread.join(5)
    return out, shown.decode(), p.returncode


def test_ctrl_c_leaves_a_model_that_trains_on():
    out, shown, status = in_a_terminal('3', interrupt=True)
    assert status == 130, shown
    assert 'interrupted, then 1 more epoch' in out and 'Traceback' not in shown


def test_bar_in_a_terminal():
    out, shown, status = in_a_terminal('1')
    assert status == 0 and 'finished 1' in out, shown
    assert 'epoch 1' in shown and '/50' in shown, 'a terminal shows a bar'
    assert re.search(r'\r {40,}\r$', shown), f'and the bar is wiped out at the end: {shown[-200:]!r}'
    assert out.count('epoch 1: train loss') == 1


def test_no_bar_in_a_pipe():
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p = subprocess.run([sys.executable, '-c', slow, '1'], **pipes, text=True, env=environment(), cwd=root)
    assert p.returncode == 0 and p.stderr == '' and 'epoch 1: train loss' in p.stdout


def test_import_is_light():
    code = 'import sys, torch; before = set(sys.modules); import miniai.training; print(*sorted(set(sys.modules) - before))'
    p = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=environment(), cwd=root, check=True)
    assert p.stdout.split() == ['miniai', 'miniai.training'], 'nothing but itself on top of torch'

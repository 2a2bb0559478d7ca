"Training: what chapter 04 leaves out. Each error has a test of its own; processes, signals and terminals are real."
import functools
import itertools
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
import weakref
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, Module, ReLU, Sequential
from miniai.training import SGD, BatchSampler, DataLoader, Dataset, Record, accuracy, evaluate, fit, get_dls, report

root = Path(__file__).resolve().parents[1]


def examples(n=40, c=3, seed=0, dtype=torch.float32):
    "Examples of 5 numbers in `c` classes that a line can tell apart"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(c, (n,), generator=g)
    return Dataset(torch.randn(n, 5, generator=g, dtype=dtype) + 3*F.one_hot(y, 5), y)


def gen(seed): return torch.Generator().manual_seed(seed)


def line(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(5, 3, dtype=dtype)


def train(epochs=1, model=None, loss=F.cross_entropy, opt=None, train_dl=None, valid_dl=None, **kwargs):
    model = model or line()
    ds = examples()
    return fit(epochs, model, loss, opt or SGD(model.parameters(), lr=.1), DataLoader(ds, 8) if train_dl is None else train_dl,
               DataLoader(ds, 16) if valid_dl is None else valid_dl, **{'progress': False, **kwargs})


def spoilt(value, batch=2):
    "Four batches, `value` in one of them"
    batches = list(DataLoader(examples(16), 4))
    batches[batch][0][1, 3] = value
    return batches


class ListNet(nn.Module):
    "Layers in a plain list, which are not registered"
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(5, 3)]
    def forward(self, x): return self.layers[0](x)


# ---- errors, one a test

logits, labels = torch.tensor([[.1, 2., 0.], [3., 0., 1.]]), torch.tensor([1, 0])
weight = torch.ones(2, requires_grad=True)
heavy = torch.optim.SGD([weight], lr=.1, momentum=.9).state_dict()
uphill = torch.optim.SGD([weight], lr=.1, maximize=True).state_dict()
flat = lambda out, yb: torch.tensor(0.)
explode = lambda out, yb: (1e4*out).pow(4).mean()
summed = functools.partial(F.cross_entropy, reduction='sum')


def adam_state():
    w = torch.ones(2, requires_grad=True)
    w.grad, opt = torch.ones(2), torch.optim.Adam([w], lr=0)
    opt.step()
    return opt.state_dict()


def column(n=16, outs=(-1, 1), targets=(-1,), loss=F.mse_loss, bs=4, dtype=torch.float32):
    "Fit outputs and targets of these shapes (-1: the batch)"
    x = torch.randn(n, 1, generator=gen(0))
    y = x[:, 0].to(dtype)
    net = nn.Sequential(nn.Linear(1, 1), nn.Unflatten(1, outs[1:]) if len(outs) > 1 else nn.Flatten(0))
    dl = [(xb, yb.view(targets)) for xb, yb in DataLoader(Dataset(x, y), bs)]
    return fit(1, net, loss, SGD(net.parameters(), lr=.1), dl, dl, metric=flat, progress=False)


errors = {
    'accuracy_column': (ValueError, r'labels \(2, 1\), needs \(n,c\) and \(n,\)', lambda: accuracy(logits, labels[:, None])),
    'accuracy_logits_flat': (ValueError, r'logits \(2,\)', lambda: accuracy(logits[:, 0], labels)),
    'accuracy_lengths': (ValueError, r'logits \(1, 3\) and labels \(2,\)', lambda: accuracy(logits[:1], labels)),
    'accuracy_empty': (ValueError, 'n at least 1', lambda: accuracy(logits[:0], labels[:0])),
    'accuracy_float_labels': (ValueError, 'torch.float32, needs integers; use .long', lambda: accuracy(logits, labels.float())),
    'accuracy_label_too_large': (ValueError, 'from 2 to 3, needs 0 to 2', lambda: accuracy(logits, labels + 2)),
    'accuracy_label_negative': (ValueError, 'from -1 to 0, needs 0 to 2', lambda: accuracy(logits, labels - 1)),
    'accuracy_nan': (ValueError, 'logits are NaN', lambda: accuracy(logits.masked_fill(logits == 3, torch.nan), labels)),
    'report_column': (ValueError, r'labels \(2, 1\)', lambda: report(1., logits, labels[:, None])),
    'dataset_lengths': (ValueError, '2 inputs and 1 targets', lambda: Dataset(logits, labels[:1])),
    'dataset_int_too_far': (IndexError, 'out of bounds', lambda: Dataset(logits, labels)[2]),
    'dataset_int_too_negative': (IndexError, 'out of bounds', lambda: Dataset(logits, labels)[-3]),
    'dataset_index_too_far': (IndexError, 'out of range', lambda: Dataset(logits, labels)[[0, 2]]),
    'dataset_index_negative': (IndexError, 'out of range', lambda: Dataset(logits, labels)[torch.tensor([-1])]),
    'dataset_mask': (RuntimeError, 'dtype int32 or int64', lambda: Dataset(logits, labels)[labels > 0]),
    'dataset_list_of_bools': (RuntimeError, 'dtype int32 or int64', lambda: Dataset(logits, labels)[[True, False]]),
    'dataset_float': (RuntimeError, 'dtype int32 or int64', lambda: Dataset(logits, labels)[torch.tensor([0.])]),
    'dataset_list_of_floats': (RuntimeError, 'dtype int32 or int64', lambda: Dataset(logits, labels)[[0., 1.]]),
    'dataset_one_float': (TypeError, 'integer', lambda: Dataset(logits, labels)[1.]),
    'dataset_table': (IndexError, 'vector', lambda: Dataset(logits, labels)[torch.tensor([[0, 1]])]),
    'sampler_zero': (ValueError, 'batch_size is 0, needs 1 or more', lambda: BatchSampler(labels, 0)),
    'sampler_negative': (ValueError, 'batch_size is -1', lambda: BatchSampler(labels, -1)),
    'sampler_none': (TypeError, 'NoneType', lambda: BatchSampler(labels, None)),
    'sampler_float': (TypeError, 'float', lambda: BatchSampler(labels, 2.)),
    'loader_zero': (ValueError, 'batch_size is 0', lambda: DataLoader(examples(), 0)),
    'loader_twice_size': (ValueError, 'leave out batch_size', lambda: DataLoader(examples(), 2, batch_sampler=[])),
    'loader_twice_shuffle': (ValueError, 'leave out', lambda: DataLoader(examples(), shuffle=True, batch_sampler=[])),
    'loader_twice_drop': (ValueError, 'leave out', lambda: DataLoader(examples(), drop_last=True, batch_sampler=[])),
    'loader_twice_generator': (ValueError, 'leave out', lambda: DataLoader(examples(), generator=gen(0), batch_sampler=[])),
    'loader_unknown_argument': (TypeError, 'num_workers', lambda: DataLoader(examples(), num_workers=2)),
    'loader_fourth_position': (TypeError, 'positional', lambda: DataLoader(examples(), 2, False, None)),
    'get_dls_zero': (ValueError, 'batch_size is 0', lambda: get_dls(examples(), examples(), 0)),
    'get_dls_float': (TypeError, 'float', lambda: get_dls(examples(), examples(), 2.)),
    'sgd_empty': (ValueError, 'nothing requires grad', lambda: SGD([], lr=.1)),
    'sgd_empty_model': (ValueError, 'nothing requires grad', lambda: SGD(nn.ReLU().parameters(), lr=.1)),
    'sgd_frozen': (ValueError, 'nothing requires grad', lambda: SGD([torch.ones(2)], lr=.1)),
    'sgd_one_tensor': (ValueError, 'leaf tensors, in a list', lambda: SGD(weight, lr=.1)),
    'sgd_named': (AttributeError, 'tuple', lambda: SGD(line().named_parameters(), lr=.1)),
    'sgd_mixed': (AttributeError, 'dict', lambda: SGD([{'params': []}, weight], lr=.1)),
    'sgd_computed': (ValueError, 'leaf tensors', lambda: SGD([weight, weight*2], lr=.1)),
    'sgd_twice_in_a_group': (ValueError, 'given twice', lambda: SGD([weight, weight], lr=.1)),
    'sgd_twice_in_groups': (ValueError, 'given twice', lambda: SGD([{'params': weight}, {'params': weight}], lr=.1)),
    'sgd_no_lr': (TypeError, 'lr', lambda: SGD([weight])),
    'sgd_negative_lr': (ValueError, 'lr is -1, needs 0 or more', lambda: SGD([weight], lr=-1)),
    'sgd_nan_lr': (ValueError, 'lr is nan', lambda: SGD([weight], lr=float('nan'))),
    'sgd_group_lr': (ValueError, 'lr is -1', lambda: SGD([{'params': weight, 'lr': -1}], lr=.1)),
    'sgd_momentum': (ValueError, 'optim.Momentum', lambda: SGD([weight], lr=.1, momentum=.9)),
    'sgd_unknown_argument': (TypeError, 'weight_decay', lambda: SGD([weight], lr=.1, weight_decay=.1)),
    'sgd_group_momentum': (ValueError, "'momentum' is not supported", lambda: SGD([{'params': weight, 'momentum': .9}], lr=.1)),
    'sgd_group_decay': (ValueError, 'weight_decay', lambda: SGD([{'params': weight, 'weight_decay': .1}], lr=.1)),
    'sgd_group_differentiable': (ValueError, 'differentiable', lambda: SGD([{'params': weight, 'differentiable': True}], lr=.1)),
    'sgd_load_momentum': (ValueError, 'momentum', lambda: SGD([weight], lr=.1).load_state_dict(heavy)),
    'sgd_load_maximize': (ValueError, 'maximize', lambda: SGD([weight], lr=.1).load_state_dict(uphill)),
    'sgd_load_adam': (ValueError, 'tensors per parameter', lambda: SGD([weight], lr=.1).load_state_dict(adam_state())),
    'sgd_load_groups': (ValueError, 'groups of other sizes',
                        lambda: SGD(line().parameters(), lr=.1).load_state_dict(SGD([weight], lr=.1).state_dict())),
    'evaluate_empty': (ValueError, 'evaluate: no batch', lambda: evaluate(line(), F.cross_entropy, [])),
    'evaluate_empty_loader': (ValueError, 'evaluate: no batch', lambda: evaluate(line(), F.cross_entropy, DataLoader(examples(0)))),
    'evaluate_sum': (ValueError, "reduction='sum', needs 'mean'",
                     lambda: evaluate(line(), nn.CrossEntropyLoss(reduction='sum'), spoilt(0.))),
    'evaluate_our_sum': (ValueError, "reduction='sum'", lambda: evaluate(line(), CrossEntropyLoss(reduction='sum'), spoilt(0.))),
    'evaluate_partial_sum': (ValueError, "reduction='sum'", lambda: evaluate(line(), summed, spoilt(0.))),
    'evaluate_none': (ValueError, "reduction='none'", lambda: evaluate(line(), nn.CrossEntropyLoss(reduction='none'), spoilt(0.))),
    'evaluate_nan': (FloatingPointError, 'is nan in batch 2', lambda: evaluate(line(), F.cross_entropy, spoilt(torch.nan))),
    'evaluate_inf': (FloatingPointError, 'is inf in batch 1', lambda: evaluate(line(), lambda o, y: o.abs().max(), spoilt(torch.inf, 1))),
    'evaluate_nan_logits': (ValueError, 'logits are NaN', lambda: evaluate(line(), flat, spoilt(torch.nan))),
    'fit_negative': (ValueError, 'epochs is -3, needs 0 or more', lambda: train(-3)),
    'fit_half_an_epoch': (TypeError, 'float', lambda: train(1.5)),
    'fit_frozen': (ValueError, 'no parameter of the model', lambda: train(model=line().requires_grad_(False), opt=SGD([weight], lr=.1))),
    'fit_no_parameters': (ValueError, 'no parameter of the model', lambda: train(model=nn.ReLU(), opt=SGD([weight], lr=.1))),
    'fit_layers_in_a_list': (ValueError, 'no parameter of the model', lambda: train(model=ListNet(), opt=SGD([weight], lr=.1))),
    'fit_other_optimiser': (ValueError, 'of another model', lambda: train(opt=SGD(line().parameters(), lr=.1))),
    'fit_other_torch_optimiser': (ValueError, 'of another model', lambda: train(opt=torch.optim.Adam(line().parameters()))),
    'fit_other_optimiser_one_step': (ValueError, 'of another model',
                                     lambda: train(opt=SGD(line().parameters(), lr=.1), train_dl=spoilt(0.)[:1])),
    'fit_empty_train': (ValueError, 'no batch in epoch 1; is train_dl empty', lambda: train(train_dl=[])),
    'fit_short_train': (ValueError, 'no batch in epoch 1', lambda: train(train_dl=DataLoader(examples(7), 8, drop_last=True))),
    'fit_empty_valid': (ValueError, 'evaluate: no batch', lambda: train(valid_dl=[])),
    'fit_spent_generator': (ValueError, 'no batch in epoch 2', lambda: train(2, train_dl=iter(spoilt(0.)))),
    'fit_spent_validation': (ValueError, 'evaluate: no batch', lambda: train(2, valid_dl=iter(spoilt(0.)))),
    'fit_sum': (ValueError, "reduction='sum'", lambda: train(loss=CrossEntropyLoss(reduction='sum'))),
    'fit_partial_sum': (ValueError, "reduction='sum'", lambda: train(loss=summed)),
    'fit_nan': (FloatingPointError, r'nan in epoch 1 at batch 2 \(counted from 0\)', lambda: train(train_dl=spoilt(torch.nan))),
    'fit_explodes': (FloatingPointError, 'in epoch 1 at batch', lambda: train(3, loss=explode)),
    'fit_nan_in_validation': (FloatingPointError, 'evaluate: the loss is nan in batch 2', lambda: train(valid_dl=spoilt(torch.nan))),
    'fit_column_of_outputs': (ValueError, r'outputs \(4, 1\) and targets \(4,\).*squeeze\(1\)', column),
    'fit_column_of_targets': (ValueError, r'outputs \(4,\) and targets \(4, 1\)', lambda: column(outs=(-1,), targets=(-1, 1))),
    'fit_one_dimension_more': (ValueError, r'outputs \(4, 1, 1\)', lambda: column(outs=(-1, 1, 1), targets=(-1, 1))),
    'fit_column_of_half_floats': (ValueError, r'outputs \(4, 1\)', lambda: column(dtype=torch.float16)),
}


@pytest.mark.parametrize('name', errors)
def test_error(name):
    error, message, func = errors[name]
    with pytest.raises(error, match=message): func()


@pytest.mark.parametrize('kwargs', [dict(outs=(-1, 1), targets=(-1, 1)), dict(outs=(-1,), targets=(-1,)),
                                    dict(bs=1, n=3, loss=lambda out, yb: (out - yb).square().mean()),
                                    dict(dtype=torch.int64, loss=lambda out, yb: out.mean())],
                         ids=['columns', 'flat', 'one example', 'labels'])
def test_equal_shapes_single_examples_and_labels_pass(kwargs):
    assert len(column(**kwargs)) == 1


def test_the_shape_check_comes_before_the_loss_and_the_first_step():
    def loss(out, yb): raise AssertionError('the loss was computed')
    with pytest.raises(ValueError, match='would broadcast'): column(loss=loss)


def test_a_summed_loss_is_noticed_before_the_first_step():
    model = line()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match='reduction'): train(model=model, loss=summed)
    assert torch.equal(model.weight, before)


def test_loss_becomes_infinite_in_a_later_epoch():
    batches, calls = spoilt(0.), []
    def loss(out, yb):
        calls.append(1)
        return F.cross_entropy(out, yb)*(torch.inf if len(calls) == 4 + 4 + 3 else 1)
    with pytest.raises(FloatingPointError, match='became inf in epoch 2 at batch 2'):
        train(2, loss=loss, train_dl=batches, valid_dl=batches)


# ---- accuracy and report

def test_accuracy_counts():
    logits = torch.tensor([[.1, 2., -1.], [3., 0., 0.], [0., .5, .4], [-9., -8., -7.]])
    labels = torch.tensor([1, 0, 2, 2])
    assert_close(accuracy(logits, labels), torch.tensor(.75))
    assert accuracy(logits, labels).item() == (logits.numpy().argmax(1) == labels.numpy()).mean()
    # a constant added to all logits of an example changes nothing
    assert_close(accuracy(logits + torch.tensor([[5.], [-5.], [0.], [9.]]), labels), torch.tensor(.75))


def test_report_prints_two_numbers(capsys):
    report(torch.tensor(2.304), logits, labels)
    report(2.304, logits, torch.tensor([2, 0]))
    assert capsys.readouterr().out == '2.30, 1.00\n2.30, 0.50\n'


# ---- SGD

def two_groups(kind, steps):
    "Three parameters in float64, two groups; the loss leaves the last parameter out"
    g = gen(3)
    w, b, unused = (torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in ((3, 2), (2,), (1,)))
    opt = kind([{'params': [w, unused]}, {'params': b, 'lr': .01}], lr=.3)
    x = torch.randn(5, 3, generator=g, dtype=torch.float64)
    for _ in range(steps):
        ((x @ w + b).sin()**2).mean().backward()
        opt.step()
        opt.zero_grad()
    return [w, b, unused], opt


def test_sgd_states_travel_both_ways_and_are_copies():
    (params, opt), (_, twin) = two_groups(SGD, 7), two_groups(torch.optim.SGD, 7)
    faster, twin_faster = two_groups(SGD, 0)[1], two_groups(torch.optim.SGD, 0)[1]
    for g in faster.param_groups: g['lr'] *= 2
    for g in twin_faster.param_groups: g['lr'] *= 3
    twin.load_state_dict(faster.state_dict())
    assert [g['lr'] for g in twin.param_groups] == [.6, .02]
    opt.load_state_dict(twin_faster.state_dict())
    assert [g['lr'] for g in opt.param_groups] == [.3*3, .01*3]
    assert opt.param_groups[0]['params'][0] is params[0] and opt.param_groups[1]['params'][0] is params[1]
    opt.param_groups[0]['lr'] = 1.
    assert [twin_faster.param_groups[0]['lr'], faster.param_groups[0]['lr']] == [.3*3, .6]


def test_sgd_changes_nothing_if_a_state_is_wrong():
    (params, opt), (fewer, _) = two_groups(SGD, 0), two_groups(SGD, 0)
    before = opt.state_dict()
    bad = two_groups(torch.optim.SGD, 0)[1].state_dict()
    bad['param_groups'][0]['lr'], bad['param_groups'][1]['momentum'] = 7., .9
    for state in bad, SGD(fewer, lr=.1).state_dict():
        with pytest.raises(ValueError): opt.load_state_dict(state)
        assert opt.state_dict() == before
    for p, k in zip(params[:2], (0, 1)): assert opt.param_groups[k]['params'][0] is p


def test_sgd_does_not_change_the_groups_it_was_given():
    w = torch.ones(2, requires_grad=True)
    group = {'params': w}
    SGD([group], lr=.1)
    assert list(group) == ['params'] and group['params'] is w


def test_zero_grad_leaves_kept_gradients_alone():
    p, q = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    opt = SGD([p, q], lr=.1)
    for to_none in False, True:
        (p*3).sum().backward()
        kept = p.grad
        opt.zero_grad(set_to_none=to_none)
        assert_close(kept, torch.tensor([3., 3.]))
        assert q.grad is None and (p.grad is None if to_none else torch.equal(p.grad, torch.zeros(2)))
    opt.zero_grad(set_to_none=False)
    assert p.grad is None


def test_a_step_leaves_no_graph():
    w = torch.ones(2, requires_grad=True)
    w.square().sum().backward()
    SGD([w], lr=.1).step()
    assert w.requires_grad and w.grad_fn is None and torch.is_grad_enabled()
    assert_close(w.detach(), torch.full((2,), .8))


@pytest.mark.parametrize('k', [1, 4])
def test_pieces_of_a_batch_with_our_layers(k):
    ends = []
    for layers, loss_func in ((Sequential, Linear, ReLU), CrossEntropyLoss()), ((nn.Sequential, nn.Linear, nn.ReLU), nn.CrossEntropyLoss()):
        torch.manual_seed(1)
        net = layers[0](layers[1](5, 7), layers[2](), layers[1](7, 3))
        opt, (x, y) = SGD(net.parameters(), lr=.5), examples(64)[:]
        for xb, yb in zip(x.chunk(k), y.chunk(k)): (loss_func(net(xb), yb)/k).backward()
        opt.step()
        ends.append([p.detach() for p in net.parameters()])
    assert_close(*ends, rtol=0, atol=1e-6)


# ---- Dataset, BatchSampler, DataLoader

indices = [torch.tensor([5, 0, 5, 39]), torch.tensor([5, 0], dtype=torch.int32), [5, 0, 5, 39], np.array([5, 0]), slice(3, 20, 4),
           slice(-3, None), slice(9, 9), [], [2], 0, 39, -1, -40, np.int64(7), torch.tensor(3)]


@pytest.mark.parametrize('i', indices, ids=repr)
def test_dataset_indexes_as_tensors_do(i):
    ds = examples()
    assert_close(ds[i], (ds.x[i], ds.y[i]))
    assert isinstance(ds[i], tuple)


@pytest.mark.parametrize('i', [0, slice(0, 2), slice(None), [0], torch.tensor([0, 1]), range(2)], ids=repr)
def test_a_batch_is_a_copy(i):
    ds = Dataset(torch.zeros(4, 2), torch.arange(4))
    x, y = ds[i]
    x.fill_(9), y.fill_(9)
    assert_close(ds[:], (torch.zeros(4, 2), torch.arange(4)))


def test_a_loop_over_a_dataset_ends(): assert [y.item() for _, y in Dataset(torch.zeros(4, 2), torch.arange(4))] == [0, 1, 2, 3]


@pytest.mark.parametrize('convert', [np.asarray, lambda t: t.tolist()], ids=['arrays', 'lists'])
def test_arrays_and_lists(convert):
    ds = examples(20)
    for i in 3, slice(4), [1, 2]: assert_close(Dataset(convert(ds.x), convert(ds.y))[i], ds[i])
    got, want = (get_dls(d, d, 8, gen(0))[0] for d in (Dataset(convert(ds.x), convert(ds.y)), ds))
    assert_close(list(got), list(want))


def drawn(*args, **kwargs): return [i.tolist() for i in BatchSampler(*args, **kwargs)]


def test_sampler_in_order():
    assert drawn(range(5), 2) == [[0, 1], [2, 3], [4]]
    assert drawn(range(5), 2, drop_last=True) == [[0, 1], [2, 3]]
    assert drawn(range(4), 2) == drawn(range(4), 2, drop_last=True) == [[0, 1], [2, 3]]
    assert drawn([], 2) == []


@pytest.mark.parametrize('n, size, drop', list(itertools.product((0, 1, 5, 6, 7), (1, 2, 3, 10, np.int64(4)), (False, True))))
def test_sampler_gives_each_index_once(n, size, drop):
    sampler = BatchSampler(range(n), size, shuffle=True, drop_last=drop)
    batches = list(sampler)
    assert len(sampler) == len(batches)
    assert [len(b) for b in batches[:-1]] == [size]*(len(batches) - 1)
    assert all(b.dtype is torch.int64 and b.ndim == 1 for b in batches)
    seen = [i for b in batches for i in b.tolist()]
    assert len(set(seen)) == len(seen) == (n//size*size if drop else n)


def test_the_generator_or_the_global_seed_decides_the_order():
    def orders(epochs, **kwargs):
        sampler = BatchSampler(range(50), 50, shuffle=True, **kwargs)
        return [i.tolist() for _ in range(epochs) for i in sampler]
    first, second = orders(2, generator=gen(0))
    assert first != second and sorted(first) == sorted(second) == list(range(50))
    assert first == torch.randperm(50, generator=gen(0)).tolist()
    torch.manual_seed(5)
    assert orders(2, generator=gen(0)) == [first, second]
    a = orders(2)
    torch.manual_seed(5)
    assert orders(2) == a != orders(2)


def test_loader_sizes():
    ds = Dataset(torch.zeros(4, 2), torch.arange(4))
    assert [len(xb) for xb, yb in DataLoader(ds, 3)] == [3, 1]
    assert [len(xb) for xb, yb in DataLoader(ds, 3, drop_last=True)] == [3]
    assert [len(xb) for xb, yb in DataLoader(ds)] == [1, 1, 1, 1]
    assert (len(DataLoader(ds, 3)), len(DataLoader(ds, 3, drop_last=True)), len(DataLoader(ds))) == (2, 1, 4)
    backwards = DataLoader(ds, batch_sampler=[torch.tensor([3, 2]), torch.tensor([1, 0])])
    assert [yb.tolist() for xb, yb in backwards] == [[3, 2], [1, 0]] and len(backwards) == 2


class Items(torch.utils.data.TensorDataset):
    "Examples one by one"
    def __getitem__(self, i): return super().__getitem__(int(i) if not isinstance(i, torch.Tensor) else i.item())


@pytest.mark.parametrize('workers', [0, 2])
def test_get_dls_of_single_examples(workers):
    items, judged = Items(*examples(200)[:]), Items(*examples(100, seed=1)[:])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # one core, or threads at the time of a fork
        train_dl, valid_dl = get_dls(items, judged, 64, gen(3), num_workers=workers)
        assert [(dl.num_workers, dl.batch_size) for dl in (train_dl, valid_dl)] == [(workers, 64), (workers, 128)]
        by_hand = list(torch.utils.data.DataLoader(items, 64, shuffle=True, generator=gen(3)))
        for got, want in zip(train_dl, by_hand, strict=True): assert_close(got, want)
        assert_close(next(iter(valid_dl)), list(judged.tensors))
        by_batch = list(get_dls(Dataset(*items.tensors), Dataset(*judged.tensors), 64)[1])
        for got, want in zip(valid_dl, by_batch, strict=True): assert_close(tuple(got), want)


def test_get_dls_takes_what_people_have():
    x, y = examples(40)[:]
    pairs = [(x[i].numpy(), int(y[i])) for i in range(40)]
    for given in (x, y), Items(x, y), torch.utils.data.Subset(Items(x, y), range(40)), pairs, torch.utils.data.TensorDataset(x, y):
        for workers in None, 0:
            xb, yb = next(iter(get_dls(given, given, 40, num_workers=workers)[1]))
            assert_close(xb, x)
            assert_close(yb, y)
    xb, yb = next(iter(DataLoader((x, y), 7)))
    assert_close((xb, yb), (x[:7], y[:7]))


def test_get_dls_shuffles_the_training_examples_only():
    train_ds, valid_ds = examples(150), examples(100, seed=1)
    assert [len(next(iter(dl))[0]) for dl in get_dls(train_ds, valid_ds)] == [64, 100]
    train_dl, valid_dl = get_dls(train_ds, valid_ds, np.int64(16), gen(0))
    assert [len(xb) for xb, _ in train_dl] == [16]*9 + [6] and [len(xb) for xb, _ in valid_dl] == [32]*3 + [4]
    assert_close(torch.cat([xb for xb, _ in valid_dl]), valid_ds.x)
    a, b = (torch.cat([xb for xb, _ in get_dls(train_ds, valid_ds, 16, gen(0))[0]]) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, train_ds.x)
    for workers in None, 0: assert len(get_dls(train_ds, valid_ds, np.int64(16), num_workers=workers)[1]) == 4


# ---- evaluate

def mean_abs(out, yb): return (out - yb).abs().mean()


def test_evaluate_weighs_batches_by_size():
    three = Dataset(torch.tensor([[0.], [0.], [6.]]), torch.zeros(3, 1))
    for dl in DataLoader(three, 2), [three[:2], three[2:]], iter([three[:2], three[2:]]):
        got = evaluate(nn.Identity(), F.mse_loss, dl, metric=mean_abs)
        assert got == (12., 2.) and [type(v) for v in got] == [float, float]


def dropout_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(.5), nn.Sequential(nn.Linear(5, 3), nn.Dropout(.5)))
    net[1][1].eval()   # switched off on purpose
    return net


def test_evaluate_leaves_modes_weights_and_gradients_alone():
    model, dl = dropout_net(), DataLoader(examples(), 16)
    modes, before = [k.training for k in model.modules()], [p.detach().clone() for p in model.parameters()]
    def watched(out, yb):
        assert not out.requires_grad and not any(k.training for k in model.modules())
        return F.cross_entropy(out, yb)
    assert evaluate(model, watched, dl) == evaluate(model, F.cross_entropy, dl)
    assert [k.training for k in model.modules()] == modes and torch.is_grad_enabled()
    assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('error, batches, metric', [(FloatingPointError, spoilt(torch.nan), accuracy),
                                                    (ZeroDivisionError, spoilt(0.), lambda out, yb: 1/0)], ids=['loss', 'metric'])
def test_modes_come_back_after_an_error(error, batches, metric):
    model = dropout_net()
    modes = [k.training for k in model.modules()]
    with pytest.raises(error): evaluate(model, F.cross_entropy, batches, metric=metric)
    assert [k.training for k in model.modules()] == modes


# ---- fit

class Line(nn.Module):
    "A line through 0, with a parameter that is not used, and a dropout that notes its mode"
    def __init__(self):
        super().__init__()
        self.w, self.spare = nn.Parameter(torch.tensor([[0.]])), nn.Parameter(torch.tensor(1.))
        self.drop, self.modes = nn.Dropout(0.), []
    def forward(self, x):
        self.modes.append(self.drop.training)
        return x*self.w


three = Dataset(torch.tensor([[0.], [0.], [6.]]), torch.zeros(3, 1))
shifted = [(x, y + 3) for x, y in (three[:2], three[2:])]              # losses 9, 9 and 9 at w = 0
mixed = [shifted[0], (torch.tensor([[1.]]), torch.tensor([[6.]]))]     # two examples with loss 9, one with loss 36


def fit_line(train_dl, valid_dl=shifted, epochs=1, lr=0., line=None, loss=F.mse_loss, **kwargs):
    line = line or Line()
    return fit(epochs, line, loss, SGD(line.parameters(), lr=lr), train_dl, valid_dl, **{'metric': mean_abs, 'progress': False, **kwargs})


def test_records_modes_and_silence(capsys):
    told, net = [], Line().eval()
    got = fit_line(mixed*2, epochs=2, line=net, after_epoch=told.append)
    assert [r[:4] for r in got] == [(1, 18., 9., 3.), (2, 18., 9., 3.)]
    assert all(isinstance(v, float) for r in got for v in r[1:])
    assert capsys.readouterr() == ('', '')
    assert told == got and all(0 < r.seconds < 60 for r in got)
    assert net.modes == [True, True, True, True, False, False]*2
    assert net.training and net.w.grad is None


def test_gradients_left_over_do_not_count():
    net = Line()
    net.w.grad = torch.tensor([[100.]])
    fit_line(mixed[1:], lr=.1, line=net)       # one example: L = (w-6)², so w = 0.1·12 after one step
    assert_close(net.w.detach(), torch.tensor([[1.2]]))


def median_error(out, yb): return (out - yb).abs().median()


def test_the_metric_names_its_field(capsys):
    named = lambda metric: fit_line(mixed, metric=metric)[0]._fields[3]
    always = lambda out, yb: 0.
    assert named(median_error) == 'valid_median_error' and named(nn.L1Loss()) == 'valid_L1Loss'
    assert named(lambda out, yb: 0.) == 'valid_metric'     # a lambda has no name of its own
    always.__name__ = 'loss'                               # taken: a record has a `valid_loss`
    assert named(always) == 'valid_metric'
    r, = fit_line(mixed, metric=median_error, progress=True)
    assert capsys.readouterr().out == (f'epoch 1: train loss {r.train_loss:.4f}, valid loss {r.valid_loss:.4f}, '
                                       f'valid median_error {r.valid_median_error:.4f}, {r.seconds:.1f} s\n')
    record, = train()
    assert type(record) is Record and Record._fields == ('epoch', 'train_loss', 'valid_loss', 'valid_accuracy', 'seconds')


def test_no_stderr_at_all_as_in_a_service(capsys):
    with patch.object(sys, 'stderr', None): fit_line(mixed, progress=True, after_epoch=lambda r: print('saved'))
    assert capsys.readouterr().out.startswith('saved\nepoch 1')   # the record is handed on before it is printed


def test_a_list_of_inputs_counts_by_its_targets():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = Line()
        def forward(self, xs): return self.line(xs[0])
    lists = [([x, x], y) for x, y in mixed]
    r, = fit_line(lists, lists, line=First())
    assert (r.train_loss, r.valid_loss) == (18., 18.)


@pytest.mark.parametrize('epochs', [0, 2, np.int64(2)])
def test_numbers_of_epochs(epochs): assert [r.epoch for r in fit_line(mixed, epochs=epochs)] == list(range(1, epochs + 1))


def test_loaders_of_torch():
    loaded = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(three.x, three.y), batch_size=2)
    assert len(fit_line(loaded, loaded, epochs=2)) == 2


def test_no_loss_is_kept_longer_than_its_step():
    kept = []
    def loss(out, yb):
        assert sum(ref() is not None for ref in kept) <= 1 # the loss of the step before, and no older one
        kept.append(weakref.ref(l := F.mse_loss(out, yb)))
        return l
    fit_line(mixed*5, loss=loss, epochs=2)


# ---- long runs and other people's parts

def test_a_thousand_epochs():
    model, ds = line(torch.float64), examples(30, dtype=torch.float64)
    records = fit(1000, model, F.cross_entropy, SGD(model.parameters(), lr=.5), DataLoader(ds, 30), DataLoader(ds, 7), progress=False)
    assert [r.epoch for r in records] == list(range(1, 1001))
    assert all(b.train_loss < a.train_loss for a, b in zip(records, records[1:])), 'full-batch steps of a convex loss only go down'
    assert records[-1].valid_accuracy == 1
    # the loss met in epoch k is the validation loss after epoch k-1
    assert_close([r.train_loss for r in records[1:]], [r.valid_loss for r in records[:-1]], rtol=1e-10, atol=0)


@pytest.mark.parametrize('make', [SGD, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW], ids=['ours', 'SGD', 'Adam', 'AdamW'])
def test_both_engines_through_every_optimiser(make):
    results = []
    for layers, loss in ((nn.Sequential, nn.Linear, nn.ReLU), nn.CrossEntropyLoss()), ((Sequential, Linear, ReLU), CrossEntropyLoss()):
        torch.manual_seed(3)
        net = layers[0](layers[1](5, 7, dtype=torch.float64), layers[2](), layers[1](7, 3, dtype=torch.float64))
        ds = examples(dtype=torch.float64)
        dls = get_dls(ds, examples(15, seed=1, dtype=torch.float64), 8, torch.Generator().manual_seed(0))
        records = fit(20, net, loss, make(net.parameters(), lr=.05), *dls, progress=False)
        results.append(([r[:4] for r in records], [p.detach() for p in net.parameters()]))
    assert_close(*results, rtol=0, atol=1e-10)


def test_sgd_is_the_twin_for_a_thousand_steps():
    ends = []
    for kind in SGD, torch.optim.SGD:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        opt = kind([{'params': net[0].parameters(), 'lr': .3}, {'params': list(net[2].parameters())}], lr=.01)
        ds = examples(dtype=torch.float64)
        for k in range(1000):
            F.cross_entropy(net(ds.x), ds.y).backward()
            if k == 500: opt.param_groups[0]['lr'] = .1
            opt.step()
            opt.zero_grad()
        ends.append(([p.detach() for p in net.parameters()], opt.state_dict()))
    assert_close(ends[0][0], ends[1][0], rtol=1e-13, atol=1e-13)
    assert ends[0][1] == ends[1][1]


def test_a_state_keeps_options_of_others():
    opt, twin = SGD([weight], lr=.1), torch.optim.SGD([weight], lr=.1)
    torch.optim.lr_scheduler.StepLR(twin, 2)
    opt.load_state_dict(twin.state_dict())
    assert opt.param_groups[0]['initial_lr'] == .1
    twin.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))


def test_records_can_be_pickled(): assert pickle.loads(pickle.dumps(r := train(2))) == r


def test_dataset_on_another_device_takes_indices_from_the_cpu():
    select = torch.Tensor.index_select
    def strict(x, dim, i):   # as a GPU is; the device 'meta' takes indices from anywhere
        assert x.device == i.device
        return select(x, dim, i)
    with patch.object(torch.Tensor, 'index_select', strict):
        xb, yb = Dataset(torch.zeros(4, 2, device='meta'), torch.zeros(4, device='meta'))[torch.tensor([0, 3])]
    assert xb.device.type == yb.device.type == 'meta' and xb.shape == (2, 2)


@pytest.mark.parametrize('start', sorted({'spawn', torch.multiprocessing.get_context().get_start_method()}))
def test_workers_of_torch_deliver_our_batches(start):
    ds = examples(50)
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

"Appendix 71 beyond its story: batches of every form, data of every kind, generators, looks"
import copy
import io
import random
from collections import OrderedDict, UserDict, namedtuple
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from common import BATCHES, exact, gen, rows, x, y
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing import assert_close
from torch.utils import data as torch_data

from miniai.batches import (
    as_loader,
    check_replayable,
    first_batch,
    input_parts,
    is_inputs,
    model_device,
    random_state,
    set_random_state,
    show_batch,
    show_results,
    summary,
    tensors_in,
    to_device,
)
from miniai.module import Linear, ReLU, Sequential
from miniai.training import BatchSampler, DataLoader, Dataset, ItemLoader, get_dls

LASTING = dict(num_workers=1, persistent_workers=True)
PERSISTENT = {
    'shuffled': lambda: torch_data.DataLoader(rows, 16, shuffle=True, **LASTING),
    'in order': lambda: torch_data.DataLoader(rows, 16, **LASTING),
    'our sampler': lambda: torch_data.DataLoader(rows, sampler=BatchSampler(rows, 16), batch_size=None, **LASTING)}
OTHER = {
    'ours': lambda: get_dls(Dataset(x, y), Dataset(x, y), 16, gen(3))[0],
    'torch': lambda: torch_data.DataLoader(rows, 16, generator=gen(3)),
    'workers': lambda: torch_data.DataLoader(rows, 16, num_workers=1), 'a list': lambda: BATCHES}


class Run:
    "What a look needs of a trainer"
    def __init__(self, model, *dls, inputs=lambda xb: xb):
        self.model, self.dls, self.read, self.batch, self.preds = model, (*dls, None)[:2], inputs, None, None
    xb = property(lambda self: self.read(self.batch[0]))
    yb = property(lambda self: self.batch[1])
    def forward(self): self.preds = self.model(self.batch[0])

    @contextmanager
    def evaluating(self):
        state = random_state(self.dls)
        self.model.eval()
        try:
            with torch.no_grad(): yield
        finally:
            self.model.train()
            set_random_state(state, self.dls)


# ---- batches of any form

Pair = namedtuple('Pair', 'a b')


class Text(NamedTuple):
    ids: torch.Tensor
    mask: object = None
    @property
    def size(self): return len(self.ids)


class Encoding(UserDict):
    "Like the batches of tokenizers: no dict, but it has a method `to`"
    def to(self, device): return Encoding({k: v.to(device) for k, v in self.data.items()})


class Words(dict):
    "Gives its entries as attributes, one of which is called `to`"
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize('batch,found', [
    (x, [x]), ((x, [y, 'text', 7]), [x, y]), ({'a': {'b': (x,)}, 'c': None, 'd': y}, [x, y]), (Text(x, Pair(y, y)), [x, y, y]),
    ('text', []), ([], []), (None, []), (np.ones(3), []), (nn.Parameter(x), [x]), ({x: y}, [y])])
def test_the_tensors_of_a_batch(batch, found):
    exact([t.detach() for t in tensors_in(batch)], found)


@pytest.mark.parametrize('given', [x, (x, [y, 'text', 7]), {'a': {'b': (x,)}, 'c': None}])
def test_a_batch_moves_as_a_whole(given):
    def kinds(t): return t.device.type if isinstance(t, torch.Tensor) else {k: kinds(v) for k, v in t.items()} if isinstance(t, dict) else [
        kinds(v) for v in t] if isinstance(t, (tuple, list)) else t
    assert str(kinds(to_device(given, 'meta'))) == str(kinds(given)).replace('cpu', 'meta')
    assert kinds(to_device(given, None)) == kinds(given)


def test_a_batch_on_a_device_is_new_and_keeps_its_form():
    batch = [x, (y,), {'z': [x]}]
    moved = to_device(batch, 'cpu')
    assert moved is not batch and moved[2] is not batch[2] and moved[2]['z'] is not batch[2]['z'] and moved[0] is x
    assert [type(part) for part in moved] == [torch.Tensor, tuple, dict]
    assert type(to_device(OrderedDict(a=x), 'meta')) is dict
    assert to_device(batch, None) is batch


@pytest.mark.parametrize('make', [lambda t: Text(t), lambda t: Text(t, [t]), lambda t: Pair(t, {'c': t}), lambda t: [Text(t, 'words')]])
def test_named_tuples_keep_their_names(make):
    moved = to_device(make(x), 'meta')
    assert {t.device.type for t in tensors_in(moved)} == {'meta'} and type(moved) is type(make(x))
    assert repr(moved) == repr(make(x.to('meta')))
    if isinstance(moved, Text): assert moved.size == 200


def test_what_has_a_method_to_moves_itself():
    packed = to_device((pack_sequence([torch.ones(3), torch.ones(2)]), y), 'meta')[0]
    assert type(packed) is PackedSequence and packed.data.device.type == 'meta' and packed.batch_sizes.tolist() == [2, 2, 1]
    encoding = to_device([Encoding(ids=y)], 'meta')[0]
    assert type(encoding) is Encoding and encoding['ids'].device.type == 'meta'
    assert to_device(Words(to=x), 'meta')['to'].device.type == 'meta'
    array = np.ones(3)
    assert to_device(array, 'meta') is array and to_device(torch.device, 'meta') is torch.device


def test_the_device_of_a_model():
    assert model_device(nn.Linear(2, 1)) == torch.device('cpu') and model_device(nn.ReLU()) is None
    assert model_device(nn.Sequential(nn.ReLU(), nn.Linear(2, 1, device='meta'))).type == 'meta'


# ---- data of every kind

@pytest.mark.parametrize('data,expected', [
    (x, True), (x.numpy(), True), ((x, y), True), ([x, y.numpy()], True), ({'a': x}, True), (Pair(x, y), True), (Dataset(x, y), False),
    (rows, False), (BATCHES, False), ((x, 'text'), False), ([x, (x, y)], False), (iter(BATCHES), False), (DataLoader((x, y), 4), False)])
def test_what_counts_as_inputs(data, expected): assert is_inputs(data) is expected


@pytest.mark.parametrize('bs,sizes', [(16, [16]*12 + [8]), (200, [200]), (1024, [200]), (199, [199, 1])])
@pytest.mark.parametrize('make', [lambda: x, lambda: x.numpy(), lambda: (x, y), lambda: [x, y.numpy()], lambda: {'a': x, 'b': y},
                                  lambda: Pair(x, y)])
def test_parts_of_inputs(make, bs, sizes):
    parts = list(input_parts(make(), bs))
    assert [len(next(tensors_in(part))) for part in parts] == sizes
    for i, whole in enumerate(tensors_in(to_device(make(), None)) if not isinstance(make(), np.ndarray) else [x]):
        exact(torch.cat([[*tensors_in(part)][i] for part in parts]), whole)
    assert all(isinstance(part, {dict: dict, list: tuple, Pair: tuple}.get(type(make()), (tuple, torch.Tensor))) for part in parts)
    if isinstance(make(), dict): assert all(list(part) == ['a', 'b'] for part in parts)


def test_parts_of_unequal_inputs_raise():
    for data in (x, y[:100]), {'a': x, 'b': y[:16]}:
        with pytest.raises(ValueError): list(input_parts(data, 16))


class Item(torch_data.Dataset):
    def __len__(self): return 200
    def __getitem__(self, i): return x[int(i)], int(y[int(i)])


@pytest.mark.parametrize('data,kind', [((x, y), DataLoader), (Dataset(x, y), DataLoader), (Pair(x, y), DataLoader), (rows, ItemLoader),
                                       (Item(), ItemLoader), (torch_data.Subset(rows, range(200)), ItemLoader)])
@pytest.mark.parametrize('bs', [16, 1024])
def test_datasets_get_a_loader(data, kind, bs):
    dl = as_loader(data, bs)
    assert type(dl) is kind and len(dl) == -(-200//bs) == len(list(dl))
    exact(torch.cat([xb for xb, _ in dl]), x)
    exact(torch.cat([yb for _, yb in dl]), y)


@pytest.mark.parametrize('make', [lambda t: (t, t), lambda t: torch_data.TensorDataset(t, t)])
def test_batches_have_1024_examples_unless_told_otherwise(make):
    assert [len(xb) for xb, _ in as_loader(make(torch.zeros(1500)))] == [1024, 476]


@pytest.mark.parametrize('make', [lambda: BATCHES, lambda: tuple(BATCHES), lambda: iter(BATCHES), lambda: DataLoader((x, y), 4),
                                  lambda: torch_data.DataLoader(rows, 4), lambda: [x, y]])
def test_what_yields_batches_stays(make):
    given = make()
    assert as_loader(given) is given


# ---- random generators

def test_the_random_state_of_every_source():
    inner = get_dls(Dataset(x, y), Dataset(x, y))[0]
    inner.dataset = copy.copy(inner.dataset)
    inner.dataset.generator = gen(4)
    ours, theirs = OTHER['ours'](), torch_data.DataLoader(rows, 16, shuffle=True, generator=gen(3))
    for dls, number in ([ours, None], 1), ([theirs], 1), ([inner], 1), ([ours, theirs], 2), ([ours, ours], 1), ([BATCHES, 7], 0):
        def draws(dl=dls[0]):
            own = getattr(getattr(dl, 'dataset', None), 'generator', None)
            labels = [] if dl is BATCHES else next(iter(dl))[1].tolist()
            return (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random(), random.gauss(0, 1), labels,
                    torch.rand(1, generator=own).item())
        random.gauss(0, 1)                                              # leaves half of a pair of numbers in Python's state
        state = random_state(dls)
        assert len(state['loaders']) == number
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        first, second = draws(), draws()
        for kept in state, torch.load(file, weights_only=True):
            set_random_state(kept, dls)
            assert draws() == first
        assert all(a != b for a, b in zip(first, second) if a)          # each generator moved
    with pytest.raises(ValueError): set_random_state(random_state([ours]))


def test_the_state_is_complete_and_a_copy():
    state = random_state()
    kept = copy.deepcopy(state)
    torch.rand(9), np.random.rand(9), random.random()
    exact([*tensors_in(state)], [*tensors_in(kept)])
    assert (state['python'], state['numpy'][2:]) == (kept['python'], kept['numpy'][2:])
    assert ('cuda' in state) == torch.cuda.is_initialized() and ('mps' in state) == torch.backends.mps.is_available()


# ---- the first batch

@pytest.mark.parametrize('name', OTHER)
def test_the_first_batch_of_any_loader(name):
    check_replayable(dl := OTHER[name]())
    state = random_state([dl])
    first = first_batch(dl)
    set_random_state(state, [dl])
    exact([*first], [*next(iter(OTHER[name]()))])


@pytest.mark.parametrize('name', PERSISTENT)
def test_persistent_workers_are_not_started(name):
    dl = PERSISTENT[name]()
    xb, yb = first_batch(dl)
    assert xb.shape == (16, 9) and dl._iterator is None
    if name != 'shuffled': exact([xb, yb], [x[:16], y[:16]])
    else: assert all((x == row).all(1).any() for row in xb) and not xb.equal(x[:16])
    with pytest.raises(ValueError, match='persistent_workers=True.*use persistent_workers=False'): check_replayable(dl)


# ---- looks

def look_model(): return Sequential(Linear(9, 8), ReLU(), Linear(8, 3))


def squares(xb): return xb.view(-1, 3, 3)


class Scaled(nn.Module):
    "A layer with a parameter of its own and a child that it calls twice; it returns a pair"
    def __init__(self):
        super().__init__()
        self.scale, self.lin = nn.Parameter(torch.ones(3), requires_grad=False), nn.Linear(9, 9)
    def forward(self, x): return self.lin(self.lin(x))*self.scale[0], None


def test_the_summary():
    text = summary(Run(look_model(), BATCHES))
    assert text.rows == [('0', 'Linear', '(16, 8)', '80'), ('1', 'ReLU', '(16, 8)', '0'), ('2', 'Linear', '(16, 3)', '27')]
    assert repr(text) == text and text.splitlines()[-1].split() == ['total', '0', 'frozen', '107']
    assert text.splitlines()[0].split() == ['layer', 'kind', 'output', 'parameters']
    assert len({len(line) for line in text.splitlines()}) == 1
    rows = summary(Run(nn.Sequential(Scaled()), BATCHES))
    assert [(r[0], r[2], r[3]) for r in rows.rows] == [('0.lin', '(16, 9)', '90'), ('0.lin', '(16, 9)', '90'), ('0', '(16, 9)', '3')]
    assert rows.splitlines()[-1].split() == ['total', '3', 'frozen', '93']
    named = nn.Module()
    named.forward = lambda x: {'out': x}
    assert summary(Run(nn.Sequential(named), BATCHES)).rows == [('0', 'Module', 'dict', '0')]


def test_a_summary_that_fails_leaves_no_hook():
    model = look_model()
    with pytest.raises(RuntimeError): summary(Run(model, [(x[:, :3], y)]))
    assert not any(m._forward_hooks for m in model.modules()) and model.training


def test_pictures_of_a_batch_and_of_results():
    import matplotlib.pyplot as plt
    torch.manual_seed(0)
    learn = Run(look_model(), BATCHES[1:], BATCHES, inputs=squares)
    def axes(draw, *args, **kwargs):
        assert draw(*args, **kwargs) is None  # a value would be shown in a notebook, beside the figure
        return plt.gcf().axes
    batch, results = axes(show_batch, learn, 7), axes(show_results, learn, 9, ncols=3)
    assert [ax.get_title() for ax in batch] == [str(label) for label in BATCHES[1][1][:7].tolist()]
    assert_close(torch.tensor(batch[6].images[0].get_array()), BATCHES[1][0][6].view(3, 3))
    found, labels = learn.model(x[:9]).argmax(1).tolist(), y[:9].tolist()
    assert [ax.get_title() for ax in results] == [f'{p}' if p == t else f'{p}, is {t}' for p, t in zip(found, labels)]
    assert [ax.title.get_color() for ax in results] == ['k' if p == t else 'red' for p, t in zip(found, labels)] and found != labels
    assert results[0].get_subplotspec().get_gridspec().ncols == 3
    assert sum(ax.has_data() for ax in axes(show_batch, learn)) == sum(ax.has_data() for ax in axes(show_results, learn)) == 16
    alone = Run(learn.model, BATCHES[1:], inputs=squares)                          # no validation data: training images
    assert axes(show_results, alone, 3)[0].get_title()[-1] == str(BATCHES[1][1][0].item())
    assert learn.batch is learn.preds is alone.batch is None
    plt.close('all')


def test_a_look_is_in_evaluation_mode_without_gradients_and_on_the_device_of_the_model():
    seen = []
    class Looks(Run):
        def forward(self):
            super().forward()
            seen.append((self.model.training, self.preds.requires_grad, self.preds.device.type))
    summary(Looks(nn.Linear(9, 3, device='meta'), BATCHES))
    assert seen == [(False, False, 'meta')]

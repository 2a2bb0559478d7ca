"Activation functions, hooks and statistics of a fit: edge cases that do not belong in chapter 12"
import copy
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from common import exact, gen
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from miniai.activations import GELU, ActivationStatsCB, Hooks, LeakyReLU, SiLU
from miniai.checkpoints import CheckpointCB, resume
from miniai.conv import AdaptiveAvgPool2d, Conv2d
from miniai.gradcheck import check_grads
from miniai.learner import Callback, CancelBatch, CancelEpoch, CancelFit, Learner
from miniai.losses import CrossEntropyLoss
from miniai.module import Flatten, Linear, ReLU, Sequential, check_twin
from miniai.optim import Momentum
from miniai.training import DataLoader, Dataset

F64 = dict(dtype=torch.float64)
PAIRS = {'leaky': (LeakyReLU, nn.LeakyReLU), 'leaky 0': (lambda: LeakyReLU(0), lambda: nn.LeakyReLU(0)), 'gelu': (GELU, nn.GELU),
         'leaky .3': (lambda: LeakyReLU(.3), lambda: nn.LeakyReLU(.3)), 'leaky 1': (lambda: LeakyReLU(1.), lambda: nn.LeakyReLU(1.)),
         'silu': (SiLU, nn.SiLU)}
each = pytest.mark.parametrize('kind', PAIRS)


def numbers(*shape): return torch.randn(shape, generator=gen(0), **F64)*3


def both(kind, x, grad=None):
    "Outputs and gradients of the input, ours and PyTorch's"
    for make in PAIRS[kind]:
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = make()(leaf)
        out.backward(torch.ones_like(out) if grad is None else grad)
        yield out.detach(), leaf.grad


# ---- the layers

INPUTS = {'0-d': numbers(), 'one': numbers(1), 'empty': numbers(0, 3), 'vector': numbers(7), 'matrix': numbers(5, 3),
          'images': numbers(2, 3, 5, 4), '5-d': numbers(2, 1, 3, 2, 3), 'transposed': numbers(5, 3).T,
          'strided': numbers(9, 8)[::2, 1::3], 'expanded': numbers(3, 1).expand(3, 4),
          'channels_last': numbers(2, 3, 5, 4).to(memory_format=torch.channels_last), 'zeros': torch.zeros(2, 3, **F64),
          'large': numbers(50)*1e3, 'tiny': numbers(50)*1e-300, 'line': torch.linspace(-45, 45, 181, **F64)}


@each
@pytest.mark.parametrize('name', INPUTS)
def test_twins(kind, name):
    ours, theirs = (make() for make in PAIRS[kind])
    check_twin(ours, theirs, INPUTS[name], rtol=1e-12, atol=1e-300 if 'leaky' in kind else 1e-15)


@each
def test_differences(kind): check_grads(lambda t: PAIRS[kind][0]()(t).square().sum(), [numbers(4, 3)])


@each
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_numbers_that_are_not_finite_and_the_ends_of_the_range(kind, dtype):
    big, small = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    x = torch.tensor([math.inf, -math.inf, math.nan, 0., -0., big, -big, small, -small], dtype=dtype)
    if dtype == torch.float32 and kind == 'gelu': x = x[2:]/4    # torch's own is nan at inf and inf at 3e38, in float32 alone
    (out, grad), (want, want_grad) = both(kind, x)
    assert_close(out, want, rtol=1e-6, atol=0, equal_nan=True)
    assert_close(grad, want_grad, rtol=1e-6, atol=0, equal_nan=True)


@each
def test_the_gradient_of_a_nan_is_ours_or_nan_as_in_torch(kind):
    (_, grad), (_, want) = both(kind, torch.tensor([math.nan, 1.]), torch.tensor([1., math.nan]))
    assert_close(grad, want, equal_nan=True)


@each
def test_channels_last_is_kept(kind):
    x = numbers(2, 3, 5, 4).to(memory_format=torch.channels_last)
    for out, grad in both(kind, x, torch.ones_like(x)):
        assert out.is_contiguous(memory_format=torch.channels_last) and grad.is_contiguous(memory_format=torch.channels_last)


@each
def test_a_layer_used_twice(kind):
    class Twice(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
        def forward(self, x): return self.layer(self.layer(x)*2 - 1)
    check_twin(*(Twice(make()) for make in PAIRS[kind]), numbers(4, 3), rtol=1e-12)


@each
def test_a_second_backward_pass_gives_the_same_gradient(kind):
    "In-place operations are on temporaries alone: not on the input, the output, `grad`, or what is saved"
    x = numbers(6, 2).requires_grad_()
    out = PAIRS[kind][0]()(x)
    kept, grad = (x.detach().clone(), out.detach().clone()), torch.ones_like(out)
    first, again = (torch.autograd.grad(out, x, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again) and torch.equal(x, kept[0]) and torch.equal(out, kept[1]) and (grad == 1).all()


@each
def test_copies(kind):
    layer = PAIRS[kind][0]()
    for twin in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)): check_twin(twin, PAIRS[kind][1](), numbers(4, 3), rtol=1e-12)
    assert not layer.state_dict() and repr(layer).startswith(type(layer).__name__)


@each
def test_frozen_inputs_and_no_grad(kind):
    ours, theirs = (make() for make in PAIRS[kind])
    x = numbers(4, 3)
    assert not ours(x).requires_grad
    with torch.no_grad(): assert_close(ours(x.requires_grad_()), theirs(x), rtol=1e-12, atol=1e-15)


@each
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    (out, grad), (want, want_grad) = both(kind, numbers(64).to(dtype))
    assert out.dtype == grad.dtype == dtype
    assert_close(out, want, rtol=2e-2, atol=2e-2)
    assert_close(grad, want_grad, rtol=2e-2, atol=3e-2)


@each
def test_autocast(kind):
    torch.manual_seed(0)
    found, linear, x = [], nn.Linear(5, 4), torch.randn(7, 5)
    for make in PAIRS[kind]:
        linear.zero_grad()
        with torch.autocast('cpu', torch.bfloat16): out = make()(linear(x))
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        found.append((out.float(), linear.weight.grad.clone()))
    assert_close(*(out for out, _ in found), rtol=2e-2, atol=2e-2)
    assert_close(*(grad for _, grad in found), rtol=3e-2, atol=.1)


@pytest.mark.parametrize('make', [lambda: LeakyReLU(.1, True), lambda: LeakyReLU(inplace=True), lambda: GELU('tanh'),
                                  lambda: GELU(approximate='tanh'), lambda: SiLU(True), lambda: SiLU(inplace=True)])
def test_options_that_we_lack(make):
    with pytest.raises(TypeError): make()


@pytest.mark.parametrize('slope', [-.01, 1.01, math.nan, math.inf])
def test_slopes_that_would_be_computed_wrongly(slope):
    with pytest.raises(ValueError, match=f'LeakyReLU: negative_slope is {slope}, must be from 0 to 1'): LeakyReLU(slope)


def test_leaky_shows_its_slope():
    assert repr(LeakyReLU(.25)) == repr(nn.LeakyReLU(.25)) and LeakyReLU().negative_slope == nn.LeakyReLU().negative_slope


# ---- hooks

def hooks_on(model): return sum(len(m._forward_hooks) for m in model.modules())   # no public count


def nested(): return nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))
def shapes(module, inputs, output): return tuple(inputs[0].shape), tuple(output.shape)


def test_a_model_means_its_modules_without_children():
    net = nested()
    with Hooks(net, shapes) as hooks:
        for n in 5, 6: net(torch.randn(n, 4))
    assert hooks.values == {'0': [((5, 4), (5, 3)), ((6, 4), (6, 3))], '1.0': [((5, 3), (5, 3)), ((6, 3), (6, 3))],
                            '1.1': [((5, 3), (5, 2)), ((6, 3), (6, 2))]}


def test_a_model_without_children_is_named_after_its_class():
    layer = LeakyReLU()
    with Hooks(layer, shapes) as hooks: layer(torch.zeros(2, 3))
    assert hooks.values == {'LeakyReLU': [((2, 3), (2, 3))]}


@pytest.mark.parametrize('choose, names', [
    (lambda net: {'whole': net, 'last': net[1][1]}, ['whole', 'last']), (lambda net: [net[0], net[1]], ['0', '1']),
    (lambda net: (m for m in net), ['0', '1']), (lambda net: nn.ModuleList([net[1]]), ['0.0', '0.1']),
    (lambda net: [], []), (lambda net: {}, [])])
def test_dicts_lists_and_generators(choose, names):
    net = nested()
    with Hooks(choose(net), lambda *args: 1) as hooks: net(torch.randn(5, 4))
    assert hooks.values == {name: [1] for name in names} and not hooks_on(net)


def test_a_module_with_two_names_and_a_module_used_twice():
    relu = nn.ReLU()
    net = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu)
    with Hooks(net, lambda *args: 1) as hooks: net(torch.randn(5, 4))
    assert hooks.values == {'0': [1], '1': [1, 1], '2': [1]}
    with Hooks({'a': relu, 'b': relu}, lambda *args: 1) as hooks: relu(torch.zeros(1))
    assert hooks.values == {'a': [1], 'b': [1]}


@pytest.mark.parametrize('result', [None, 0, torch.zeros(7)])
def test_the_output_stays_and_the_result_is_kept(result):
    net, x = nested(), torch.randn(5, 4)
    want = net(x)
    with Hooks(net, lambda *args: result) as hooks: assert torch.equal(net(x), want)
    assert all(len(v) == 1 and v[0] is result for v in hooks.values.values())


def test_f_gets_module_inputs_and_output():
    layer, x, y = nn.Bilinear(2, 3, 4), torch.randn(5, 2), torch.randn(5, 3)
    with Hooks([layer], lambda *args: args) as hooks: out = layer(x, y)
    (module, inputs, output), = hooks.values['0']
    assert module is layer and inputs[0] is x and inputs[1] is y and output is out


class Stop(Exception): pass


def stop(*args): raise Stop


def test_hooks_come_off():
    net, x, wrong = nested(), torch.randn(5, 4), torch.randn(5, 9)
    with Hooks(net, shapes) as hooks: assert hooks_on(net) == 3
    assert not hooks_on(net)
    with pytest.raises(RuntimeError), Hooks(net, shapes): net(wrong)
    assert not hooks_on(net)
    with pytest.raises(Stop), Hooks(net, stop): net(x)
    assert not hooks_on(net)
    with pytest.raises(KeyboardInterrupt), Hooks(net, shapes): raise KeyboardInterrupt
    assert not hooks_on(net)
    hooks = Hooks(net, shapes)
    net(x)
    for _ in range(2): hooks.remove()
    net(x)
    assert not hooks_on(net) and [len(v) for v in hooks.values.values()] == [1, 1, 1]


def test_a_list_with_something_else_in_it_leaves_no_hook():
    net = nested()
    with pytest.raises(AttributeError): Hooks([net[0], net[1], 'no module'], shapes)
    assert not hooks_on(net)


def test_two_at_once_and_hooks_of_others():
    net, x, other = nested(), torch.randn(5, 4), []
    handle = net[0].register_forward_hook(lambda *args: other.append(1))
    with Hooks(net, shapes) as a:
        with Hooks(net, lambda m, i, o: o.sum().item()) as b: net(x)
        net(x)
    net(x)
    assert [len(v) for v in a.values.values()] == [2]*3 and [len(v) for v in b.values.values()] == [1]*3
    assert len(other) == 3 and hooks_on(net) == 1
    handle.remove()


def test_removal_while_the_model_runs():
    net = nested()
    hooks = Hooks(net, lambda *args: hooks.remove())
    net(torch.randn(5, 4))
    assert not hooks_on(net) and [len(v) for v in hooks.values.values()] == [1, 0, 0]


# ---- the callback

OURS = dict(seq=Sequential, conv=Conv2d, pool=AdaptiveAvgPool2d, flat=Flatten, lin=Linear, act=ReLU, loss=CrossEntropyLoss)
TORCH = dict(seq=nn.Sequential, conv=nn.Conv2d, pool=nn.AdaptiveAvgPool2d, flat=nn.Flatten, lin=nn.Linear, act=nn.ReLU,
             loss=nn.CrossEntropyLoss)
engines = pytest.mark.parametrize('kit', [OURS, TORCH], ids=['ours', 'torch'])
N = 70   # training: 9 batches, the last of 6 examples; validation: 3 batches


def convnet(kit):
    return kit['seq'](kit['conv'](1, 4, 3, 2, 1), kit['act'](), kit['pool'](1), kit['flat'](),
                      kit['lin'](4, 5), kit['act'](), kit['lin'](5, 3))


def learner(kit=TORCH, cbs=(), net=None, seed=0, lr=.1):
    torch.manual_seed(seed)
    y = torch.randint(3, (N,))
    ds = Dataset(torch.randn(N, 1, 8, 8) + y.view(-1, 1, 1, 1), y)
    dls = DataLoader(ds, 8, shuffle=True, generator=torch.Generator().manual_seed(seed)), DataLoader(ds, 32)
    return Learner(net or convnet(kit), dls, kit['loss'](), Momentum, lr=lr, cbs=cbs)


def tables(cb): return {k: torch.cat([cb.means[k][:, None], cb.stds[k][:, None], cb.hists[k]], 1) for k in cb.means}


class Outputs(Callback):
    "Keeps all outputs of the training batches, by an own hook, for comparison"
    def before_fit(self, learn):
        self.outs, self.handles = {k: [] for k, _ in learn.model.named_children()}, []
        for k, m in learn.model.named_children():
            keep = lambda m, i, o, k=k: self.outs[k].append(o.detach().clone()) if torch.is_grad_enabled() else None
            self.handles.append(m.register_forward_hook(keep))
    def cleanup_fit(self, learn):
        for h in self.handles: h.remove()


@engines
def test_statistics_of_all_layers_in_all_batches(kit):
    cb, outs = ActivationStatsCB(bins=6, low=-.5, high=1.), Outputs()
    learn = learner(kit, [cb, outs])
    learn.fit(2, progress=False)
    assert [*cb.means] == [*cb.stds] == [*cb.hists] == [str(k) for k in range(7)] and not hooks_on(learn.model)
    edges = torch.tensor([-math.inf, -.25, 0, .25, .5, .75, math.inf])
    for k, seen in outs.outs.items():
        assert len(seen) == 18 and cb.hists[k].shape == (18, 6)
        assert_close(cb.means[k], torch.stack([o.mean() for o in seen]), rtol=1e-5, atol=1e-6)
        assert_close(cb.stds[k], torch.stack([o.std(correction=0) for o in seen]), rtol=1e-5, atol=1e-6)
        for counts, o in zip(cb.hists[k], seen):
            assert counts.sum() == o.numel()
            want = torch.stack([((o >= a) & (o < b)).sum() for a, b in zip(edges, edges[1:])])
            assert (counts - want).abs().sum() <= 2      # a number may round over an edge


def test_defaults():
    cb = ActivationStatsCB()
    learner(cbs=[cb]).fit(1, progress=False)
    assert (cb.modules, cb.low, cb.high, cb.hists['0'].shape) == (None, -5, 5, (9, 80))


@engines
def test_our_statistics_and_those_of_torch(kit):
    cbs = [ActivationStatsCB() for _ in range(2)]
    ours, theirs = learner(kit, cbs[:1]), learner(TORCH, cbs[1:])
    theirs.model.load_state_dict(ours.model.state_dict())
    for learn in ours, theirs: learn.fit(1, progress=False)
    for k in cbs[0].means:
        assert_close(cbs[0].means[k], cbs[1].means[k], rtol=1e-3, atol=1e-4)
        assert_close(cbs[0].stds[k], cbs[1].stds[k], rtol=1e-3, atol=1e-4)


@engines
def test_training_is_unchanged(kit):
    def net():
        return kit['seq'](kit['flat'](), kit['lin'](64, 6), kit['act'](), nn.Dropout(.5), kit['lin'](6, 3))
    learns = []
    for cbs in [], [ActivationStatsCB(), ActivationStatsCB()]:
        torch.manual_seed(3)
        learns.append(learner(kit, cbs, net(), seed=3))
        records = learns[-1].fit(3, progress=False)
        learns[-1].losses_of_epochs = [(r['train_loss'], r['valid_loss']) for r in records]
    a, b = learns
    exact(a.model.state_dict(), b.model.state_dict())
    assert a.losses_of_epochs == b.losses_of_epochs


class Reads(TorchFunctionMode):
    "Counts how often numbers are read from tensors"
    count, names = 0, ('item', 'tolist', '__float__', '__bool__', '__int__', '__format__', 'cpu', 'numpy', 'nonzero')
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, '__name__', '') in self.names
        return func(*args, **(kwargs or {}))


def test_no_sync_per_batch_and_no_graph():
    counts = []
    for cbs in [], [ActivationStatsCB()]:
        learn = learner(cbs=cbs)
        with Reads() as found: learn.fit(1, progress=False)
        counts.append(found.count)
    assert counts[1] - counts[0] == 7 + 1     # 7 layers to the CPU once per pass, one list of dead shares
    class Look(Callback):
        order, graphs = 1000, 0
        def after_forward(self, learn): self.graphs += sum(r.requires_grad for rows in cb._rows.values() for r in rows)
    cb, look = ActivationStatsCB(), Look()
    learner(cbs=[cb, look]).fit(1, progress=False)
    assert look.graphs == 0 and not any(t.requires_grad for t in tables(cb).values())


def fixed(outputs, train=None):
    "A learner whose model outputs `outputs` batch by batch in validation; the linear layer after it only makes a loss"
    class Given(nn.Module):
        def forward(self, x): return x*1
    outputs = [o.clone() for o in outputs]
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1, 2))
        def forward(self, x): return self.p.expand(len(x), 2)
    batches = [(o, torch.zeros(len(o), dtype=torch.int64)) for o in outputs]
    net = nn.Sequential(Given(), Last())
    return Learner(net, (batches if train is None else train, batches), nn.CrossEntropyLoss(), lr=0.), net[0]


@pytest.mark.parametrize('outputs, share', [
    ([torch.tensor([[0., 1., 0.], [0., 0., 0.]]), torch.tensor([[0., 0., -1e-30]])], 1/3),    # alive in one batch is alive
    ([torch.zeros(2, 4)], 1.), ([torch.ones(2, 4)], 0.),
    ([torch.tensor([0., 0., 1.])], 0.), ([torch.zeros(3)], 1.),                            # (n,): one unit
    ([torch.tensor([[[0., 0.], [0., 2.]], [[0., 0.], [0., 0.]]])], 1/2),                   # a channel is alive at one position
    ([torch.tensor([[[[0., 0.]], [[0., 2.]], [[3., 0.]], [[0., 0.]]]])], 1/2),
    ([torch.tensor([[math.nan, 0.]])], 1/2), ([torch.tensor([[math.inf, -math.inf]])], 0.),
    ([torch.tensor([[-0., 0.]])], 1.)])
def test_dead_units(outputs, share):
    cb = ActivationStatsCB()
    learn, layer = fixed(outputs)
    cb.modules = {'given': layer}
    learn.fit(2, cbs=[cb], progress=False)
    n = len(outputs)
    assert [at for at, _ in cb.dead['given']] == [n, 2*n]
    assert_close([s for _, s in cb.dead['given']], [share]*2, rtol=0, atol=1e-6)


def test_numbers_that_are_not_finite_and_outliers():
    out = torch.tensor([[math.inf, -math.inf, math.nan, 9., -9., 0.]])
    cb = ActivationStatsCB(bins=4, low=-1, high=1)
    learn, layer = fixed([out])
    cb.modules = [layer]
    learn.fit(1, cbs=[cb], progress=False)
    assert cb.means['0'].isnan().all() and cb.stds['0'].isnan().all()
    assert cb.hists['0'].tolist() == [[2, 0, 1, 2]]       # the NaN is in no bin


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_other_dtypes(dtype):
    out = torch.arange(-300, 300).remainder(7).view(100, 6).to(dtype)
    cb = ActivationStatsCB(bins=7, low=0, high=7)
    learn, layer = fixed([out])
    cb.modules = [layer]
    learn.fit(1, cbs=[cb], progress=False)
    assert cb.means['0'].dtype == torch.float32
    assert_close(cb.means['0'][0], out.double().mean().float(), rtol=1e-5, atol=0)
    assert cb.hists['0'][0].tolist() == [(out == k).sum() for k in range(7)]


def test_autocast_outputs():
    from miniai.callbacks import MixedPrecisionCB
    cb = ActivationStatsCB()
    learner(cbs=[cb, MixedPrecisionCB()]).fit(1, progress=False)
    plain = ActivationStatsCB()
    learner(cbs=[plain]).fit(1, progress=False)
    for k in cb.stds: assert_close(cb.stds[k][0], plain.stds[k][0], rtol=.02, atol=1e-3)


class Raise(Callback):
    "Raises an exception at an event of a training or validation batch"
    def __init__(self, event, error, batch=4, training=True, order=0):
        self.batch, self.training, self.order = batch, training, order
        def call(learn):
            if learn.training == self.training and learn.batch_idx == self.batch and learn.epoch == 2: raise error
        setattr(self, event, call)


@pytest.mark.parametrize('order', [-100, 100])
@pytest.mark.parametrize('event', ['before_forward', 'after_forward', 'before_backward', 'after_batch', 'cleanup_forward'])
@pytest.mark.parametrize('error', [Stop, KeyboardInterrupt, CancelFit, CancelEpoch])
def test_errors_and_cancelled_fits(event, error, order):
    cb = ActivationStatsCB()
    learn = learner(cbs=[cb, Raise(event, error, order=order)])
    try: learn.fit(2, progress=False)
    except (Stop, KeyboardInterrupt): assert error in (Stop, KeyboardInterrupt)
    assert not hooks_on(learn.model)
    rows = {len(t) for t in tables(cb).values()}
    assert len(rows) == 1 and rows <= {13, 14} and [len(p) for p in cb.dead.values()] == [1]*7
    learn.cbs = [cb]
    learn.fit(1, progress=False)                                   # and the next fit goes on
    assert {len(t) for t in tables(cb).values()} == {rows.pop() + 9} and not hooks_on(learn.model)


def test_a_forward_pass_that_fails_or_is_skipped():
    class Fails(nn.Module):
        calls = 0
        def forward(self, x):
            self.calls += 1
            if self.calls == 5: raise Stop
            return x
    net = convnet(TORCH).append(Fails())
    cb = ActivationStatsCB()
    learn = learner(cbs=[cb], net=net)
    with pytest.raises(Stop): learn.fit(1, progress=False)
    assert not hooks_on(net) and {len(t) for t in tables(cb).values()} == {4} and cb.dead == {}
    cb = ActivationStatsCB()
    learner(cbs=[cb, Raise('before_forward', CancelBatch, order=-1)]).fit(2, progress=False)
    assert {len(t) for t in tables(cb).values()} == {17}


@pytest.mark.parametrize('error', [Stop, CancelFit, CancelEpoch])
def test_a_validation_that_does_not_finish_gives_no_share(error):
    cb = ActivationStatsCB()
    learn = learner(cbs=[cb, Raise('after_batch', error, batch=1, training=False)])
    try: learn.fit(2, progress=False)
    except Stop: pass
    assert [len(p) for p in cb.dead.values()] == [1]*7 and not hooks_on(learn.model)


def test_units_that_fired_in_an_unfinished_validation_are_forgotten():
    cb = ActivationStatsCB()
    learn, layer = fixed([torch.zeros(1, 2), torch.zeros(1, 2)])
    cb.modules = [layer]
    cb._fired = {'0': torch.tensor([True, True])}
    learn.fit(1, cbs=[cb], progress=False)
    assert cb.dead['0'] == [(2, 1.)]


def test_two_at_once():
    cbs = [ActivationStatsCB(), ActivationStatsCB(bins=10)]
    learner(cbs=cbs).fit(2, progress=False)
    a, b = cbs
    exact(a.means, b.means)
    exact(a.stds, b.stds)
    assert a.dead == b.dead and a.hists['0'].shape == (18, 80) and b.hists['0'].shape == (18, 10)


def test_what_others_do_with_the_model_is_not_recorded():
    class Busy(Callback):
        def after_batch(self, learn): learn.model(learn.xb)
        def before_backward(self, learn): learn.model(learn.xb)
        def after_epoch(self, learn): learn.predict(learn.xb)
    a, b = ActivationStatsCB(), ActivationStatsCB()
    learner(cbs=[a]).fit(1, progress=False)
    learn = learner(cbs=[b])
    learn.fit(1, cbs=[Busy()], progress=False)
    exact(tables(a), tables(b))
    assert a.dead == b.dead
    learn.evaluate()
    learn.predict(learn.dls[1])
    learn.fit(1, train=False, progress=False)
    exact(tables(a), tables(b))
    assert a.dead == b.dead


def test_without_validation_and_a_second_fit():
    cb = ActivationStatsCB()
    learn = learner(cbs=[cb])
    learn.train_dl, learn.valid_dl = learn.dls = learn.dls[0], None
    learn.fit(1, progress=False)
    learn.fit(2, progress=False)
    assert cb.dead == {} and {len(t) for t in tables(cb).values()} == {27}


def test_a_shared_module_has_one_entry_per_call():
    relu = nn.ReLU()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), relu, nn.Linear(6, 6), relu, nn.Linear(6, 3))
    cb = ActivationStatsCB({'relu': relu})
    learner(cbs=[cb], net=net).fit(1, progress=False)
    assert [*cb.means] == [*cb.dead] == ['relu', 'relu #2'] and not torch.equal(cb.means['relu'], cb.means['relu #2'])
    assert {len(t) for t in cb.means.values()} == {9} and [p[0][0] for p in cb.dead.values()] == [9, 9]


# ---- a run that is killed and resumed

class Save(Callback):
    "Ends the run with an error, with what a checkpoint holds"
    order = 1000
    def __init__(self, event, at):
        def call(learn):
            if (learn.epoch, learn.batch_idx) == at and (learn.training or event == 'after_epoch'):
                torch.save([o.state_dict() for o in (learn.model, learn.opt, learn, *learn.cbs)], file := io.BytesIO())
                self.saved = file.getvalue()
                raise Stop
        setattr(self, event, call)


@pytest.mark.parametrize('event, at', [('after_batch', (1, 0)), ('after_batch', (2, 4)), ('after_batch', (2, 8)),
                                       ('after_epoch', (1, 2)), ('after_epoch', (2, 2))])
def test_a_resumed_run_has_the_same_statistics(event, at):
    whole = ActivationStatsCB()
    learn = learner(cbs=[whole])
    learn.fit(3, progress=False)
    save = Save(event, at)
    with pytest.raises(Stop): learner(cbs=[ActivationStatsCB()]).fit(3, cbs=[save], progress=False)
    cb = ActivationStatsCB()
    again = learner(cbs=[cb])
    parts = torch.load(io.BytesIO(save.saved), weights_only=True)
    for o, state in zip((again.model, again.create_opt(), again, cb), parts, strict=True): o.load_state_dict(state)
    again.fit(3, progress=False)
    exact(tables(cb), tables(whole))
    assert cb.dead == whole.dead
    exact(again.model.state_dict(), learn.model.state_dict())


def test_checkpoints_on_the_disk(tmp_path):
    def run(folder, epochs, cbs=()):
        learn = learner(cbs=[cb := ActivationStatsCB()])
        return learn, cb, CheckpointCB(folder)
    learn, whole, ckpt = run(tmp_path/'a', 3)
    learn.fit(3, cbs=[ckpt], progress=False)
    learn, cb, ckpt = run(tmp_path/'b', 3)
    with pytest.raises(Stop): learn.fit(3, cbs=[ckpt, Raise('after_batch', Stop)], progress=False)
    learn, cb, ckpt = run(tmp_path/'b', 3)
    learn.cbs.append(ckpt)
    resume(learn, tmp_path/'b')
    learn.fit(3, progress=False)
    exact(tables(cb), tables(whole))
    assert cb.dead == whole.dead


def test_a_state_is_a_copy():
    cb = ActivationStatsCB()
    learn = learner(cbs=[cb])
    learn.fit(1, progress=False)
    state = cb.state_dict()
    lengths = lambda: ({len(t) for t in state['kept'].values()}, {len(p) for p in state['dead'].values()})
    other = ActivationStatsCB()
    other.load_state_dict(state)
    learn.fit(1, progress=False)
    assert lengths() == ({9}, {1})
    learner(cbs=[other]).fit(1, progress=False)
    assert lengths() == ({9}, {1}) and {len(t) for t in tables(other).values()} == {18}
    assert ActivationStatsCB().state_dict() == {'kept': {}, 'dead': {}}


def test_a_loaded_state_replaces_what_was_recorded():
    cb, other = ActivationStatsCB(), ActivationStatsCB()
    learner(cbs=[cb]).fit(1, progress=False)
    state = other.state_dict()
    cb.load_state_dict(state)
    assert cb.means == {} and cb.dead == {}


def test_copies_of_the_callback():
    cb = ActivationStatsCB(bins=7)
    learner(cbs=[cb]).fit(1, progress=False)
    for twin in copy.deepcopy(cb), pickle.loads(pickle.dumps(cb)): exact(tables(twin), tables(cb))


# ---- plots

@pytest.fixture
def plt():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plt.close('all')
    yield plt
    plt.close('all')


def test_plots(plt):
    cb = ActivationStatsCB(low=-2, high=3)
    learner(cbs=[cb]).fit(2, progress=False)
    axes = cb.plot()
    assert [ax.get_ylabel() for ax in axes] == ['mean', 'standard deviation', 'share of dead units'] and len(plt.get_fignums()) == 1
    assert [len(ax.lines) for ax in axes] == [7, 7, 7] and {ax.get_xlabel() for ax in axes} == {'batches'}
    assert [ax.get_subplotspec().colspan.start for ax in axes] == [0, 1, 2]
    names = [text.get_text() for text in axes[2].get_legend().get_texts()]
    assert names == [*cb.means] and axes[1].get_yscale() == 'log' and axes[0].get_legend() is None
    for ax, kind in zip(axes, (cb.means, cb.stds)):
        for line, values in zip(ax.lines, kind.values()): assert_close(torch.as_tensor(line.get_ydata()).float(), values)
    assert [x for x in axes[2].lines[0].get_xdata()] == [9, 18] and axes[2].get_xlim()[0] == 0
    assert axes[2].get_ylim() == (-.05, 1.05)
    axes = cb.plot_hists()
    drawn = axes[0, 0].figure.axes
    assert axes.shape == (2, 4) and len(drawn) == 7 and [ax.get_title() for ax in drawn] == [*cb.means] and len(plt.get_fignums()) == 2
    image = drawn[0].images[0]
    assert [*image.get_extent()] == [0, 18, -2, 3] and image.origin == 'lower'
    assert_close(torch.as_tensor(image.get_array().data).float(), cb.hists['0'].T.log1p())
    assert {ax.get_xlabel() for ax in drawn} == {'batches'}
    assert [ax.get_ylabel() for ax in drawn] == ['activation', '', '', '', 'activation', '', '']
    assert drawn[5].get_shared_x_axes().joined(drawn[0], drawn[5]) and drawn[5].get_shared_y_axes().joined(drawn[0], drawn[5])


def test_plots_of_one_layer_without_validation(plt):
    learn = learner()
    learn.train_dl, learn.valid_dl = learn.dls = learn.dls[0], None
    cb = ActivationStatsCB([learn.model[1]])
    learn.fit(1, cbs=[cb], progress=False)
    axes = cb.plot()
    assert axes[0].get_legend() is not None and not axes[2].lines and cb.plot_hists().shape == (1, 1)


def test_importing_draws_nothing():
    code = 'import sys, miniai.activations; assert "matplotlib" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)


def test_dead_relus_of_a_real_net_are_found():
    net = convnet(TORCH)
    with torch.no_grad(): net[0].bias[:2] = -1e3
    cb = ActivationStatsCB({'relu': net[1]})
    learn = learner(cbs=[cb], net=net, lr=.01)
    learn.fit(1, progress=False)
    assert cb.dead['relu'][0][1] >= .5
    F.cross_entropy(net(learn.dls[1].dataset.x), learn.dls[1].dataset.y).backward()
    assert (net[0].weight.grad[:2] == 0).all()

"What must hold of the normalization layers and dropout beyond the chapter: shapes, buffers, types, switches."
import copy
import io
import pickle

import pytest
import torch
from common import gen, x, y
from torch import nn
from torch.testing import assert_close

from miniai.checkpoints import CheckpointCB
from miniai.gradcheck import check_grads
from miniai.learner import Callback, Learner
from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, ReLU, Sequential, check_twin
from miniai.norm import BatchNorm1d, BatchNorm2d, Dropout, GroupNorm, LayerNorm
from miniai.optim import AdamW
from miniai.training import get_dls

f64 = dict(dtype=torch.float64)
CL = torch.channels_last


def randn(*shape, seed=0, **kind): return torch.randn(shape, generator=gen(seed), **kind or f64)


def random_state(m, seed=1):
    "Other parameters and running statistics than the first ones"
    for i, t in enumerate(m.state_dict().values()):
        if t.is_floating_point(): t.copy_(torch.rand(t.shape, generator=gen(seed + i), **f64) + .5)
        else: t.fill_(3)
    return m


def twins(ours, theirs, *xs, **kwargs): check_twin(ours, random_state(theirs), *xs, rtol=1e-12, atol=1e-12, **kwargs)


batches = {1: {'(2,1)': randn(2, 1), '(7,5)': randn(7, 5), '(1,2,3)': randn(1, 2, 3), '(3,4,5)': randn(3, 4, 5), '(2,3,1)': randn(2, 3, 1)},
           2: {'(2,1,1,1)': randn(2, 1, 1, 1), '(1,3,2,1)': randn(1, 3, 2, 1), '(3,5,4,7)': randn(3, 5, 4, 7),
               'channels_last': randn(3, 5, 4, 7).to(memory_format=CL), 'transposed': randn(3, 5, 4, 7).transpose(2, 3),
               'expanded': randn(3, 5, 1, 1).expand(3, 5, 2, 2)}}
cases = [pytest.param(d, x, id=f'{d}d {name}') for d, xs in batches.items() for name, x in xs.items()]
kinds = {1: (BatchNorm1d, nn.BatchNorm1d), 2: (BatchNorm2d, nn.BatchNorm2d)}


options = [{}, dict(eps=.1), dict(momentum=.3), dict(momentum=0.), dict(momentum=None), dict(affine=False)]


@pytest.mark.parametrize('options', options, ids=str)
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('d, x', cases)
def test_batchnorm_equals_torch(d, x, training, options):
    ours, theirs = (kind(x.shape[1], **options, **f64).train(training) for kind in kinds[d])
    twins(ours, theirs, x)
    twins(ours, theirs, 5*x - 3)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('kind', [BatchNorm1d, BatchNorm2d])
def test_one_example(kind, training):
    twins = {BatchNorm1d: nn.BatchNorm1d, BatchNorm2d: nn.BatchNorm2d}
    x = randn(1, 3, *(4, 5)[:2 if kind is BatchNorm2d else 1])
    check_twin(kind(3, **f64).train(training), random_state(twins[kind](3, **f64)).train(training), x, rtol=1e-12)


@pytest.mark.parametrize('value', [0., 1., -3., 1e4])
def test_constant_channels(value):
    "Variance 0: the output is the bias, and no gradient is infinite"
    x = randn(4, 3, 2, 2)
    x[:, 1] = value
    if value < 1e4: twins(BatchNorm2d(3, **f64), nn.BatchNorm2d(3, **f64), x)  # at 1e4 PyTorch's has an error of 1e-11
    bn = random_state(BatchNorm2d(3, **f64))
    x.requires_grad_()
    out = bn(x)
    assert_close(out[:, 1], bn.bias[1].expand(4, 2, 2))
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    for m, shape in ((LayerNorm(4, **f64), (2, 4)), (GroupNorm(2, 4, **f64), (2, 4, 2))):
        assert_close(m(torch.full(shape, value, **f64)), torch.zeros(shape, **f64))


@pytest.mark.parametrize('kind, shape', [(BatchNorm1d, (1, 3)), (BatchNorm1d, (1, 3, 1)), (BatchNorm2d, (1, 3, 1, 1)),
                                         (BatchNorm1d, (0, 3)), (BatchNorm2d, (2, 3, 0, 4))])
def test_one_value_per_channel(kind, shape):
    bn, x = kind(3), torch.ones(shape)
    before = copy.deepcopy(bn.state_dict())
    with pytest.raises(ValueError, match=r'at least 2 values per channel in training.*shape \(.*eval'): bn(x)
    assert_close(bn.state_dict(), before, rtol=0, atol=0)
    assert bn.eval()(x).shape == shape


def test_torch_raises_too_for_one_value():
    with pytest.raises(ValueError): nn.BatchNorm1d(3)(torch.ones(1, 3))


@pytest.mark.parametrize('layer, shapes, message', [
    (BatchNorm1d(3), [(3,), (2, 4), (2, 1), (2, 3, 4, 5), (3, 2, 3, 1)], r'must be \(n,c\) or \(n,c,l\) with c=3'),
    (BatchNorm2d(3), [(2, 3), (2, 3, 4), (2, 1, 4, 4), (2, 4, 3, 3), (2, 3, 2, 2, 2)], r'must be \(n,c,h,w\) with c=3'),
    (LayerNorm((2, 3)), [(3,), (3, 2), (4, 1, 3), (4, 2, 1)], r'last dimensions must be \(2, 3\)'),
    (LayerNorm(3), [(2, 1), (), (3, 2)], r'last dimensions must be \(3,\)'),
    (GroupNorm(2, 4), [(4,), (2, 2), (2, 1, 4), (2, 8)], r'must be \(n,c,…\) with c=4')])
def test_wrong_shapes(layer, shapes, message):
    for shape in shapes:
        with pytest.raises(ValueError, match=message) as e: layer(torch.ones(shape))
        assert str(tuple(shape)) in str(e.value) and type(layer).__name__ in str(e.value)


@pytest.mark.parametrize('make', [
    lambda: BatchNorm2d(3, track_running_stats=False), lambda: BatchNorm1d(3, 1e-5, .1, True, True), lambda: BatchNorm2d(),
    lambda: BatchNorm2d(3, bias=False), lambda: GroupNorm(1, 3, bias=False), lambda: Dropout(.5, True), lambda: Dropout(.5, inplace=True)])
def test_options_that_we_lack_raise(make):
    with pytest.raises(TypeError): make()


def test_wrong_options():
    for p in -.1, 1.1, float('nan'):
        with pytest.raises(ValueError, match=f'Dropout: p is {p}, must be from 0 to 1'): Dropout(p)
    with pytest.raises(ValueError, match='GroupNorm: 6 channels do not divide into 4 equal groups'): GroupNorm(4, 6)


def test_buffers_travel_both_ways():
    x, kind = randn(6, 3, 2, 2), f64
    for affine in (True, False):
        ours, theirs = (m(3, affine=affine, **kind) for m in kinds[2])
        forms = [[(k, v.shape, v.dtype) for k, v in m.state_dict().items()] for m in (ours, theirs)]
        assert forms[0] == forms[1]
        for a, b in ((ours, theirs), (theirs, ours)):
            for seed in range(3): a(randn(6, 3, 2, 2, seed=seed))
            b.load_state_dict(a.state_dict())
            assert_close(b.state_dict(), a.state_dict(), rtol=0, atol=0)
            assert_close(b.eval()(x), a.eval()(x), rtol=1e-12, atol=1e-13)
            for m in (a, b): m.train()
    assert ours.num_batches_tracked == 6 and ours.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize('momentum', [.1, .5, None])
def test_train_and_eval_in_turn(momentum):
    ours, theirs = (kind(3, momentum=momentum, **f64) for kind in kinds[2])
    opts = [torch.optim.SGD(m.parameters(), lr=.1) for m in (ours, theirs)]
    for i, training in enumerate((True, True, False, True, False, False, True)):
        outs = [m.train(training)(3*randn(4, 3, 2, 5, seed=i) + i) for m in (ours, theirs)]
        for out, opt in zip(outs, opts):
            opt.zero_grad()
            out.sin().sum().backward()
            opt.step()
        assert_close(*outs, rtol=1e-11, atol=1e-12)
        assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-11, atol=1e-12)


def test_the_mode_of_the_forward_pass_counts():
    "A layer switched between forward and backward has the gradient of its forward pass"
    for first in (True, False):
        grads = []
        for m in (BatchNorm2d(3, **f64), nn.BatchNorm2d(3, **f64), BatchNorm2d(3, **f64)):
            x = randn(4, 3, 2, 2).requires_grad_()
            out = m.train(first)(x)
            if len(grads) < 2: m.train(not first)
            out.sin().sum().backward()
            grads.append(x.grad)
        assert_close(grads[0], grads[2], rtol=0, atol=0)
    x = randn(4, 3, 2, 2).requires_grad_()
    bn = BatchNorm2d(3, **f64)
    out = bn.eval()(x)
    bn.train()(x + 5)  # changes the running statistics before the backward pass
    out.sum().backward()
    assert_close(x.grad, torch.full_like(x, (1 + 1e-5)**-.5))


def test_eval_changes_no_buffer():
    bn = random_state(BatchNorm2d(3, **f64)).eval()
    before = copy.deepcopy(bn.state_dict())
    bn(randn(4, 3, 2, 2))
    assert_close(bn.state_dict(), before, rtol=0, atol=0)


def test_running_statistics_by_hand():
    bn = BatchNorm1d(1, momentum=.5, **f64)
    bn(torch.tensor([[1.], [5.]], **f64))  # mean 3, variance 4, unbiased 8
    assert bn.running_mean == 1.5 and bn.running_var == .5 + 4 and bn.num_batches_tracked == 1
    plain = BatchNorm1d(1, momentum=None, **f64)
    for values in ([1., 5.], [0., 2.], [4., 4.]): plain(torch.tensor(values, **f64)[:, None])
    assert_close(plain.running_mean, torch.tensor([8/3], **f64))
    assert_close(plain.running_var, torch.tensor([(8 + 2 + 0)/3], **f64))


def test_the_running_statistics_are_outside_the_graph():
    "Also in a subclass whose forward is recorded by autograd"
    class Net(BatchNorm2d):
        bwd = None
        def forward(self, x): return super().forward(x)[0]
    net, x = Net(3, **f64), randn(4, 3, 2, 2).requires_grad_()
    for _ in range(2): net(x).sin().sum().backward()
    assert not net.running_mean.requires_grad and not net.running_var.requires_grad and net.num_batches_tracked == 2
    layer, y = BatchNorm2d(3, **f64), x.detach().clone().requires_grad_()
    for _ in range(2): layer(y).sin().sum().backward()
    assert_close(x.grad, y.grad)
    assert_close(net.state_dict(), layer.state_dict())


makers = {'bn1': lambda: BatchNorm1d(4, **f64), 'bn1 eval': lambda: BatchNorm1d(4, **f64).eval(),
          'bn1 plain': lambda: BatchNorm1d(4, affine=False, **f64),
          'ln': lambda: LayerNorm((4, 3), **f64), 'ln last': lambda: LayerNorm(3, **f64),
          'ln no bias': lambda: LayerNorm(3, bias=False, **f64), 'ln plain': lambda: LayerNorm(3, elementwise_affine=False, **f64),
          'gn': lambda: GroupNorm(2, 4, **f64), 'gn plain': lambda: GroupNorm(4, 4, affine=False, **f64)}


@pytest.mark.parametrize('make', makers.values(), ids=makers)
def test_central_differences(make):
    m, x = random_state(make()), randn(3, 4, 3)
    names = [name for name, _ in m.named_parameters()]

    def func(x, *params):
        m.load_state_dict(start)
        return torch.func.functional_call(m, dict(zip(names, params)), (x,)).sin().mul(weights).sum()
    weights, start = randn(3, 4, 3, seed=7), copy.deepcopy(m.state_dict())
    check_grads(func, [x, *(p.detach() for p in m.parameters())])


@pytest.mark.parametrize('shape, x', [
    ((5,), randn(3, 5)), (5, randn(5)), ((1,), randn(3, 1)), ([2, 3], randn(4, 2, 3)), ((2, 3), randn(2, 3)), (3, randn(0, 3)),
    ((4, 2, 3), randn(2, 5, 4, 2, 3)), (torch.Size([5]), randn(1, 5)), ((3, 4), randn(2, 4, 3).transpose(1, 2))])
@pytest.mark.parametrize('options', [{}, dict(eps=.1), dict(bias=False), dict(elementwise_affine=False)], ids=str)
def test_layernorm_equals_torch(shape, x, options):
    ours, theirs = LayerNorm(shape, **options, **f64), nn.LayerNorm(shape, **options, **f64)
    twins(ours, theirs, x)
    twins(ours.eval(), theirs.eval(), 5*x - 3)


@pytest.mark.parametrize('groups, x', [
    (1, randn(3, 4)), (2, randn(3, 4)), (1, randn(1, 1, 2)), (2, randn(1, 6, 5)), (3, randn(2, 6, 5, 4)), (6, randn(2, 6, 5, 4)),
    (1, randn(2, 6, 5, 4)), (3, randn(2, 6, 5, 4).to(memory_format=CL)), (2, randn(2, 4, 3, 2, 2)), (2, randn(2, 3, 5, 4).transpose(1, 3))])
@pytest.mark.parametrize('options', [{}, dict(eps=.1), dict(affine=False)], ids=str)
def test_groupnorm_equals_torch(groups, x, options):
    ours, theirs = (kind(groups, x.shape[1], **options, **f64) for kind in (GroupNorm, nn.GroupNorm))
    twins(ours, theirs, x)
    twins(ours.eval(), theirs.eval(), 5*x - 3)


@pytest.mark.parametrize('m', [BatchNorm2d(8), BatchNorm2d(8).eval(), GroupNorm(4, 8), LayerNorm((8, 6, 6)), Dropout(.3),
                               Dropout(.3).eval()], ids=str)
def test_channels_last_is_kept(m):
    x = randn(4, 8, 6, 6, dtype=torch.float32).to(memory_format=CL).requires_grad_()
    out = m(x)
    out.backward(torch.ones_like(out))
    assert out.is_contiguous(memory_format=CL) and x.grad.is_contiguous(memory_format=CL)


@pytest.mark.parametrize('mean', [0., 1e3, 1e5])
def test_large_means_in_float32(mean):
    "The deviations are squared, not the values: the result is right up to a few roundings of the mean"
    x = randn(64, 3, 4, 4) + mean
    want = nn.BatchNorm2d(3, **f64)(x.float().double())
    assert_close(BatchNorm2d(3)(x.float()).double(), want, rtol=0, atol=1e-6 + 4e-7*mean)
    bn = BatchNorm2d(3, momentum=1.)
    bn(x.float())
    assert_close(bn.running_var.double(), x.float().double().var((0, 2, 3)), rtol=2e-4, atol=0)
    for ours, theirs, v in ((LayerNorm(48), nn.LayerNorm(48, **f64), x.flatten(1)),
                            (GroupNorm(3, 6), nn.GroupNorm(3, 6, **f64), x.view(64, 6, 8))):
        assert_close(ours(v.float()).double(), theirs(v.float().double()), rtol=0, atol=1e-6 + 4e-7*mean)


pairs = {'bn': (BatchNorm2d(8), nn.BatchNorm2d(8)), 'bn eval': (BatchNorm2d(8).eval(), nn.BatchNorm2d(8).eval()),
         'bn plain': (BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, affine=False)),
         'ln': (LayerNorm(6), nn.LayerNorm(6)), 'gn': (GroupNorm(2, 8), nn.GroupNorm(2, 8)),
         'ln plain': (LayerNorm((6, 6), elementwise_affine=False), nn.LayerNorm((6, 6), elementwise_affine=False))}


@pytest.mark.parametrize('ours, theirs', pairs.values(), ids=pairs)
def test_autocast(ours, theirs):
    "bfloat16 in and out, statistics and parameters in float32: near the result in float32, and near PyTorch's, whose LayerNorm is 4% off"
    x, results = (3*randn(16, 8, 6, 6) + 10).bfloat16(), []
    for m, on in ((ours, True), (theirs, True), (theirs, False)):
        m, leaf = copy.deepcopy(m), x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=on): out = m(leaf if on else leaf.float())
        out.backward(randn(16, 8, 6, 6, seed=5).bfloat16().to(out))
        assert out.dtype == (torch.bfloat16 if on else torch.float32)
        assert all(t.dtype == torch.float32 for t in m.state_dict().values() if t.is_floating_point())
        results.append([out, leaf.grad, *(p.grad for p in m.parameters()), *m.state_dict().values()])
    for got, near, exact in ([t.float() for t in ts] for ts in zip(*results)):
        scale = exact.abs().max()
        assert (got - exact).abs().max() <= .004*scale and (got - near).abs().max() <= .05*scale


def test_all_in_bfloat16():
    x = randn(16, 8, 6, 6, dtype=torch.float32)
    for ours, theirs in pairs.values():
        a, b = (copy.deepcopy(m).bfloat16()(x.bfloat16()) for m in (ours, theirs))
        assert a.dtype == b.dtype == torch.bfloat16 and (a - b).abs().max() < .05


def test_integers_raise():
    for m in BatchNorm1d(3), LayerNorm(3), GroupNorm(3, 3), Dropout():
        with pytest.raises(RuntimeError): m(torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize('make', [lambda: BatchNorm1d(4, **f64), lambda: LayerNorm(4, **f64), lambda: GroupNorm(2, 4, **f64)])
def test_double_use(make):
    "One layer called twice in one pass; nothing is kept on it in between"
    ours, results = make(), []
    theirs = {BatchNorm1d: nn.BatchNorm1d(4, **f64), LayerNorm: nn.LayerNorm(4, **f64), GroupNorm: nn.GroupNorm(2, 4, **f64)}[type(ours)]
    attributes = set(vars(ours))
    for m in ours, theirs:
        x = randn(5, 4).requires_grad_()
        m(m(x).sin()*3 + x).square().sum().backward()
        results.append([x.grad, m.weight.grad, m.bias.grad, *m.buffers()])
    assert_close(*results, rtol=1e-11, atol=1e-12)
    assert set(vars(ours)) == attributes


@pytest.mark.parametrize('make', [lambda: BatchNorm1d(4), lambda: BatchNorm1d(4, affine=False), lambda: LayerNorm(4),
                                  lambda: GroupNorm(2, 4), lambda: Dropout(.5)])
def test_copies(make):
    m, x = make(), randn(5, 4, dtype=torch.float32)
    m(x)
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    for other in copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(buffer, weights_only=False):
        assert_close(other.state_dict(), m.state_dict(), rtol=0, atol=0)
        before = copy.deepcopy(m.state_dict())
        torch.manual_seed(0)
        got = other(2*x)
        assert_close(m.state_dict(), before, rtol=0, atol=0)  # a copy has buffers of its own
        torch.manual_seed(0)
        assert_close(copy.deepcopy(m)(2*x), got, rtol=0, atol=0)


def test_frozen_parameters_and_inputs():
    for m in BatchNorm1d(4, **f64), LayerNorm(4, **f64), GroupNorm(2, 4, **f64):
        m.weight.requires_grad_(False)
        m(randn(5, 4)).sum().backward()
        assert m.weight.grad is None and m.bias.grad is not None
    m.bias.requires_grad_(False)
    assert not m(randn(5, 4)).requires_grad


def test_repr():
    assert repr(BatchNorm2d(3)) == 'BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True)'
    assert repr(GroupNorm(2, 4)) == 'GroupNorm(2, 4, eps=1e-05, affine=True)'
    assert repr(LayerNorm(3, bias=False)) == 'LayerNorm((3,), eps=1e-05, elementwise_affine=True, bias=False)'
    assert repr(Dropout(.2)) == 'Dropout(p=0.2)'


@pytest.mark.parametrize('p', [0., .1, .5, .9, 1.])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_equals_torch_with_the_same_random_numbers(p, dtype):
    results = []
    for m in Dropout(p), nn.Dropout(p):
        for training in (True, False):
            torch.manual_seed(3)
            x = randn(40, 5).to(dtype).requires_grad_()
            out = m.train(training)(x)
            out.backward(torch.arange(200, dtype=dtype).view(40, 5))
            results.append((out, x.grad))
    for got, want in zip(results[:2], results[2:]):
        assert_close(got, want, rtol=0, atol=0)


def test_dropout_after_eval_returns_its_input():
    x = randn(4, 3)
    with torch.no_grad(): assert Dropout(.5).eval()(x).data_ptr() == x.data_ptr() == Dropout(0.)(x).data_ptr()


def test_dropout_masks():
    x = torch.ones(1000, 100)
    torch.manual_seed(0)
    m = Dropout(.3)
    a, b = m(x), m(x)
    assert not torch.equal(a, b) and set(a.unique().tolist()) == {0., torch.tensor(1/.7).item()}
    assert abs((a == 0).float().mean() - .3) < .01 and abs(a.mean() - 1) < .01
    assert abs(((a == 0) & (b == 0)).float().mean() - .09) < .01
    check_twin(Sequential(Dropout(1.)), nn.Sequential(nn.Dropout(1.)), randn(3, 2))
    check_twin(Dropout(.5).eval(), nn.Dropout(.5).eval(), randn(3, 2))
    assert Dropout()(torch.ones(0, 3)).shape == (0, 3)


def test_gradient_checkpointing():
    "A second forward pass inside the backward pass draws the same mask"
    from torch.utils.checkpoint import checkpoint
    x = randn(50, 4).requires_grad_()
    torch.manual_seed(0)
    out = checkpoint(Dropout(.5), x, use_reentrant=False)
    out.sum().backward()
    assert_close(x.grad*x.detach(), out.detach())


def learner(seed, *cbs):
    torch.manual_seed(seed)
    net = Sequential(Linear(9, 8), BatchNorm1d(8), ReLU(), Dropout(.3), LayerNorm(8), Linear(8, 3))
    dls = get_dls((x, y), (x[:40], y[:40]), 16, gen(seed))
    return Learner(net, dls, CrossEntropyLoss(label_smoothing=.05), AdamW, .01, cbs)


class Stop(Callback):
    def after_batch(self, learn):
        if learn.training and (learn.epoch, learn.batch_idx) == (2, 5): raise RuntimeError('stop')


def test_resume_bit_for_bit(tmp_path):
    "A run that stops in the second epoch continues with the same buffers and the same masks"
    unbroken = learner(1)
    records = unbroken.fit(3, progress=False)
    with pytest.raises(RuntimeError, match='stop'): learner(1, CheckpointCB(tmp_path, 4), Stop()).fit(3, progress=False)
    again = learner(2, CheckpointCB(tmp_path, 4, resume=True))
    got = again.fit(3, progress=False)
    assert [{**r, 'seconds': 0} for r in got] == [{**r, 'seconds': 0} for r in records]
    for k, t in unbroken.model.state_dict().items(): assert torch.equal(again.model.state_dict()[k], t), k

"""What must hold of the layers of chapter 11 beyond the chapter: twins at odd shapes and layouts, gradients by differences, faults.

Almost all is in float64, where a relative difference of 1e-12 shows that two computations are the same."""
import copy
import math
import pickle
import random
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import miniai.conv as ours
from miniai.conv import AdaptiveAvgPool2d, AvgPool2d, Conv2d, MaxPool2d, out_size
from miniai.gradcheck import check_grads
from miniai.module import Flatten, Linear, ReLU, Sequential, check_twin

f64 = dict(dtype=torch.float64)
channels_last = torch.channels_last
LAYERS = 'Conv2d', 'MaxPool2d', 'AvgPool2d', 'AdaptiveAvgPool2d'


def images(n, c, h, w, dtype=torch.float64, seed=0):
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed), **f64).to(dtype)


LAYOUTS = {'contiguous': lambda x: x, 'channels_last': lambda x: x.to(memory_format=channels_last),
           'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)}
in_each_layout = pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)

VIEWS = {  # of images of 9 x 8 with 8 channels
    'every second pixel': lambda x: x[:, :, ::2, ::2],
    'a crop': lambda x: x[:, :, 1:-1, 2:],
    'some channels': lambda x: x[:, 1:4],
    'every second channel': lambda x: x[:, ::2],
    'every second example': lambda x: x[::2],
    'turned': lambda x: x.transpose(2, 3),
    'one channel for all': lambda x: x[:, :1].expand(-1, 4, -1, -1),
    'one example for all': lambda x: x[:1].expand(3, -1, -1, -1),
    'channels from examples': lambda x: x.transpose(0, 1),
    'a crop in channels_last': lambda x: x.to(memory_format=channels_last)[:, :, 1:, :-1],
}


def twins(build, x, view=lambda t: t, rtol=1e-12, atol=1e-12):
    "Output and gradients of `build(ours)` and `build(nn)` for a view of `x`, compared; returns both outputs and gradients of `x`"
    theirs, mine, found = build(nn), build(ours), []
    mine.load_state_dict(theirs.state_dict())
    for m in theirs, mine:
        leaf = x.clone().requires_grad_()
        out = m(view(leaf))
        out.backward(torch.arange(1, 1 + out.numel()).cos().view(out.shape).to(out))
        found.append((out.detach(), leaf.grad, *(p.grad for p in m.parameters())))
    for a, b in zip(found[1], found[0], strict=True): assert_close(a, b, rtol=rtol, atol=atol)
    return found[1], found[0]


# ---- twins

CONVS = {  # in_channels, out_channels, kernel_size, stride, padding, images
    'one pixel, one channel, one example': (1, 1, 1, 1, 0, (1, 1, 1)),
    'one output pixel': (3, 4, 5, 1, 0, (2, 5, 5)),
    'padding': (2, 3, 3, 1, 1, (2, 6, 6)),
    'a stride that leaves one row': (3, 4, 3, 2, 1, (2, 8, 7)),
    'a stride that leaves two rows, no columns': (3, 4, 3, 3, 0, (2, 8, 9)),
    'a stride larger than the kernel': (2, 3, 2, 4, 0, (2, 9, 12)),
    'even kernel': (2, 3, 2, 1, 1, (2, 5, 6)),
    'kernel of four, stride two': (2, 3, 4, 2, 1, (2, 9, 8)),
    'pairs': (2, 5, (2, 3), (3, 2), (1, 0), (3, 9, 6)),
    'a row': (2, 3, (1, 5), 1, (0, 2), (2, 3, 8)),
    'a column': (2, 3, (3, 1), (2, 1), (1, 0), (2, 8, 3)),
    'kernel larger than the image': (1, 2, 5, 1, 2, (1, 3, 3)),
    'kernel larger than the image, stride': (2, 3, 5, 2, 2, (2, 2, 4)),
    'padding larger than the kernel': (2, 3, 2, 2, 3, (1, 3, 4)),
    '1 x 1': (3, 4, 1, 1, 0, (2, 4, 5)),
    '1 x 1, stride': (3, 4, 1, 2, 0, (2, 7, 6)),
    '1 x 1, two strides': (3, 4, 1, (2, 3), 0, (2, 6, 7)),
    '1 x 1, stride and padding': (3, 4, 1, (2, 3), (1, 0), (2, 6, 7)),
    'one example': (3, 2, 3, 2, 1, (1, 7, 9)),
    'one output channel': (3, 1, 3, 1, 1, (2, 5, 4)),
    'one input channel': (1, 4, 5, 2, 2, (3, 9, 10)),
    'eight channels': (8, 3, 3, 1, 1, (2, 6, 7)),
    'sixteen channels, pairs': (16, 3, (2, 3), (3, 2), (1, 0), (3, 9, 6)),
    'seventeen channels': (17, 2, 3, 1, 1, (2, 4, 5)),
    'sixteen channels, a stride that leaves a row': (16, 2, 3, 2, 1, (2, 8, 6)),
    'sixteen channels, one example, one pixel': (16, 2, 3, 1, 1, (1, 1, 1)),
    'eight channels, 1 x 1': (8, 3, 1, 2, 0, (2, 5, 6)),
}
each_conv = pytest.mark.parametrize('args', CONVS.values(), ids=CONVS)


@each_conv
@in_each_layout
def test_conv_is_a_twin(args, layout):
    *sizes, (n, h, w) = args
    check_twin(Conv2d(*sizes, **f64), nn.Conv2d(*sizes, **f64), layout(images(n, sizes[0], h, w)), rtol=1e-12)


@each_conv
def test_conv_in_float32_is_near(args):  # other kernels of PyTorch than in float64
    *sizes, (n, h, w) = args
    for layout in LAYOUTS.values():
        x = layout(images(n, sizes[0], h, w, torch.float32))
        check_twin(Conv2d(*sizes), nn.Conv2d(*sizes), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('channels', [1, 3, 8, 24, 48])
@in_each_layout
def test_conv_of_a_usual_size_in_float32(channels, layout):  # large enough for PyTorch's fast kernels
    x = layout(images(16, channels, 14, 14, torch.float32))
    for kernel, stride, padding in (3, 1, 1), (3, 2, 1), (5, 1, 0), (1, 1, 0), (1, 2, 0):
        sizes = channels, 12, kernel, stride, padding
        check_twin(Conv2d(*sizes), nn.Conv2d(*sizes), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('seed', range(30))
def test_conv_of_random_sizes(seed):
    draw = random.Random(seed)
    pair = lambda low, high: (draw.randint(low, high), draw.randint(low, high))
    kernel, stride, padding = pair(1, 4), pair(1, 3), pair(0, 2)
    h, w = (max(1, k - 2*p) + draw.randint(0, 6) for k, p in zip(kernel, padding))
    sizes = draw.choice([1, 2, 3, 16, 18]), draw.randint(1, 4), kernel, stride, padding
    x = draw.choice(list(LAYOUTS.values()))(images(draw.randint(1, 3), sizes[0], h, w))
    check_twin(Conv2d(*sizes, **f64), nn.Conv2d(*sizes, **f64), x, rtol=1e-12)


@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize('kernel, stride, padding', [(3, 1, 1), (2, 2, 0), (1, 1, 0), (1, 2, 0)])
def test_conv_of_a_view(view, kernel, stride, padding):
    x = images(8, 8, 9, 8)
    c = view(x).shape[1]
    twins(lambda k: k.Conv2d(c, 5, kernel, stride, padding, **f64), x, view)


POOLS = {  # kernel_size, stride, padding
    'halves': (2,), 'overlap': (3, 2), 'overlap and padding': (3, 2, 1), 'every pixel': (3, 1, 1), 'gaps': (2, 3),
    'pairs': ((2, 3), (1, 2), (1, 0)), 'rows': ((1, 4), (2, 1), (0, 2)), 'one pixel': (1,), 'one pixel, stride': (1, 2),
    'large': (5, 4, 2), 'four, padding of two': (4, 2, 2),
}
each_pool = pytest.mark.parametrize('args', POOLS.values(), ids=POOLS)
pool_layers = pytest.mark.parametrize('name', ['MaxPool2d', 'AvgPool2d'])
VALUES = {'plain': lambda x: x, 'zeros, as after a ReLU': lambda x: x.relu(), 'all negative': lambda x: -x.abs() - 1,
          'all equal': lambda x: x*0, 'whole numbers': lambda x: x.round(), 'both zeros': lambda x: (x > 0)*0.*x.sign()}


@pool_layers
@each_pool
@in_each_layout
def test_pool_is_a_twin(name, args, layout):
    for shape in (2, 3, 9, 8), (1, 1, 5, 5), (3, 8, 6, 11):
        check_twin(getattr(ours, name)(*args), getattr(nn, name)(*args), layout(images(*shape)), rtol=1e-12)


@pool_layers
@pytest.mark.parametrize('values', VALUES.values(), ids=VALUES)
@in_each_layout
def test_pool_of_ties_and_signs(name, values, layout):
    x = layout(values(images(2, 3, 9, 8)))
    for args in POOLS.values(): check_twin(getattr(ours, name)(*args), getattr(nn, name)(*args), x, rtol=1e-12)


def test_max_pool_gives_a_tie_to_the_first_pixel():
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    MaxPool2d(2)(x).sum().backward()
    assert_close(x.grad, torch.tensor([[[[1., 0], [0, 0]]]]))


def test_max_pool_adds_where_windows_overlap():
    x = torch.tensor([[[[0., 9, 0]]]], requires_grad=True)
    MaxPool2d((1, 2), 1)(x).sum().backward()
    assert_close(x.grad, torch.tensor([[[[0., 2, 0]]]]))


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_pools_of_numbers_that_are_not_finite(value):
    x = images(2, 3, 6, 7)
    x[0, 0, 0, 0] = x[1, 2, 3, 3] = value
    for name in 'MaxPool2d', 'AvgPool2d':
        assert_close(getattr(ours, name)(3, 2, 1)(x), getattr(nn, name)(3, 2, 1)(x), equal_nan=True)
    assert_close(AdaptiveAvgPool2d(2)(x), nn.AdaptiveAvgPool2d(2)(x), equal_nan=True)
    assert_close(MaxPool2d(3, 2, 1)(x*0 - math.inf), nn.MaxPool2d(3, 2, 1)(x*0 - math.inf), equal_nan=True)


SIZES = {'1': 1, '2': 2, '3': 3, 'a pair': (2, 5), 'as the image': (9, 8), 'a row': (1, 4), 'a column': (4, 1),
         'more than the image': (12, 3)}


@pytest.mark.parametrize('size', SIZES.values(), ids=SIZES)
@in_each_layout
def test_adaptive_pool_is_a_twin(size, layout):
    for shape in (2, 3, 9, 8), (1, 1, 5, 7), (1, 8, 1, 1):
        check_twin(AdaptiveAvgPool2d(size), nn.AdaptiveAvgPool2d(size), layout(images(*shape)), rtol=1e-12)


@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
def test_pools_of_a_view(view):
    x = images(8, 8, 9, 8).relu()
    for args in POOLS.values():
        for name in 'MaxPool2d', 'AvgPool2d': twins(lambda k, name=name, args=args: getattr(k, name)(*args), x, view)
    for size in SIZES.values(): twins(lambda k, size=size: k.AdaptiveAvgPool2d(size), x, view)


@pytest.mark.parametrize('size, kernel, stride, padding', [((8, 7), (3, 3), (2, 2), (1, 1)), ((5, 9), (2, 4), (3, 1), (0, 2)),
                                                           ((3, 3), (5, 5), (1, 1), (1, 1)), ((6, 6), (6, 6), (4, 4), (0, 0))])
def test_out_size(size, kernel, stride, padding):
    assert out_size(size, kernel, stride, padding) == nn.Conv2d(1, 1, kernel, stride, padding)(torch.zeros(1, 1, *size)).shape[2:]
    assert type(out_size(size, kernel, stride, padding)) is tuple


# ---- memory layout

BUILDS = {
    'conv': lambda k: k.Conv2d(3, 4, 3, 2, 1, **f64), 'conv, 1 x 1': lambda k: k.Conv2d(3, 5, 1, **f64),
    'max pool': lambda k: k.MaxPool2d(2), 'max pool, padding': lambda k: k.MaxPool2d(3, 2, 1),
    'average pool': lambda k: k.AvgPool2d(2), 'average pool, padding': lambda k: k.AvgPool2d(3, 2, 1),
    'global mean': lambda k: k.AdaptiveAvgPool2d(1), 'adaptive pool': lambda k: k.AdaptiveAvgPool2d(3),
    'adaptive pool, larger': lambda k: k.AdaptiveAvgPool2d((12, 4)),
}
each_build = pytest.mark.parametrize('build', BUILDS.values(), ids=BUILDS)


@each_build
@pytest.mark.parametrize('channels_last_weights', [False, True])
def test_channels_last_stays(build, channels_last_weights):
    layer, x = build(ours), images(2, 3, 9, 8).to(memory_format=channels_last).requires_grad_()
    if channels_last_weights: layer = layer.to(memory_format=channels_last)
    out = layer(x)
    assert out.is_contiguous(memory_format=channels_last)
    out.sum().backward()
    assert x.grad.is_contiguous(memory_format=channels_last)
    out = layer(x)
    before, = torch.autograd.grad(out, x, torch.ones_like(out))  # as `bwd` returns it
    assert before.stride() == x.stride() or 0 in before.stride()  # or expanded, as of the global mean


@each_build
def test_contiguous_stays(build):
    out = build(ours)(images(2, 3, 9, 8))
    assert out.is_contiguous() and out.dtype == torch.float64


@each_build
def test_inputs_and_gradients_are_not_written_to(build):
    layer, x = build(ours), images(2, 3, 9, 8).requires_grad_()
    out, before = layer(x), x.detach().clone()
    grad = torch.ones_like(out)
    out.backward(grad)
    assert torch.equal(x, before) and torch.equal(grad, torch.ones_like(grad))


# ---- central differences

@each_conv
def test_gradients_of_conv_by_differences(args):
    ci, co, kernel, stride, padding, (n, h, w) = args
    layer, x = Conv2d(ci, co, kernel, stride, padding, **f64), images(n, ci, h, w)
    scale = images(*layer(x).shape, seed=1)
    def func(x, weight, bias): return (functional_call(layer, dict(weight=weight, bias=bias), x) * scale).sum()
    check_grads(func, [x, layer.weight.detach(), layer.bias.detach()], atol=1e-7)


@each_pool
@pool_layers
def test_gradients_of_pools_by_differences(name, args):
    x = torch.randperm(2*2*9*8, generator=torch.Generator().manual_seed(0)).view(2, 2, 9, 8).double()/10  # no two are equal
    layer = getattr(ours, name)(*args)
    scale = images(*layer(x).shape)
    check_grads(lambda x: (layer(x) * scale).sum(), [x], atol=1e-6)


@pytest.mark.parametrize('size', SIZES.values(), ids=SIZES)
def test_gradients_of_adaptive_pool_by_differences(size):
    layer, x = AdaptiveAvgPool2d(size), images(1, 2, 9, 8)
    scale = images(*layer(x).shape, seed=1)
    check_grads(lambda x: (layer(x) * scale).sum(), [x], atol=1e-7)


# ---- wherever an nn.Module works

def net(k):
    torch.manual_seed(0)
    relu, flat, linear = (ReLU, Flatten, Linear) if k is ours else (nn.ReLU, nn.Flatten, nn.Linear)
    sequential = Sequential if k is ours else nn.Sequential
    return sequential(k.Conv2d(1, 8, 5, 2, 2), relu(), k.MaxPool2d(2), k.Conv2d(8, 16, 3, 1, 1), relu(), k.AvgPool2d(2),
                      k.Conv2d(16, 4, 3, 2, 1, bias=False), relu(), k.AdaptiveAvgPool2d(1), flat(), linear(4, 3)).double()


def train(net, to, steps=6):
    opt, x = torch.optim.SGD(net.parameters(), lr=.3, momentum=.9), images(12, 1, 17, 18).to(memory_format=to)
    y, losses = torch.arange(12) % 3, []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('to', [torch.contiguous_format, channels_last])
def test_a_net_trains_as_with_torch(to):
    mine, theirs = (net(k).to(memory_format=to) for k in (ours, nn))
    losses = train(mine, to)
    assert losses == pytest.approx(train(theirs, to), rel=1e-10) and losses[-1] != pytest.approx(losses[0], rel=1e-3)


def test_the_same_seed_gives_the_same_weights():
    for dtype in torch.float32, torch.float64:
        for args in (1, 8, 5, 2, 2), (3, 4, (2, 3)), (16, 4, 1):
            layers = []
            for k in ours, nn:
                torch.manual_seed(3)
                layers.append(k.Conv2d(*args, dtype=dtype))
            assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in layers), strict=True))


def test_state_travels_both_ways():
    mine, theirs, x = net(ours), net(nn), images(2, 1, 17, 18)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for p in theirs.parameters(): nn.init.normal_(p)
    mine.load_state_dict(theirs.state_dict())
    assert_close(mine(x), theirs(x))
    for p in mine.parameters(): nn.init.normal_(p)
    theirs.load_state_dict(mine.state_dict())
    assert_close(mine(x), theirs(x))


def test_one_layer_twice_in_a_net():
    def build(k):
        layer, pool = k.Conv2d(4, 4, 3, 1, 1, **f64), k.MaxPool2d(3, 1, 1)
        return (Sequential if k is ours else nn.Sequential)(layer, pool, layer, pool, layer)
    twins(build, images(2, 4, 6, 5), rtol=1e-11)


def test_one_layer_on_two_sizes_before_the_backward_pass():
    def build(k):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.pool, self.mean = k.Conv2d(3, 2, 3, 2, 1, **f64), k.MaxPool2d(2), k.AdaptiveAvgPool2d(1)

            def one(self, x): return self.mean(self.pool(self.layer(x)))

            def forward(self, x): return self.one(x) * self.one(x[:, :, 1:-2, 2:])
        return Twice()
    twins(build, images(2, 3, 9, 10))


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies(copied):
    mine, x = net(ours), images(2, 1, 17, 18)
    mine(x).sum().backward()
    other = copied(mine)
    assert_close(other(x), mine(x), rtol=0, atol=0)
    assert repr(other) == repr(mine)
    mine.zero_grad()
    (other(x)*2).sum().backward()
    assert all(p.grad is None for p in mine.parameters()) and all(p.grad is not None for p in other.parameters())


def test_without_bias():
    layer = Conv2d(3, 2, 3, bias=False, **f64)
    assert layer.bias is None and list(layer.state_dict()) == ['weight']
    check_twin(layer, nn.Conv2d(3, 2, 3, bias=False, **f64), images(2, 3, 5, 6), rtol=1e-12)


@pytest.mark.parametrize('frozen', [['weight'], ['bias'], ['weight', 'bias']], ids=' '.join)
def test_frozen_parameters(frozen):
    def build(k):
        layer = k.Conv2d(3, 2, 3, 2, 1, **f64)
        for name in frozen: getattr(layer, name).requires_grad_(False)
        return layer
    layers = [build(k) for k in (ours, nn)]
    layers[0].load_state_dict(layers[1].state_dict())
    xs = [images(2, 3, 6, 5).requires_grad_() for _ in layers]
    for layer, x in zip(layers, xs): layer(x).square().sum().backward()
    assert_close(*(x.grad for x in xs), rtol=1e-12, atol=1e-12)
    for name in 'weight', 'bias':
        mine, theirs = (getattr(layer, name).grad for layer in layers)
        if name in frozen: assert mine is None and theirs is None
        else: assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_an_input_without_gradient():  # the first layer of every net
    layer, twin, x = Conv2d(3, 2, 3, **f64), nn.Conv2d(3, 2, 3, **f64), images(2, 3, 6, 5)
    layer.load_state_dict(twin.state_dict())
    for m in layer, twin: m(x).square().sum().backward()
    assert x.grad is None
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True): assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('c, kernel', [(3, 3), (16, 3), (3, 1)])
def test_only_the_gradients_that_are_required_are_computed(c, kernel):
    x, weight, bias = images(2, c, 5, 5), images(2, c, kernel, kernel), torch.zeros(2, **f64)
    layer = Conv2d(c, 2, kernel, **f64)
    out = layer(x).detach()
    dx, dw, _ = layer.bwd(torch.ones_like(out), out, x, weight, bias)
    assert dx is None and dw is None
    dx, dw, _ = layer.bwd(torch.ones_like(out), out, x.requires_grad_(), weight, bias)
    assert dx.shape == x.shape and dw is None
    dx, dw, db = layer.bwd(torch.ones_like(out), out, x.detach(), weight.requires_grad_(), None)
    assert dx is None and dw.shape == weight.shape and db is None


@pytest.mark.parametrize('to', [torch.contiguous_format, channels_last])
def test_autocast_is_near_torch(to):
    mine, theirs = (net(k).float().to(memory_format=to) for k in (ours, nn))
    mine.load_state_dict(theirs.state_dict())
    x, found = images(4, 1, 17, 18, torch.float32).to(memory_format=to), []
    for m in mine, theirs:
        with torch.autocast('cpu', torch.bfloat16): out = m(x)
        out.float().square().sum().backward()
        found.append([out, *(p.grad for p in m.parameters())])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and torch.isfinite(a).all()
        assert (a - b).float().norm() <= .03 * b.float().norm()  # bfloat16 has eight bits


@pytest.mark.parametrize('name, args', [('MaxPool2d', (3, 2, 1)), ('AvgPool2d', (3, 2, 1)), ('AdaptiveAvgPool2d', (3,)),
                                        ('AdaptiveAvgPool2d', (1,))])
def test_pools_in_bfloat16(name, args):
    x = images(2, 8, 9, 8, torch.bfloat16)
    check_twin(getattr(ours, name)(*args), getattr(nn, name)(*args), x, rtol=.02, atol=.02)


def test_repr():
    for args in (3, 4, 3, 2, 1), (3, 4, (1, 5)): assert repr(Conv2d(*args)) == repr(nn.Conv2d(*args))
    assert repr(AdaptiveAvgPool2d((2, 3))) == repr(nn.AdaptiveAvgPool2d((2, 3)))
    assert repr(Conv2d(1, 2, 3, bias=False)) == repr(nn.Conv2d(1, 2, 3, bias=False))
    assert 'kernel_size=' in repr(MaxPool2d(2)) and 'stride=' in repr(AvgPool2d(2)) and 'padding=' in repr(MaxPool2d(2))


# ---- faults

@pytest.mark.parametrize('name, options', [('Conv2d', ['groups', 'dilation', 'padding_mode']),
                                           ('MaxPool2d', ['dilation', 'ceil_mode', 'return_indices']),
                                           ('AvgPool2d', ['ceil_mode', 'count_include_pad', 'divisor_override'])])
def test_options_that_we_do_not_have_raise(name, options):
    args = (4, 4, 3) if name == 'Conv2d' else (2,)
    for option in options:
        with pytest.raises(TypeError, match=option): getattr(ours, name)(*args, **{option: 1})
    with pytest.raises(TypeError, match='positional'): getattr(ours, name)(*args, 1, 0, 1)  # by position: no other meaning


@pytest.mark.parametrize('build, word', [
    (lambda: Conv2d(1, 2, 3, padding='same'), "padding is 'same'"), (lambda: Conv2d(1, 2, (3, 3, 3)), r'kernel_size is \(3, 3, 3\)'),
    (lambda: Conv2d(1, 2, (3,)), r'kernel_size is \(3,\)'), (lambda: Conv2d(1, 2, 3.), r'kernel_size is 3\.0'),
    (lambda: Conv2d(1, 2, 3, stride=(2, None)), r'stride is \(2, None\)'), (lambda: Conv2d(1, 2, True), 'kernel_size is True'),
    (lambda: MaxPool2d((2, 2, 2)), r'kernel_size is \(2, 2, 2\)'), (lambda: AvgPool2d(2, '2'), "stride is '2'"),
    (lambda: AdaptiveAvgPool2d((None, 2)), r'output_size is \(None, 2\)'), (lambda: AdaptiveAvgPool2d(1.), r'output_size is 1\.0')])
def test_sizes_are_one_integer_or_two(build, word):
    with pytest.raises(ValueError, match=word): build()


@pool_layers
@pytest.mark.parametrize('args', [(2, 2, 2), (3, 2, 2), (2, 2, -1), ((2, 4), 2, (1, 3))])
def test_padding_of_a_pool_is_at_most_half_of_its_window(name, args):
    with pytest.raises(ValueError, match='padding'): getattr(ours, name)(*args)
    with pytest.raises(RuntimeError, match='pad'): getattr(nn, name)(*args)(images(1, 1, 8, 8))


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('shape', [(3, 8, 8), (8, 8), (2, 3, 4, 8, 8)], ids=str)
def test_inputs_of_other_than_four_dimensions_raise(name, shape):  # nn.Conv2d takes a single image, and a batch without channels as one
    layer = getattr(ours, name)(*((3, 4, 3) if name == 'Conv2d' else (2,)))
    with pytest.raises(ValueError, match=rf'{name}: the input has shape {re.escape(str(shape))}.*\(n,c,h,w\)'): layer(torch.zeros(shape))


MISFITS = {  # a layer, an image that it cannot take, a word of the message
    'channels': (lambda: Conv2d(3, 4, 3), (2, 2, 8, 8), '3 channels'),
    'kernel': (lambda: Conv2d(1, 4, 9), (2, 1, 8, 8), '[Kk]ernel'),
    'dtype': (lambda: Conv2d(1, 4, 3, **f64), (2, 1, 8, 8), 'type'),
    'stride 0': (lambda: Conv2d(1, 4, 3, 0), (2, 1, 8, 8), 'stride'),
    'padding below 0': (lambda: Conv2d(1, 4, 3, 1, -1), (2, 1, 8, 8), 'padding'),
    'max pool': (lambda: MaxPool2d(9), (2, 1, 8, 8), 'too small|fit'),
    'max pool, stride 0': (lambda: MaxPool2d(2, 0), (2, 1, 8, 8), 'stride|zero'),
    'average pool': (lambda: AvgPool2d(9), (2, 1, 8, 8), 'fit|[Kk]ernel'),
    'average pool, stride 0': (lambda: AvgPool2d(2, 0), (2, 1, 8, 8), 'stride|zero'),
}


@pytest.mark.parametrize('build, shape, word', MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_raises(build, shape, word):
    with pytest.raises((RuntimeError, ValueError, ZeroDivisionError), match=word): build()(torch.zeros(shape))


def test_out_size_raises():
    with pytest.raises(ValueError, match='does not fit'): out_size((3, 3), (4, 4), (1, 1), (0, 0))

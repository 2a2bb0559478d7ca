"`init_weights` against `torch.nn.init`, `lsuv_init` against measurements of its own, and what either must leave alone."
import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from common import gen
from torch import nn
from torch.testing import assert_close

from miniai import initialization
from miniai.activations import LeakyReLU
from miniai.conv import Conv2d, MaxPool2d
from miniai.initialization import LayerStats, fans, init_weights, lsuv_init
from miniai.module import Flatten, Linear, Module, ReLU, Sequential

LAYERS = {
    'Linear': (lambda: Linear(40, 30), 40, 30),
    'nn.Linear': (lambda: nn.Linear(40, 30), 40, 30),
    'Conv2d': (lambda: Conv2d(6, 8, (5, 3), stride=2), 90, 120),
    'nn.Conv2d': (lambda: nn.Conv2d(6, 8, (5, 3), padding=1), 90, 120),
    'nn.Conv1d': (lambda: nn.Conv1d(6, 8, 4), 24, 32),
    'nn.Conv3d': (lambda: nn.Conv3d(3, 5, 2), 24, 40),
    'grouped': (lambda: nn.Conv2d(6, 8, 3, groups=2), 27, 72),
    'no bias': (lambda: Linear(40, 30, bias=False), 40, 30),
}
XB = torch.randn(64, 3, 10, 9, generator=gen(9))*3 + 1


def ours(): return Sequential(Conv2d(3, 6, 3, padding=1), ReLU(), MaxPool2d(2), Conv2d(6, 8, 3), LeakyReLU(.1), Flatten(), Linear(48, 5))


def theirs():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.LeakyReLU(.1), nn.Flatten(),
                         nn.Linear(48, 5))


def seeded(make, seed=1):
    torch.manual_seed(seed)
    return make()


def outputs(model, xb, kinds=(nn.Linear, nn.Conv2d, Linear, Conv2d)):
    "Mean and std of each layer's output, by hooks of PyTorch's"
    found, handles = {}, []
    for name, m in model.named_modules():
        if isinstance(m, kinds): handles.append(m.register_forward_hook(lambda m, i, o, name=name: found.__setitem__(name, o.detach())))
    with torch.no_grad(): model(xb)
    for h in handles: h.remove()
    return {name: (o.double().mean().item(), o.double().std(correction=0).item()) for name, o in found.items()}


# ---------------------------------------------------------------- fans and init_weights

@pytest.mark.parametrize('name', LAYERS)
def test_fans(name):
    make, fan_in, fan_out = LAYERS[name]
    assert fans(make().weight) == (fan_in, fan_out)


@pytest.mark.parametrize('leaky', [None, 0, .01, .3, 1, 2.])
@pytest.mark.parametrize('kind', ['kaiming', 'kaiming_out', 'xavier'])
@pytest.mark.parametrize('name', LAYERS)
def test_weights_equal_those_of_torch(name, kind, leaky):
    layer, twin = LAYERS[name][0](), LAYERS[name][0]()
    options = {} if leaky is None else {'leaky': leaky}
    assert init_weights(layer, kind=kind, generator=gen(3), **options) is layer
    if kind == 'xavier':
        gain = 1 if leaky is None else math.sqrt(2/(1 + leaky**2))
        nn.init.xavier_normal_(twin.weight, gain, generator=gen(3))
    else: nn.init.kaiming_normal_(twin.weight, leaky or 0, 'fan_in' if kind == 'kaiming' else 'fan_out', generator=gen(3))
    assert_close(layer.weight, twin.weight)
    if layer.bias is not None: assert not layer.bias.any()


def test_layers_without_the_attribute_bias():
    assert init_weights(nn.Embedding(100, 50), generator=gen(0)).weight.std() < .3
    assert not hasattr(init_weights(Clipped()), 'bias')


def test_the_mean_is_zero_and_the_std_is_that_of_the_formula():
    weight = init_weights(Linear(400, 500)).weight
    assert abs(weight.mean()) < .001 and abs(weight.std()/math.sqrt(2/400) - 1) < .01
    assert (weight.abs() > 2*weight.std()).float().mean() > .03        # normal: 0.046; uniform: 0


def test_every_layer_of_a_nested_model_and_nothing_else():
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Sequential(Linear(6, 6), nn.BatchNorm1d(6), nn.PReLU(6)), nn.Linear(6, 2))
    for p in net.parameters(): nn.init.constant_(p, 7.)
    assert init_weights(net) is net
    changed = {name for name, p in net.named_parameters() if (p != 7).any()}
    assert changed == {f'{k}.{part}' for k in ('0', '2.0', '3') for part in ('weight', 'bias')}


def test_the_generator_is_the_only_source_if_there_is_one():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, other = (init_weights(ours(), generator=gen(k)).state_dict() for k in (4, 4, 5))
    torch.set_rng_state(before)
    net = ours()
    state = torch.get_rng_state()
    init_weights(net, generator=gen(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a['0.weight'], other['0.weight'])
    first, second = (seeded(lambda: init_weights(net)[0].weight.clone(), s) for s in (1, 1))
    assert torch.equal(first, second)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_dtype_gradients_and_frozen_weights(dtype):
    net = theirs().to(dtype)
    net[0].weight.requires_grad_(False)
    old = net[0].weight.clone()
    init_weights(net)
    assert not torch.equal(old, net[0].weight)
    assert all(p.dtype == dtype and p.is_leaf and p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [False] + [True]*5


@pytest.mark.parametrize('model', [nn.ReLU(), nn.Sequential(), nn.LayerNorm(4), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))])
@pytest.mark.parametrize('func, args', [(init_weights, ()), (lsuv_init, (torch.randn(4, 3),))])
def test_a_model_without_weights_raises(model, func, args):
    with pytest.raises(ValueError, match=rf'{func.__name__}: \w+ has no layer with a weight of two or more dimensions'):
        func(model, *args)


def test_apply_raises_and_says_what_to_do():
    with pytest.raises(ValueError, match=r'init_weights: ReLU .*call init_weights\(model\), not model.apply\(init_weights\)'):
        ours().apply(init_weights)


@pytest.mark.parametrize('kind', ['he', 'Kaiming', '', None, 'fan_in'])
def test_an_unknown_kind_raises_before_anything_changes(kind):
    net = ours()
    old = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match='init_weights: kind is .*kaiming_out'): init_weights(net, kind=kind)
    assert all(torch.equal(old[k], v) for k, v in net.state_dict().items())


def test_variance_forward_and_backward():
    "Twenty layers with ReLU, widths that change: fan-in keeps the output, fan-out keeps the gradient"
    for kind, widths in (('kaiming', (300, 600)), ('kaiming_out', (600, 300))):
        torch.manual_seed(0)
        sizes = [widths[k % 2] for k in range(21)]
        net = init_weights(nn.Sequential(*(m for i, o in zip(sizes, sizes[1:]) for m in (Linear(i, o, bias=False), ReLU()))), kind=kind)
        x = torch.randn(100, sizes[0], requires_grad=True)
        out = net[:-1](x)
        out.backward(torch.randn_like(out))
        kept = out.std() if kind == 'kaiming' else x.grad.std()*math.sqrt(2)
        assert .4 < kept < 2.5


# ---------------------------------------------------------------- lsuv_init

@pytest.mark.parametrize('make', [ours, theirs])
@pytest.mark.parametrize('start', ['default', 'kaiming', 'large', 'small'])
def test_outputs_have_mean_0_and_std_1(make, start):
    net = seeded(make)
    if start == 'kaiming': init_weights(net)
    if start in ('large', 'small'):
        with torch.no_grad():
            for p in net.parameters(): p.mul_(1e4 if start == 'large' else 1e-6)
    stats = lsuv_init(net, XB)
    assert [type(s) for s in stats] == [LayerStats]*3 and LayerStats._fields == ('name', 'mean', 'std', 'iterations')
    measured = outputs(net, XB)
    assert [s.name for s in stats] == [*measured] == ['0', '3', '6']
    for s in stats:
        mean, std = measured[s.name]
        assert abs(mean) <= .011 and abs(std - 1) <= .011 and 1 <= s.iterations <= 3
        assert abs(s.mean - mean) < 1e-4 and abs(s.std - std) < 1e-4


def test_ours_and_torchs_end_with_the_same_weights():
    a, b = seeded(ours), theirs()
    b.load_state_dict(a.state_dict())
    assert_close([s[1:] for s in lsuv_init(a, XB)], [s[1:] for s in lsuv_init(b, XB)], rtol=1e-4, atol=1e-5)
    for p, q in zip(a.parameters(), b.parameters()): assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_one_factor_and_one_shift_per_layer():
    net = seeded(lambda: nn.Sequential(nn.Linear(5, 4))).double()
    x = XB.flatten()[:500].view(100, 5).double()
    w, b = (p.detach().clone() for p in net.parameters())
    out = F.linear(x, w, b)
    lsuv_init(net, x)
    assert_close(net[0].weight.detach(), w/out.std(correction=0), rtol=1e-6, atol=1e-7)
    assert_close(net[0].bias.detach(), (b - out.mean())/out.std(correction=0), rtol=1e-6, atol=1e-6)


def test_a_second_time_changes_nothing():
    net = seeded(ours)
    lsuv_init(net, XB)
    state = copy.deepcopy(net.state_dict())
    assert [s.iterations for s in lsuv_init(net, XB)] == [0]*3
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())


def test_without_bias_only_the_std():
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), Linear(8, 3, bias=False)))
    x = XB.flatten()[:400].view(100, 4) + 2
    stats = lsuv_init(net, x)
    assert all(abs(s.std - 1) <= .01 and s.iterations == 1 for s in stats)
    assert abs(stats[0].mean) > .05 and net[0].bias is None
    for _, std in outputs(net, x).values(): assert abs(std - 1) < .011


def test_a_single_layer_and_a_layer_with_weights_of_one_dimension():
    assert [s.name for s in lsuv_init(seeded(lambda: nn.Linear(9, 4)), XB[:, 0, 0])] == ['Linear']
    net = seeded(lambda: nn.Sequential(nn.Linear(9, 4), nn.LayerNorm(4), nn.Linear(4, 4)))
    assert [s.name for s in lsuv_init(net, XB[:, 0, 0])] == ['0', '2']
    assert (net[1].weight == 1).all() and not net[1].bias.any()


def test_tolerance():
    net = seeded(theirs)
    lsuv_init(net, XB)
    with torch.no_grad(): net[0].weight.mul_(1.04)
    assert [s.iterations for s in lsuv_init(copy.deepcopy(net), XB, tol=.2)] == [0, 0, 0]
    assert lsuv_init(net, XB, tol=.02)[0].iterations == 1
    with torch.no_grad(): net[0].bias.add_(.1)
    assert lsuv_init(net, XB, tol=.05)[0].iterations == 1              # the mean counts, too
    with torch.no_grad(): net[0].bias.sub_(.1)
    assert lsuv_init(net, XB, tol=.05)[0].iterations == 1              # in either direction
    with torch.no_grad(): net[0].weight.mul_(.9)
    assert lsuv_init(net, XB, tol=.05)[0].iterations == 1


class Backwards(nn.Module):
    "Registered last to first, called first to last"
    def __init__(self):
        super().__init__()
        self.last, self.middle, self.first = Linear(6, 2), nn.Linear(6, 6), Linear(9, 6)
    def forward(self, x): return self.last(F.relu(self.middle(F.relu(self.first(x)))))


def test_layers_are_scaled_in_the_order_of_their_calls():
    net = seeded(Backwards)
    assert [s.name for s in lsuv_init(net, XB[:, 0, 0])] == ['first', 'middle', 'last']
    for mean, std in outputs(net, XB[:, 0, 0]).values(): assert abs(mean) < .011 and abs(std - 1) < .011


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.seen = nn.Linear(9, 9), []
    def forward(self, x):
        self.seen = [a := self.inner(x), self.inner(a.relu())]
        return self.seen[1]


def test_a_layer_that_is_called_twice_counts_both_calls():
    net = seeded(Twice)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        (stats,) = lsuv_init(net, XB[:, 0, 0], max_iter=50)
    net(XB[:, 0, 0])
    both = torch.cat([o.flatten() for o in net.seen])
    assert abs(both.std() - 1) < .011 and abs(both.mean()) < .011 and 1 < stats.iterations <= 10
    assert lsuv_init(seeded(Twice), XB[:, 0, 0]) == [stats]           # ten are allowed


def test_a_call_with_one_input_for_all_does_not_make_a_layer_dead():
    net = seeded(Twice)
    net.forward = lambda x: net.inner(0*x) + net.inner(x)
    assert abs(lsuv_init(net, XB[:, 0, 0], max_iter=50)[0].std - 1) <= .01


def test_a_small_signal_on_a_large_mean_is_scaled():
    net, x = seeded(lambda: nn.Sequential(nn.Linear(9, 4))).double(), XB[:, 0, 0].double()
    with torch.no_grad(): net[0].bias.fill_(3e3)
    (stats,) = lsuv_init(net, x)
    assert abs(stats.std - 1) <= .01 and abs(stats.mean) <= .01


class Clipped(nn.Module):
    "A layer whose output has a std below 1, whatever its weight"
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
    def forward(self, x): return (x @ self.weight).tanh()/2


@pytest.mark.parametrize('cap', [0, 1, 4])
def test_the_cap_warns_and_stays_finite(cap):
    net = seeded(lambda: nn.Sequential(Clipped()))
    x = XB.flatten()[:400].view(100, 4)
    with pytest.warns(UserWarning, match=rf'0 \(Clipped\) has mean .* and std .* after {cap} iterations') as caught:
        (stats,) = lsuv_init(net, x, max_iter=cap)
    assert stats.iterations == cap and net[0].weight.isfinite().all()
    assert caught[0].filename == __file__
    assert torch.equal(net[0].weight, torch.ones(4, 4)) == (cap == 0)


def test_the_cap_is_reached_exactly():
    net = seeded(Twice)
    needed = lsuv_init(copy.deepcopy(net), XB[:, 0, 0], max_iter=50)[0].iterations
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert lsuv_init(copy.deepcopy(net), XB[:, 0, 0], max_iter=needed)[0].iterations == needed
    with pytest.warns(UserWarning, match=f'after {needed - 1} iterations'): lsuv_init(net, XB[:, 0, 0], max_iter=needed - 1)


def dead_weight(net):
    net[3].weight.zero_()
    return '3', 'Conv2d'


def dead_and_zero(net):
    net[3].bias.zero_()
    return dead_weight(net)


def dead_relu(net):
    net[0].register_parameter('bias', None)
    net[0].weight.copy_(-net[0].weight.abs())
    return '3', 'Conv2d'


@pytest.mark.parametrize('kill', [dead_weight, dead_and_zero, dead_relu])
@pytest.mark.parametrize('make', [ours, theirs])
def test_a_dead_layer_raises_in_words(make, kill):
    net = seeded(make)
    with torch.no_grad(): name, kind = kill(net)
    with pytest.raises(ValueError, match=rf'lsuv_init: {name} \({kind}\) outputs the same for all 64 examples'): lsuv_init(net, XB.abs())
    assert all(p.isfinite().all() for p in net.parameters())
    assert all(m.training and not m._forward_hooks for m in net.modules())


def test_biases_do_not_hide_a_dead_layer():
    net = seeded(theirs)
    with torch.no_grad(): net[3].weight.zero_()
    assert net[3].bias.std() > .01
    with pytest.raises(ValueError, match='outputs the same'): lsuv_init(net, XB)
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4)))
    with torch.no_grad(): net[0].weight.mul_(1e-7)                   # as small as the rounding of the bias
    with pytest.raises(ValueError, match='outputs the same'): lsuv_init(net, torch.randn(20, 3))


def test_a_batch_of_one_raises():
    with pytest.raises(ValueError, match='same for all 1 examples: give more than one'): lsuv_init(seeded(ours), XB[:1])
    with pytest.raises(ValueError, match='same for all 1 examples'): lsuv_init(Linear(9, 1), XB[:1, 0, 0])     # one number: no std


@pytest.mark.parametrize('bad', [math.inf, math.nan])
def test_values_that_are_not_finite_raise(bad):
    net, x = seeded(ours), XB.clone()
    x[3, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r'lsuv_init: 0 \(Conv2d\) has an output of std nan; are xb and the weights finite'):
        lsuv_init(net, x)
    assert all(p.isfinite().all() for p in net.parameters())


class Noise(nn.Module):
    def forward(self, x): return x + .01*torch.randn_like(x)


def test_modes_random_state_statistics_and_gradients_stay():
    net = seeded(lambda: nn.Sequential(nn.Linear(9, 20), nn.BatchNorm1d(20), nn.Dropout(.5), Noise(), Linear(20, 3)))
    net[1].eval()
    net[4].weight.requires_grad_(False)
    modes = [m.training for m in net.modules()]
    buffers, rng = copy.deepcopy(dict(net.named_buffers())), torch.get_rng_state()
    stats = lsuv_init(net, XB[:, 0, 0])
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in net.modules()] and not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(buffers[k], v) for k, v in net.named_buffers())
    assert all(p.grad is None and p.is_leaf for p in net.parameters()) and not net[4].weight.requires_grad and net[0].weight.requires_grad
    assert len(stats) == 2 and torch.is_grad_enabled()
    net.eval()
    for _, std in outputs(net, XB[:, 0, 0]).values(): assert abs(std - 1) < .02        # without dropout
    net.train()
    net[2].training = net[1].training = True
    lsuv_init(net, XB[:, 0, 0])
    assert all(torch.equal(buffers[k], v) for k, v in net.named_buffers())


def test_modes_come_back_after_an_error():
    class Breaks(nn.Module):
        def forward(self, x): raise RuntimeError('broken')
    net = nn.Sequential(nn.Linear(9, 2), Breaks())
    with pytest.raises(RuntimeError, match='broken'): lsuv_init(net, XB[:, 0, 0])
    assert all(m.training and not m._forward_hooks for m in net.modules())


def test_a_layer_that_is_not_called_is_named():
    net = seeded(ours)
    net.spare = nn.Linear(3, 3)
    old = copy.deepcopy(net.spare.state_dict())
    net.forward = lambda x: nn.Sequential(*[*net.children()][:-1])(x)
    with pytest.warns(UserWarning, match=r"lsuv_init: the model did not call \['spare'\]; they are unchanged") as caught:
        stats = lsuv_init(net, XB)
    assert [s.name for s in stats] == ['0', '3', '6'] and caught[0].filename == __file__
    assert all(torch.equal(old[k], v) for k, v in net.spare.state_dict().items())


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    net = seeded(theirs).to(dtype)
    stats = lsuv_init(net, XB.to(dtype), tol=.02)
    assert all(abs(s.std - 1) <= .02 for s in stats) and all(p.dtype == dtype for p in net.parameters())
    for s, (mean, std) in zip(stats, outputs(net, XB.to(dtype)).values()): assert abs(s.mean - mean) < 2e-5 and abs(s.std - std) < 2e-5


def test_no_warning_in_an_ordinary_call():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        lsuv_init(init_weights(seeded(ours)), XB)


def test_a_layer_with_a_bwd_of_its_own_trains_afterwards():
    net = init_weights(seeded(ours))
    lsuv_init(net, XB)
    F.cross_entropy(net(XB), torch.randint(5, (64,), generator=gen(0))).backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_names():
    assert set(initialization.__all__) == {'LayerStats', 'fans', 'init_weights', 'lsuv_init'}
    assert issubclass(Linear, Module)

"What must hold of our layers beyond chapter 02: wherever an nn.Module works, ours work alike."
import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import miniai.module as ours
from miniai.gradcheck import check_grads
from miniai.module import Flatten, Linear, Module, MSELoss, ReLU, Residual, Sequential, check_twin

f64 = dict(dtype=torch.float64)


class TorchResidual(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x): return x + self.layer(x)


class Theirs:
    Linear, ReLU, Flatten, Sequential, Residual = nn.Linear, nn.ReLU, nn.Flatten, nn.Sequential, TorchResidual


def build(k, seed=0):
    torch.manual_seed(seed)
    return k.Sequential(k.Linear(3, 4), k.ReLU(), k.Residual(k.Linear(4, 4)), k.Linear(4, 2)).double()


def pair():
    net, twin = build(ours), build(Theirs)
    twin.load_state_dict(net.state_dict())
    return net, twin


def data(requires_grad=False):
    x = torch.linspace(-1, 1, 15, **f64).view(5, 3)
    return x.requires_grad_(requires_grad), torch.linspace(0, 2, 10, **f64).cos().view(5, 2)


def grads_of(net, use):
    "The gradients of the input and of every parameter for the loss `use(net, x)`"
    x, _ = data(True)
    net.zero_grad()
    use(net, x).backward()
    return [x.grad, *(p.grad for p in net.parameters())]


def same_grads(use, theirs=None):
    net, twin = pair()
    for g, h in zip(grads_of(net, use), grads_of(twin, theirs or use), strict=True): assert_close(g, h)


# ---- values and gradients

@pytest.mark.parametrize('shape', [(5, 3), (1, 3), (2, 4, 3), (3,), (0, 3), (2, 0, 3)])
@pytest.mark.parametrize('bias', [True, False])
def test_linear_is_a_twin(shape, bias):
    check_twin(Linear(3, 2, bias=bias, **f64), nn.Linear(3, 2, bias=bias, **f64), torch.randn(shape, **f64))


def test_linear_one_by_one(): check_twin(Linear(1, 1, **f64), nn.Linear(1, 1, **f64), torch.randn(4, 1, **f64))


@pytest.mark.parametrize('size', [(784, 50), (50, 10), (1, 1), (3, 7), (17, 1000)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_same_seed_gives_the_same_weights(size, dtype):
    torch.manual_seed(3)
    layer = Linear(*size, dtype=dtype)
    torch.manual_seed(3)
    twin = nn.Linear(*size, dtype=dtype)
    assert torch.equal(layer.weight, twin.weight) and torch.equal(layer.bias, twin.bias)


def test_repr():
    for a, b in ((Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)), (Flatten(0, 1), nn.Flatten(0, 1)), (ReLU(), nn.ReLU())):
        assert repr(a) == repr(b)


@pytest.mark.parametrize('args', [(), (0,), (1, 2), (0, 1)])
def test_flatten_is_a_twin(args): check_twin(Flatten(*args), nn.Flatten(*args), torch.randn(2, 3, 4, 5, **f64))


def test_relu_at_its_kink_and_with_integers():
    check_twin(ReLU(), nn.ReLU(), torch.tensor([[-1., 0., -0., 2., 1e30, -1e30]], **f64))
    integers = torch.tensor([-1, 2**24 + 1])
    assert_close(ReLU()(integers), nn.ReLU()(integers))


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('shape', [(5, 3), (1, 1), (4,), ()])
def test_mse_is_a_twin(reduction, shape):
    check_twin(MSELoss(reduction), nn.MSELoss(reduction=reduction), torch.randn(shape, **f64), torch.randn(shape, **f64))


def test_mse_raises_for_other_shapes():
    with pytest.raises(ValueError, match=r'\[4, 1\] and target \[4\].*squeeze\(1\)'): MSELoss()(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(ValueError, match="'none'"): MSELoss('none')


def test_residual_keeps_the_shape():
    with pytest.raises(ValueError, match=r'\[2, 3\] became \[2, 1\]'): Residual(Linear(3, 1))(torch.zeros(2, 3))


def test_sequential_is_indexed_sliced_and_named_as_in_torch():
    net, twin = pair()
    check_twin(net, twin, data()[0])
    assert len(net) == 4 and net[-1] is list(net)[3] and net[1:3][0] is net[1]
    assert isinstance(net[:2], Sequential) and list(net[:2].state_dict()) == ['0.weight', '0.bias']
    assert_close(net[2:](net[:2](data()[0])), net(data()[0]))
    layer = Linear(3, 3)
    assert_close(Sequential(layer, layer)(torch.ones(1, 3)), layer(layer(torch.ones(1, 3))))
    with pytest.raises(TypeError): Sequential(torch.relu)


# ---- anything may stand before, between and after our layers

MIXES = {
    'nothing': lambda net, x, loss: loss(net(x), data()[1]),
    'before': lambda net, x, loss: loss(net(x * 2), data()[1]),
    'between': lambda net, x, loss: loss(net[2:](net[:2](x) * 2), data()[1]),
    'between: add': lambda net, x, loss: loss(net[3](net[2](h := net[:2](x)) + h), data()[1]),
    'between: view': lambda net, x, loss: loss(net[3](net[:3](x).view(10, 2).view(5, 4)), data()[1]),
    'between: F.relu': lambda net, x, loss: loss(net[3](F.relu(net[:3](x))), data()[1]),
    'two losses': lambda net, x, loss: loss(net[3]((h := net[0](x).tanh()) * net[2](h)), data()[1]) + loss(net[3](h), data()[1]),
    'after': lambda net, x, loss: loss(net(x) * 2, data()[1]),
    'loss / 3': lambda net, x, loss: loss(net(x), data()[1]) / 3,
    'penalty, output': lambda net, x, loss: loss(out := net(x), data()[1]) + out.square().mean(),
    'penalty, weight': lambda net, x, loss: loss(net(x), data()[1]) + sum(p.square().sum() for p in net.parameters()),
    'layer twice': lambda net, x, loss: loss(net[3](net[2](net[2](net[:2](x)))), data()[1]),
    'net twice': lambda net, x, loss: loss(net(x), data()[1]) + loss(net(x.flip(0)), data()[1]),
}


@pytest.mark.parametrize('mix', MIXES)
@pytest.mark.parametrize('our_loss', [MSELoss(), nn.MSELoss()], ids=['our loss', 'torch loss'])
def test_mixed_with_torch_operations(mix, our_loss):
    same_grads(lambda net, x: MIXES[mix](net, x, our_loss), lambda net, x: MIXES[mix](net, x, nn.MSELoss()))


def test_our_loss_behind_a_net_of_torch():
    _, twin = pair()
    a = grads_of(twin, lambda net, x: MSELoss()(net(x), data()[1]))
    for g, h in zip(a, grads_of(twin, lambda net, x: nn.MSELoss()(net(x), data()[1]))): assert_close(g, h)


def test_torch_layers_among_ours():
    def among(k): return k.Sequential(k.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), k.ReLU(), k.Linear(4, 2)).double()
    net, twin = among(ours), among(Theirs)
    twin.load_state_dict(net.state_dict())
    def use(net, x): return net(x).square().sum()
    for g, h in zip(grads_of(net, use), grads_of(twin, use)): assert_close(g, h)
    assert_close(net[2].running_mean, twin[2].running_mean)


def test_gradients_accumulate_over_half_batches():
    net, _ = pair()
    x, y = data()
    for half in (slice(0, 2), slice(2, 5)): MSELoss('sum')(net(x[half]), y[half]).backward()
    added = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    MSELoss('sum')(net(x), y).backward()
    for g, p in zip(added, net.parameters()): assert_close(g, p.grad)


def test_twenty_steps_of_adamw_are_bit_equal():
    nets = pair()
    x, y = data()
    for net, loss in zip(nets, (MSELoss(), nn.MSELoss())):
        opt = torch.optim.AdamW(net.parameters(), lr=0.05)
        for _ in range(20):
            loss(net(x), y).backward()
            opt.step()
            opt.zero_grad()
    for p, q in zip(*(net.parameters() for net in nets)): assert torch.equal(p, q)


# ---- everything that takes an nn.Module

def test_autograd_grad_and_jacobian():
    net, twin = pair()
    x, y = data(True)
    asked = [torch.autograd.grad(nn.MSELoss()(n(x), y), [x, *n.parameters()]) for n in (net, twin)]
    for g, h in zip(*asked): assert_close(g, h)
    assert all(p.grad is None for p in net.parameters())
    jac = [torch.autograd.functional.jacobian(n, x.detach()) for n in (net, twin)]
    assert_close(*jac)
    assert jac[0].abs().max() > 0


def test_retain_graph():
    net, twin = pair()
    for n in (net, twin):
        loss = n(data()[0]).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for p, q in zip(net.parameters(), twin.parameters()): assert_close(p.grad, q.grad)
    loss = net(data()[0]).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match='second time'): loss.backward()


@pytest.mark.filterwarnings('ignore:Using backward')
@pytest.mark.parametrize('after', [lambda t: t.sum(), lambda t: t.square().sum()], ids=['constant gradient', 'gradient with a graph'])
def test_a_second_derivative_raises(after):
    net, _ = pair()
    x, _ = data(True)
    with pytest.raises(RuntimeError, match='create_graph=False'): after(net(x)).backward(create_graph=True)
    with pytest.raises(RuntimeError, match='create_graph=False'): torch.autograd.grad(after(net(x)), x, create_graph=True)
    with pytest.raises(RuntimeError): torch.func.grad(lambda t: after(net(t)))(x.detach())


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpoint(reentrant):
    same_grads(lambda net, x: checkpoint(net, x, use_reentrant=reentrant).square().sum())


def test_functional_call_with_other_weights():
    net, twin = pair()
    other = {name: (1.5 * p + .1).detach().requires_grad_() for name, p in net.named_parameters()}
    got = []
    for n in (net, twin):
        x, y = data(True)
        loss = nn.MSELoss()(torch.func.functional_call(n, other, (x,)), y)
        got.append([loss.detach(), *torch.autograd.grad(loss, [x, *other.values()])])
    for g, h in zip(*got): assert_close(g, h)


def test_compile_in_one_graph():
    torch._dynamo.reset()
    compiled = {}
    def use(net, x): return compiled.setdefault(net, torch.compile(net, fullgraph=True, backend='eager'))(x).square().sum()
    same_grads(use, lambda net, x: net(x).square().sum())


@pytest.mark.parametrize('where', ['inside', 'outside'], ids=['backward inside autocast', 'backward outside'])
def test_autocast(where):
    got = []
    for k in (ours, Theirs):
        torch.manual_seed(0)
        net, x = k.Sequential(k.Linear(64, 64), k.ReLU(), k.Linear(64, 8)), torch.randn(32, 64)
        loss_func = MSELoss() if k is ours else nn.MSELoss()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = net(x)
            loss = loss_func(out.float(), torch.ones(32, 8))
            if where == 'inside': loss.backward()
        if where == 'outside': loss.backward()
        assert out.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in net.parameters())
        got.append([out.float().detach(), *(p.grad for p in net.parameters())])
    for g, h in zip(*got): assert (g - h).norm() < 1e-2 * h.norm()


def test_bwd_runs_in_the_precision_of_forward():
    class Look(Module):
        def forward(self, x): return x * 1
        def bwd(self, grad, out, x):
            seen.append(torch.is_autocast_enabled('cpu'))
            return grad
    seen, x = [], torch.ones(2, requires_grad=True)
    with torch.autocast('cpu', dtype=torch.bfloat16): out = Look()(x)
    out.sum().backward()
    out = Look()(x)
    with torch.autocast('cpu', dtype=torch.bfloat16): out.sum().backward()
    assert seen == [True, False]


def test_inference_mode_and_no_grad():
    net, twin = pair()
    x, _ = data()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode: out = net(x)
        assert not out.requires_grad and out.grad_fn is None
        assert_close(out, twin(x).detach())
    with torch.inference_mode(): made = torch.ones(4, 3, **f64)
    assert Flatten()(made).shape == (4, 3)                         # nothing requires grad, so nothing is saved
    with pytest.raises(RuntimeError, match='make a clone'): net(made)


# ---- what happens between forward and backward

def test_weights_replaced_after_forward_do_no_harm():
    def use(net, x):
        loss = net(x).square().sum()
        for p in net.parameters(): p.data = torch.full_like(p, 7.)
        return loss
    same_grads(use)
    def keep(net, x): return net(x).square().sum()
    same_grads(use, keep)


def test_a_change_in_place_is_noticed():
    net, _ = pair()
    x = data()[0].clone()
    for spoil in (lambda: net[3].weight.mul_(2), lambda: x.zero_()):
        loss = net(x).square().sum()
        with torch.no_grad(): spoil()
        with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()
    loss = MSELoss()(net(data()[0]), data()[1])
    loss /= 2                                                      # write `loss = loss / 2`
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()
    frozen = Linear(3, 2, **f64).requires_grad_(False)
    out = frozen(net[0](data()[0])[:, :3])
    frozen.weight.zero_()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): out.sum().backward()


def test_copies_and_pickles_in_the_middle_of_training():
    net, _ = pair()
    x, y = data()
    loss = MSELoss()(net(x), y)
    twins = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    loss.backward()
    for twin in twins:
        assert twin[0].weight is not net[0].weight and repr(twin) == repr(net)
        MSELoss()(twin(x), y).backward()
        for p, q in zip(net.parameters(), twin.parameters()): assert_close(p.grad, q.grad)


def test_frozen_parameters_get_no_gradient_and_pass_it_on():
    net, twin = pair()
    for n in (net, twin):
        n[2].requires_grad_(False)
        n[3].bias.requires_grad_(False)
        n(data()[0]).square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None: assert_close(p.grad, q.grad)
    net.requires_grad_(False)
    assert not net(data()[0]).requires_grad
    x, _ = data()
    net.requires_grad_(True)(x).sum().backward()
    assert x.grad is None                                          # the data does not require grad


def test_bwd_can_see_which_gradients_are_needed():
    class Look(Linear):
        def bwd(self, grad, out, x, weight, bias):
            seen.append((x.requires_grad, weight.requires_grad, bias.requires_grad))
            return super().bwd(grad, out, x, weight, bias)
    seen, layer = [], Look(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    layer.weight.requires_grad_(False)
    layer(torch.ones(1, 3, requires_grad=True)).sum().backward()
    assert seen == [(False, True, True), (True, False, True)]
    layer, x = Linear(3, 2), torch.ones(1, 3)                      # a product that is not needed is not computed
    frozen = layer.weight.detach()
    assert [g is None for g in layer.bwd(torch.ones(1, 2), None, x, layer.weight, layer.bias)] == [True, False, False]
    assert [g is None for g in layer.bwd(torch.ones(1, 2), None, x.requires_grad_(), frozen, layer.bias)] == [False, True, False]


def test_hooks():
    got = []
    for net in pair():
        seen = []
        x, _ = data(True)
        handles = [net[1].register_forward_hook(lambda m, i, out, seen=seen: seen.append(tuple(out.shape)) or out * 2),
                   net[2].register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
                   net[0].register_full_backward_hook(lambda m, gi, go, seen=seen: seen.append(go[0].sum().item()) or (gi[0] * 3,)),
                   net[3].weight.register_hook(lambda g: g * 2),
                   net[3].bias.register_post_accumulate_grad_hook(lambda p: setattr(p, 'grad', p.grad * 5))]
        h = net[:2](x)
        h.register_hook(lambda g: g * .5)
        net[2:](h).square().sum().backward()
        for handle in handles: handle.remove()
        got.append([seen, [x.grad, *(p.grad for p in net.parameters())]])
    assert [a for a in got[0][0] if isinstance(a, tuple)] == [(5, 4)] and got[0][0][0] == got[1][0][0]
    assert got[0][0][1] == pytest.approx(got[1][0][1])
    for g, h in zip(got[0][1], got[1][1]): assert_close(g, h)


def test_four_threads_train_four_nets():
    def train(net):
        x, y = data()
        opt = torch.optim.SGD(net.parameters(), lr=.05)
        for _ in range(50):
            MSELoss()(net(x), y).backward()
            opt.step()
            opt.zero_grad()
    alone, together = [build(ours, seed) for seed in range(4)], [build(ours, seed) for seed in range(4)]
    for net in alone: train(net)
    threads = [threading.Thread(target=train, args=(net,)) for net in together]
    for t in threads: t.start()
    for t in threads: t.join()
    for a, b in zip(alone, together):
        for p, q in zip(a.parameters(), b.parameters()): assert torch.equal(p, q)


def test_nothing_is_left_behind_without_the_garbage_collector():
    net, _ = pair()
    gc.collect()
    gc.disable()
    try:
        def forward(): return weakref.ref(net(data(True)[0]).grad_fn)
        def with_backward():
            out = net(data(True)[0])
            out.sum().backward()
            return weakref.ref(out)
        for run in (forward, with_backward): assert sum(ref() is not None for ref in [run() for _ in range(1000)]) == 0
    finally: gc.enable()


def test_a_deep_net_needs_no_recursion():
    net = Sequential(*[Residual(Linear(2, 2)) for _ in range(3000)])
    for layer in net: nn.init.zeros_(layer.layer.weight)
    net(torch.ones(1, 2)).sum().backward()
    assert_close(net[0].layer.bias.grad, torch.ones(2))


DDP = '''
import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from miniai.module import Linear, MSELoss, ReLU, Residual, Sequential

def train(rank, file, wrapped):
    torch.manual_seed(0)
    net = Sequential(Linear(3, 4), ReLU(), Residual(Linear(4, 4)), Linear(4, 2)).double()
    x, y = torch.linspace(-1, 1, 24).double().view(8, 3), torch.linspace(0, 2, 16).double().cos().view(8, 2)
    model = net
    if wrapped:
        os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
        dist.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
        model, x, y = DistributedDataParallel(net), x[rank::2], y[rank::2]
    opt = torch.optim.AdamW(net.parameters(), lr=.05)
    for _ in range(10):
        MSELoss()(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    if wrapped: dist.destroy_process_group()
    torch.save(net.state_dict(), f'{file}.{rank}.pt')

if __name__ == '__main__':
    file = sys.argv[1]
    mp.spawn(train, (file, True), nprocs=2)
    train(2, file, False)
    states = [torch.load(f'{file}.{rank}.pt', weights_only=True) for rank in range(3)]
    print(max((states[i][k] - states[2][k]).abs().max().item() for i in (0, 1) for k in states[2]))
'''


def test_two_processes_equal_one(tmp_path):
    script = tmp_path / 'ddp.py'
    script.write_text(DDP)
    r = subprocess.run([sys.executable, script, tmp_path / 'store'], capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr[-2000:]
    assert float(r.stdout.split()[-1]) < 1e-14


# ---- the contract of a layer

class Scale(Module):
    def __init__(self, k=3):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(k))

    def forward(self, x): return x * self.scale
    def bwd(self, grad, out, x, scale): return grad * scale, (grad * x).sum(0)


def test_forward_without_its_own_bwd_raises():
    with pytest.raises(TypeError, match='Doubled defines forward but inherits bwd'):
        class Doubled(Scale):
            def forward(self, x): return 2 * super().forward(x)


def test_a_layer_with_children_raises():
    layer = Scale()
    layer.inner = Linear(3, 3)
    with pytest.raises(TypeError, match='Scale has a bwd and child modules'): layer(torch.ones(2, 3))


@pytest.mark.parametrize('grads,count', [(lambda g: g, 1), (lambda g: (g,), 1), (lambda g: (g, g, g), 3), (lambda g: (), 0)])
def test_a_wrong_number_of_gradients_raises(grads, count):
    class Wrong(Scale):
        def bwd(self, grad, out, x, scale): return grads(grad)
    out = Wrong()(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match=fr'Wrong\(\): bwd returned {count} gradients, needs 2'): out.sum().backward()


def test_tensors_inside_a_list_raise():
    class Concat(Module):
        def forward(self, xs): return torch.cat(xs)
        def bwd(self, grad, out, xs): return None
    for xs in ([torch.ones(1)], (torch.ones(1),), {'a': torch.ones(1)}):
        with pytest.raises(TypeError, match='Concat: pass each tensor as an argument of its own'): Concat()(xs)
        with pytest.raises(TypeError, match='Concat: pass each tensor as an argument of its own'): Concat()(torch.ones(1), xs)


def test_a_wrong_shape_raises_in_torch():
    class Wrong(Scale):
        def bwd(self, grad, out, x, scale): return grad[:1], scale
    with pytest.raises(RuntimeError, match='invalid gradient'): Wrong()(torch.ones(2, 3, requires_grad=True)).sum().backward()


def test_subclasses_may_override_either_method():
    class Doubled(Scale):
        def forward(self, x): return 2 * super().forward(x)
        def bwd(self, grad, out, x, scale): return super().bwd(2 * grad, out, x, scale)
    class Loud(Doubled):
        calls = 0
        def bwd(self, grad, out, x, scale):
            self.calls += 1
            return super().bwd(grad, out, x, scale)
    class Again(Loud): pass
    for kind in (Doubled, Loud, Again):
        layer = kind().double()
        check_grads(lambda t, layer=layer: (layer(t)**2).sum(), [torch.randn(4, 3, **f64)])
        out = layer(torch.ones(2, 3, **f64, requires_grad=True))
        assert out.grad_fn.layer is layer                              # one node, not one for each class
        assert not any(hasattr(f, 'layer') for f, _ in out.grad_fn.next_functions)
    assert layer.calls > 0
    class AsNet(Scale):
        bwd = None
        def forward(self, x): return super().forward(x).exp()
    net = AsNet().double()
    check_grads(lambda t: net(t).sum(), [torch.randn(4, 3, **f64)])
    class GetsBwd(AsNet):
        def bwd(self, grad, out, x, scale): return grad * out * scale, (grad * out * x).sum(0)
    layer = GetsBwd().double()
    assert layer(torch.ones(2, 3, **f64)).grad_fn.layer is layer
    check_grads(lambda t: layer(t).sum(), [torch.randn(4, 3, **f64)])


def test_extra_values_reach_bwd_and_not_the_caller():
    class Kept(Module):
        def forward(self, x, k): return x * k, x > 0, 'note'
        def bwd(self, grad, out, x, k, mask, note):
            assert note == 'note' and k == 3 and torch.equal(mask, x > 0)
            return grad * k, None
    layer, x = Kept(), torch.randn(4, **f64, requires_grad=True)
    out = layer(x, 3)
    out.sum().backward()
    assert_close(x.grad, torch.full_like(x, 3.))
    with torch.no_grad(): assert isinstance(layer(x, 3), torch.Tensor)
    assert isinstance(layer(x.detach(), 3), torch.Tensor)


def test_a_layer_that_returns_its_input_or_a_view_of_it():
    class Same(Module):
        def forward(self, x): return x
        def bwd(self, grad, out, x): return grad
    x = torch.ones(2, 3, **f64, requires_grad=True)
    Sequential(Same(), Linear(3, 2, **f64), Same(), Flatten(0))(x).sum().backward()
    assert x.grad.shape == (2, 3)


# ---- check_twin notices what is wrong

class Good(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer('calls', torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return x * self.weight + self.bias


class Ours(Module):
    names, step = ('weight', 'bias'), 1

    def __init__(self):
        super().__init__()
        for name in self.names: setattr(self, name, nn.Parameter(torch.ones(3) if name == 'weight' else torch.zeros(3)))
        self.register_buffer('calls', torch.zeros(1))

    def forward(self, x):
        self.calls += self.step
        return x * self.weight + self.bias

    def bwd(self, grad, out, x, weight, bias): return grad * weight, (grad * x).sum(0), grad.sum(0)


def changed(**what):
    if 'forward' in what: what.setdefault('bwd', Ours.bwd)
    return type('Ours', (Ours,), what)().double()


def spoils_input(self, x):
    out = Ours.forward(self, x)
    with torch.no_grad(): x.detach().add_(1)
    return out


def spoils_grad(self, grad, out, x, weight, bias):
    grads = Ours.bwd(self, grad, out, x, weight, bias)
    grad.mul_(2)
    return grads


def test_check_twin_accepts_a_twin_and_leaves_its_state():
    twin = Good().double()
    twin.weight.data.mul_(3)
    layer, x = changed(), torch.randn(4, 3, **f64)
    layer(x).sum().backward()                                      # an old gradient does not count
    layer.calls.zero_()
    check_twin(layer, twin, x)
    for m in (layer, twin):
        assert m.calls == 0 and torch.equal(m.weight.data, torch.full((3,), 3., **f64)) and m.weight.grad is None


@pytest.mark.parametrize('what,message', [
    (dict(names=('bias', 'weight')), 'in this order'),
    (dict(names=('weight', 'bias', 'more')), 'parameters: got'),
    (dict(forward=lambda self, x: x * self.weight), 'output: worst'),
    (dict(forward=lambda self, x: (x * self.weight + self.bias).float()), 'output: got torch.float32'),
    (dict(forward=lambda self, x: Ours.forward(self, x)[:1]), 'output: got shape'),
    (dict(bwd=lambda self, g, out, x, w, b: (g, (g * x).sum(0), g.sum(0))), 'gradient of input 0'),
    (dict(bwd=lambda self, g, out, x, w, b: (g * w, -(g * x).sum(0), g.sum(0))), 'gradient of weight'),
    (dict(bwd=lambda self, g, out, x, w, b: (g * w, (g * x).sum(0), g.mean(0))), 'gradient of bias'),
    (dict(bwd=lambda self, g, out, x, w, b: (g * w, (g * x).sum(0), None)), 'gradient of bias: got None'),
    (dict(bwd=lambda self, g, out, x, w, b: (torch.ones_like(g) * w, (g * x).sum(0), g.sum(0))), 'gradient of input 0'),
    (dict(bwd=spoils_grad), 'grad after bwd'),
    (dict(forward=spoils_input), 'gradient of weight|input 0 after'),
    (dict(step=2), 'calls after the call'),
])
def test_check_twin_names_what_differs(what, message):
    twin = Good().double()
    twin.weight.data = torch.tensor([1., -2., .5], **f64)
    twin.bias.data = torch.tensor([.1, .2, .3], **f64)
    with pytest.raises((AssertionError, RuntimeError), match=message): check_twin(changed(**what), twin, torch.randn(4, 3, **f64))


def test_check_twin_needs_a_bwd_and_the_same_dtype():
    class Lazy(Module):
        def forward(self, x): return x.sigmoid()
    for lazy in (Lazy(), Sequential(ReLU(), Lazy()), nn.Sigmoid()):
        with pytest.raises(AssertionError, match='has no bwd of its own'): check_twin(lazy, nn.Sigmoid(), torch.randn(2, 3, **f64))
    with pytest.raises(AssertionError, match='weight: got torch.float32'):
        check_twin(Linear(3, 2), nn.Linear(3, 2, **f64), torch.randn(2, 3, **f64))
    with pytest.raises(RuntimeError, match='size mismatch'): check_twin(Linear(3, 2), nn.Linear(3, 4), torch.randn(2, 3))
    class Adds(MSELoss):
        def bwd(self, grad, out, input, target): return *super().bwd(grad, out, input, target)[:1], None
    with pytest.raises(AssertionError, match='gradient of input 1'): check_twin(Adds(), nn.MSELoss(), *torch.randn(2, 4, 3, **f64))
    check_twin(Adds(), nn.MSELoss(), *torch.randn(2, 4, 3, **f64), wrt=[0])


def test_check_twin_notices_a_changed_input():
    class Spoils(ReLU):
        def forward(self, x):
            out = x.clamp_min(0)
            x.detach().add_(1)
            return out
        def bwd(self, grad, out, x): return grad * out.sign()
    with pytest.raises(AssertionError, match='input 0 after the call'): check_twin(Spoils(), nn.ReLU(), torch.randn(4, 3, **f64))


def test_check_twin_with_frozen_parameters_and_integer_inputs():
    layer, twin = Linear(3, 2, **f64), nn.Linear(3, 2, **f64)
    for m in (layer, twin): m.weight.requires_grad_(False)
    check_twin(layer, twin, torch.randn(4, 3, **f64))
    layer.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match='gradient of weight: expected None'): check_twin(layer, twin, torch.randn(4, 3, **f64))
    class Pick(Module):
        def forward(self, x, i): return x[i]
        def bwd(self, grad, out, x, i): return torch.zeros_like(x).index_add_(0, i, grad), None
    class TorchPick(nn.Module):
        def forward(self, x, i): return x[i]
    check_twin(Pick(), TorchPick(), torch.randn(4, 3, **f64), torch.tensor([0, 2, 2]))


def test_the_module_uses_public_torch_only():
    source = open(ours.__file__, encoding='utf-8').read()
    for private in ('torch._C', '_execution_engine', '_post_accumulate', '_backward_hooks', '._version'): assert private not in source

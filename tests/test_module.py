"What must hold of our engine beyond the chapter: threads, depth, failures in the middle, and no help from autograd."
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from miniai.module import Flatten, Linear, Module, MSELoss, ReLU, Residual, Sequential


def make(seed=0, width=4):
    torch.manual_seed(seed)
    return Sequential(Linear(3, width), ReLU(), Residual(Linear(width, width)), Linear(width, 2)).to(torch.float64)


def train(net, steps=50):
    x, y = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3), torch.ones(5, 2, dtype=torch.float64)
    opt = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(steps):
        out = net(x)
        # every third loss reaches the net through autograd, so that both borders are used
        loss = MSELoss()(out, y) if step % 3 else nn.MSELoss()(out, y) + out.square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
    return [p.detach().clone() for p in net.parameters()]


def test_two_threads_train_two_nets():
    alone, nets = [train(make(seed)) for seed in range(2)], [make(seed) for seed in range(2)]
    together = [None, None]
    def run(seed): together[seed] = train(nets[seed])
    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    for one, other in zip(alone, together):
        for p, q in zip(one, other): assert torch.equal(p, q)


def test_a_failure_in_autograds_pass_leaves_nothing_behind():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, grad): raise OSError('broken on purpose')
    net, x = make(), torch.ones(5, 3, dtype=torch.float64)
    first = net[0](x)
    with pytest.raises(OSError, match='broken on purpose'): (net(x).sum() + Fails.apply(first).sum()).backward()
    net.zero_grad()
    net(x).sum().backward()
    got = [p.grad for p in net.parameters()]
    fresh = make()
    fresh(x).sum().backward()
    for g, p in zip(got, fresh.parameters()): assert_close(g, p.grad)


def test_a_long_chain_needs_no_recursion():
    net = Sequential(*[Residual(Linear(2, 2)) for _ in range(3000)])
    for layer in net: torch.nn.init.zeros_(layer.layer.weight)
    out = net(torch.ones(1, 2))
    out.sum().backward()
    assert_close(net[0].layer.bias.grad, torch.ones(2))
    del out


def test_many_torch_additions_cost_no_exponential_walk():
    layer, x = Linear(3, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    twin = nn.Linear(3, 3, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    for net in (layer, twin):
        h = x
        for _ in range(60): h = h + net(h) * 0.1
        h.sum().backward()
    assert_close(layer.weight.grad, twin.weight.grad)


def test_forward_and_backward_use_neither_autograd_nor_nn(monkeypatch):
    def forbidden(*args, **kwargs): raise AssertionError('not our own')
    for name in dir(torch.nn.functional):
        if callable(getattr(torch.nn.functional, name)) and name[0].islower(): monkeypatch.setattr(torch.nn.functional, name, forbidden)
    for place, name in ((nn.Linear, 'forward'), (nn.ReLU, 'forward'), (torch.autograd, 'grad'), (torch.autograd, 'backward'),
                        (torch.Tensor, 'backward'), (torch.autograd.Function, 'apply')):
        monkeypatch.setattr(place, name, forbidden)
    net = Sequential(Flatten(), *make())
    x = torch.ones(5, 3, 1, dtype=torch.float64).requires_grad_()
    loss = MSELoss()(net(x), torch.zeros(5, 2, dtype=torch.float64))
    assert loss.grad_fn is None
    loss.backward()
    assert x.grad is not None and all(p.grad is not None for p in net.parameters())


def test_a_layer_that_returns_its_input_or_a_view_of_it():
    class Same(Module):
        def forward(self, x): return x
        def bwd(self, grad, out, x): return grad
    for x in (torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64, requires_grad=True)):
        net = Sequential(Same(), Linear(3, 2, dtype=torch.float64), Same(), Flatten(0))
        net(x).sum().backward()
        assert net[1].weight.grad is not None
        assert not hasattr(x, '_made') and (x.grad is not None) == x.requires_grad


def test_a_frozen_middle_still_passes_the_gradient_on():
    net = make()
    net[2].requires_grad_(False)
    twin = make()
    x = torch.ones(5, 3, dtype=torch.float64)
    net(x).sum().backward()
    twin(x).sum().backward()
    assert_close(net[0].weight.grad, twin[0].weight.grad)
    assert net[2].layer.weight.grad is None


def test_a_layer_that_holds_others_and_lists_is_watched():
    class Holds(Module):
        def __init__(self): self.inner, self.scales = Linear(3, 3, dtype=torch.float64), [nn.Parameter(torch.ones(3, dtype=torch.float64))]
        def forward(self, x): return x * self.scales[0]
        def bwd(self, grad, out, x): return grad
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match='added nothing to .grad'): Holds()(x).sum().backward()
    layer = Holds()
    out = layer(x)
    with torch.no_grad(): layer.scales[0].add_(1)
    with pytest.raises(RuntimeError, match='changed in place'): out.sum().backward()


def test_twice_differentiated_is_refused():
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    net = make()
    (g,) = torch.autograd.grad(net(x * 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError): g.sum().backward()

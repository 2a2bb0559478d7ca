"The gradient checks of chapter 01: tolerances, NaN and infinities, odd shapes, what they leave alone, and what they reject."
import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from miniai.gradcheck import assert_same, check_grads, numeric_grad

f64 = torch.float64
x = tensor([[1., -2.], [.5, 10.]], dtype=f64)
one = torch.ones(2, 3, dtype=f64)
spot = (torch.arange(6).view(2, 3) == 4)*one        # 1 at index (1, 1), else 0
inf = tensor([1., torch.inf, -torch.inf])


def cube(t): return t.pow(3).sum()
def wave(t): return (t.sin()*t.exp()).sum()
def squares(t): return math.fsum(v*v for v in t.flatten().tolist())     # a float: autograd cannot follow it
def detached(t): return (t*t.detach()).sum()


def says(error, text, func, *args, **kw):
    with pytest.raises(error) as e: func(*args, **kw)
    assert text in str(e.value)


# ---- numeric_grad

def test_known_values():
    assert_close(numeric_grad(cube, x)[0], 3*x**2, rtol=1e-6, atol=0)
    h = .1*tensor([[1., 2.], [1., 10.]], dtype=f64)                     # the error for a cube is h² exactly
    assert_close(numeric_grad(cube, x, eps=.1)[0], 3*x**2 + h**2)
    large = numeric_grad(lambda t: t**2, tensor(1e9, dtype=f64))[0]
    assert_close(large, tensor(2e9, dtype=f64), rtol=1e-6, atol=0)


def test_default_step():
    (g,) = numeric_grad(cube, torch.zeros(1, dtype=f64))
    assert_close(g.item(), 1e-12, rtol=1e-3, atol=0)


def test_divides_by_the_distance_after_rounding():
    (g,) = numeric_grad(lambda t: 2*t, tensor(1e5, dtype=f64), eps=1e-16)   # the step, 1e-11, is under one spacing
    assert_close(g.item(), 2., rtol=1e-12, atol=0)


def test_several_arguments_and_integers():
    gx, gk, gy = numeric_grad(lambda x, k, y: (x[k]*y).sum(), x, tensor([1, 1]), 2*x)
    assert_close(gx, tensor([[0., 0.], [3., 16.]], dtype=f64), rtol=1e-6, atol=1e-8)
    assert_close(gy, x[[1, 1]], rtol=1e-6, atol=0)
    assert gk is None
    assert numeric_grad(lambda a, t: a['scale']*t.sum(), dict(scale=2.), x[0])[0] is None


@pytest.mark.parametrize('shape', [(), (1,), (3, 1), (2, 1, 3), (0, 2)])
def test_odd_shapes_against_autograd(shape):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=f64).requires_grad_()
    (want,) = torch.autograd.grad(wave(t), t)
    (got,) = numeric_grad(wave, t)
    assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_arguments_are_not_changed():
    before = x.clone()
    assert_close(numeric_grad(lambda t: t.mul_(t).sum(), x)[0], 2*x, rtol=1e-6, atol=0)   # func may work in place
    numeric_grad(lambda t, k: t.sum() + k.add_(1).sum(), x, label := tensor([1, 2]))      # on integers, too
    assert torch.equal(x, before) and label.tolist() == [1, 2]


def test_views_floats_and_no_recording():
    assert_close(numeric_grad(cube, x.T)[0], 3*x.T**2, rtol=1e-6, atol=0)                 # not contiguous
    assert_close(numeric_grad(cube, x[:, :1].expand(2, 3))[0], 3*x[:, :1].expand(2, 3)**2, rtol=1e-6, atol=0)
    assert_close(numeric_grad(squares, x)[0], 2*x, rtol=1e-6, atol=0)
    assert_close(numeric_grad(lambda t: cube(t)[None], x)[0], 3*x**2, rtol=1e-6, atol=0)  # one element, of any shape
    seen = []
    numeric_grad(lambda t: seen.append((torch.is_grad_enabled(), t.requires_grad)) or t.sum(), x.clone().requires_grad_())
    assert set(seen) == {(False, False)}


@pytest.mark.parametrize('text, func, args', [
    ('argument 0 is torch.float32; central differences need torch.float64', cube, (x.float(),)),
    ('argument 1 is torch.float16', lambda k, t: cube(t), (3, x.half())),
    ('func returned torch.float32', lambda t: t.float().sum(), (x,)),
    ('func returned torch.int64', lambda t: t.long().sum(), (x,))])
def test_rejects_other_dtypes(text, func, args): says(TypeError, text, numeric_grad, func, *args)


def test_func_must_return_one_number():
    with pytest.raises((RuntimeError, ValueError, TypeError)): numeric_grad(lambda t: t*2, x)


# ---- assert_same

@pytest.mark.parametrize('rtol, atol, allowed', [(1e-3, 0, 5e-3), (0, 1e-3, 1e-3), (1e-3, 1e-3, 6e-3)])
@pytest.mark.parametrize('sign', [1, -1])
def test_both_tolerances(rtol, atol, allowed, sign):
    assert_same('t', 5*one + .99*sign*allowed*spot, 5*one, rtol, atol)
    says(AssertionError, 't: worst at index (1, 1): got ', assert_same, 't', 5*one + 1.01*sign*allowed*spot, 5*one, rtol, atol)


def test_bound_and_direction():
    assert_same('t', one + .5, one, 0, .5)                              # exactly at the bound
    assert_same('t', -one, -one - .5*spot, .5, 0)                       # relative to |expected|
    says(AssertionError, 'got 3.5, expected 6.0 (known)', assert_same, 't', 5*one - 1.5*spot, 5*one + spot, .3, 0, 'known')


def test_equal_passes():
    assert_same('t', inf, inf.clone(), 0, 0)
    assert_same('t', tensor(3), tensor(3), 0, 0)
    assert_same('t', tensor([]), tensor([]), 0, 0)
    assert_same('t', tensor([True]), tensor([True]), 0, 0)
    assert_same('t', one.clone().requires_grad_(), one, 0, 0)


@pytest.mark.parametrize('got, want, rtol, atol, text', [
    (one + .1*spot, one + tensor([0, 0, 2.]), 0, 1e-2, 'index (0, 2): got 1.0, expected 3.0 (theirs)'),
    (inf, -inf, 0, 9, 'index (1,): got inf, expected -inf'),
    (inf, tensor([1., 2., -torch.inf]), 9, 9, 'got inf'),
    (tensor([1., 2., -torch.inf]), inf, 9, 9, 'expected inf'),
    (tensor([1., 2., -torch.inf]), inf, 0, 0, 'expected inf'),
    (tensor([1., torch.nan]), tensor([1., torch.nan]), 9, 9, 'index (1,): got nan, expected nan'),
    (tensor([1., torch.nan]), tensor([9., 2.]), 0, 0, 'index (1,): got nan, expected 2.0'),
    (tensor([1., 2.]), tensor([1., torch.nan]), 9, 9, 'index (1,): got 2.0, expected nan'),
    (tensor(2), tensor(3), 0, 0, 'index (): got 2, expected 3'),
    (one[0], one, 9, 9, 't: got shape (3,), expected (2, 3)'),
    (one[:1], one, 9, 9, 't: got shape (1, 3), expected (2, 3)'),
    (one.float(), one, 9, 9, 't: got torch.float32, expected torch.float64'),
    (None, one, 9, 9, 't: got None, expected a tensor of shape (2, 3) (theirs)'),
    (1., tensor(1.), 9, 9, 't: got 1.0, expected a tensor of shape () (theirs)')])
def test_different_fails(got, want, rtol, atol, text): says(AssertionError, text, assert_same, 't', got, want, rtol, atol)


# ---- check_grads

def net_loss(inp, w, b, targ): return ((inp @ w + b).clamp_min(0)[:, 0] - targ).pow(2).mean()


def net(n=5, m=3):
    "A small layer with its hand-written gradients: the arguments of `net_loss`, and one gradient for each"
    gen = torch.Generator().manual_seed(5)
    inp, w, b, targ = (torch.randn(s, generator=gen, dtype=f64) for s in ((n, m), (m, 1), (1,), (n,)))
    l = inp @ w + b
    g = 2*(l.clamp_min(0) - targ[:, None])/n*(l > 0)
    return [inp, w, b, targ], [g @ w.T, inp.T @ g, g.sum(0), None]


@pytest.mark.parametrize('n, m', [(1, 4), (5, 1), (1, 1), (7, 5)])
def test_right_gradients_pass(n, m):
    args, grads = net(n, m)
    check_grads(net_loss, args, grads)
    check_grads(net_loss, tuple(args), tuple(grads), autograd=False)
    check_grads(net_loss, args)


@pytest.mark.parametrize('text, i, spoil', [
    ('gradient of argument 1: worst at index (2, 0): got ', 1, lambda g: g + .05*(torch.arange(3) == 2)[:, None]),
    ('gradient of argument 0: worst', 0, lambda g: -g),
    ('gradient of argument 2: worst', 2, lambda g: g/2),
    ('argument 1: got shape (3,), expected (3, 1)', 1, lambda g: g[:, 0]),
    ('argument 2: got torch.float32, expected torch.float64', 2, lambda g: g.float()),
    ('got nan', 0, lambda g: g*torch.nan),
    ('(central differences)', 1, lambda g: g*(1 + 1e-4)),
    ('(autograd)', 1, lambda g: g*(1 + 1e-8))])         # too small to be measured
def test_wrong_gradients_fail(text, i, spoil):
    args, grads = net()
    grads[i] = spoil(grads[i])
    says(AssertionError, text, check_grads, net_loss, args, grads)


def test_without_autograd_a_tiny_error_passes():
    args, (gi, gw, gb, _) = net()
    check_grads(net_loss, args, [gi, gw*(1 + 1e-8), gb, None], autograd=False)
    says(AssertionError, '(central differences)', check_grads, net_loss, args, [gi, gw*(1 + 1e-4), gb, None], autograd=False)


@pytest.mark.parametrize('wrong, loose, tight', [
    (3*x**2*(1 + .99e-4), dict(rtol=1e-4, atol=0), dict(rtol=8e-5, atol=0)),
    (3*x**2 + .99e-3, dict(rtol=0, atol=1e-3), dict(rtol=0, atol=8e-4))])
def test_tolerances_can_be_set(wrong, loose, tight):
    check_grads(cube, [x], [wrong], autograd=False, **loose)
    says(AssertionError, '(central differences)', check_grads, cube, [x], [wrong], autograd=False, **tight)
    says(AssertionError, '(autograd)', check_grads, cube, [x], [wrong], **{k: 989.5*v for k, v in loose.items()})
    check_grads(cube, [x], [wrong], **{k: 990.5*v for k, v in loose.items()})


def test_default_step_and_tolerance():
    flat = torch.zeros(2, dtype=f64)
    check_grads(lambda t: 100*cube(t), [flat], [flat])
    says(AssertionError, '(central differences)', check_grads, cube, [flat], [flat + 2e-8], autograd=False)
    check_grads(cube, [flat], [flat + .9e-8], autograd=False)
    check_grads(cube, [x], [3*x**2 + (.1*x.abs().clamp_min(1))**2], eps=.1, autograd=False)


def test_a_misplaced_detach_is_found():
    says(AssertionError, 'argument 0: worst at index (1, 1): got 10.0, expected ', check_grads, detached, [x])
    says(AssertionError, 'argument 1: worst at index', check_grads, lambda x, y: (x*y.detach()).sum(), [x, x])
    says(AssertionError, '(central differences)', check_grads, detached, [x], [x])
    says(AssertionError, '(autograd)', check_grads, detached, [x], [2*x])


def test_what_autograd_cannot_follow():
    check_grads(squares, [x], [2*x], autograd=False)
    says(TypeError, 'autograd cannot follow func(*args): pass gradients and autograd=False', check_grads, squares, [x], [2*x])
    says(TypeError, 'autograd cannot follow', check_grads, squares, [x])
    says(TypeError, 'autograd cannot follow', check_grads, lambda t: t.detach().sum(), [x], [torch.ones_like(x)])


def test_an_argument_without_influence_has_a_zero_gradient():
    first = lambda x, y: x.pow(2).sum()
    check_grads(first, [x, x], [2*x, torch.zeros_like(x)])
    check_grads(first, [x, x])
    says(AssertionError, 'gradient of argument 1', check_grads, first, [x, x], [2*x, x])


def test_a_skipped_gradient_is_not_checked():
    check_grads(lambda x, y: (x*y).sum(), [x, 3*x], [None, x])
    check_grads(lambda x, k: x[k].sum(), [x, tensor(0)], [tensor([[1., 1.], [0., 0.]], dtype=f64), None])


def test_works_under_no_grad_and_leaves_the_arguments_alone():
    with torch.no_grad(): check_grads(cube, (x,), [3*x**2])
    with torch.no_grad(): check_grads(cube, (x,))
    leaf = x.clone().requires_grad_()
    check_grads(cube, [leaf])
    assert leaf.grad is None
    def spoils(t): out = (3*t).sum(); t.data.zero_(); return out
    kept = x.clone()
    check_grads(spoils, [kept])
    check_grads(spoils, [kept], [torch.full_like(x, 3)])
    assert torch.equal(kept, x) and not kept.requires_grad and kept.grad is None


@pytest.mark.parametrize('t', [x, x.clone().requires_grad_()])
def test_autograd_rejects_a_func_that_changes_its_argument(t):
    says(RuntimeError, 'leaf', check_grads, lambda t: t.mul_(2).sum(), [t])


@pytest.mark.parametrize('error, text, func, args, grads', [
    (TypeError, 'got one tensor: write [x]', cube, x, [3*x**2]),
    (ValueError, '2 gradients for 1 arguments', cube, [x], [3*x**2, None]),
    (ValueError, '1 gradients for 2 arguments', lambda x, y: x.sum(), [x, x], [torch.ones_like(x)]),
    (ValueError, 'nothing to check', cube, [x], [None]),
    (ValueError, 'argument 1 is not a float64 tensor: pass None', lambda x, k: x[k].sum(), [x, tensor(0)], [None, tensor(0.)])])
def test_rejects_wrong_arguments(error, text, func, args, grads): says(error, text, check_grads, func, args, grads)

"Optimisers and schedules: every combination of options against PyTorch's over 200 steps in float64, and states exchanged in the middle."
import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.testing import assert_close

from miniai import optim
from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, ReLU, Sequential
from miniai.optim import Adam, AdamW, AsTorch, Momentum, RMSprop
from miniai.training import SGD

STEPS = 200
gen = torch.Generator().manual_seed(0)
starts = [torch.randn(s, generator=gen, dtype=torch.float64) for s in ((3, 4), (4,), (), (2, 1, 3))]
pushes = [[torch.randn(s.shape, generator=gen, dtype=torch.float64) for s in starts] for _ in range(STEPS)]


def leaf(*shape, **kwargs): return torch.zeros(shape, requires_grad=True, **kwargs)


def grid(**choices):
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def make(kind, params, **options): return kind([{'params': params[:3]}, {'params': params[3:], 'lr': .003}], **{'lr': .01, **options})


def drive(params, opt, steps):
    "Gradients by hand; some are missing at some steps, one starts late, one parameter is frozen halfway"
    for t in steps:
        for i, p in enumerate(params):
            skipped = i == 1 and t % 3 == 0 or i == 2 and t < 5 or i == 3 and t >= 100
            p.grad = None if skipped else 3*(p.detach() - i).sin() + pushes[t][i]
        opt.step()


def race(kind, steps=STEPS, **options):
    params = [s.clone().requires_grad_() for s in starts]
    opt = make(kind, params, **options)
    drive(params, opt, range(steps))
    return params, opt


def assert_same_state(opt, twin):
    ours, theirs = opt.state_dict(), twin.state_dict()
    assert ours['param_groups'] == theirs['param_groups']
    assert_close(ours['state'], theirs['state'], rtol=1e-9, atol=1e-12)


combinations = [
    *((Momentum, torch.optim.SGD, w) for w in grid(momentum=(0, .5, .9), dampening=(0, .3), weight_decay=(0, .1), nesterov=(False, True),
                                                   maximize=(False, True)) if not w['nesterov'] or w['momentum'] and not w['dampening']),
    *((RMSprop, torch.optim.RMSprop, w) for w in grid(alpha=(.99, .5), centered=(False, True), momentum=(0, .9),
                                                      weight_decay=(0, .1), maximize=(False, True))),
    *((Adam, torch.optim.Adam, w) for w in grid(betas=((.9, .999), (0., .5)), amsgrad=(False, True), weight_decay=(0, .1),
                                                maximize=(False, True), decoupled_weight_decay=(False, True))),
    *((AdamW, torch.optim.AdamW, w) for w in grid(eps=(1e-8, .1), amsgrad=(False, True), weight_decay=(0, .1),
                                                  maximize=(False, True))),
]


def named(item): return item.__name__ if isinstance(item, type) else '-'.join(f'{k}={v}' for k, v in item.items())


@pytest.mark.parametrize('ours, theirs, options', combinations, ids=named)
def test_same_trajectory_and_state(ours, theirs, options):
    (params, opt), (expected, twin) = race(ours, **options), race(theirs, **options)
    assert all(p.isfinite().all() for p in expected)
    assert_close(params, expected, rtol=1e-9, atol=1e-12)
    assert_same_state(opt, twin)


on = [(Momentum, torch.optim.SGD, dict(momentum=.9, dampening=.3, weight_decay=.1, maximize=True)),
      (Momentum, torch.optim.SGD, dict(momentum=.9, nesterov=True, weight_decay=.1)), (Momentum, torch.optim.SGD, {}),
      (RMSprop, torch.optim.RMSprop, dict(centered=True, momentum=.9, eps=.01, weight_decay=.1, maximize=True)),
      (Adam, torch.optim.Adam, dict(eps=.01, amsgrad=True, weight_decay=.1, maximize=True)),
      (AdamW, torch.optim.AdamW, dict(amsgrad=True, weight_decay=.1, maximize=True))]


@pytest.mark.parametrize('way', ['ours to theirs', 'theirs to ours', 'ours to ours'])
@pytest.mark.parametrize('ours, theirs, options', on, ids=named)
def test_states_can_be_exchanged_in_the_middle(ours, theirs, options, way):
    expected, last = race(theirs, **options)
    first, then = {'ours to theirs': (ours, theirs), 'theirs to ours': (theirs, ours), 'ours to ours': (ours, ours)}[way]
    params, opt = race(first, 90, **options)
    heirs = [p.detach().clone().requires_grad_() for p in params]
    heir = make(then, heirs)
    state = opt.state_dict()
    heir.load_state_dict(state)
    drive(heirs, heir, range(90, STEPS))
    assert_close(heirs, expected, rtol=1e-9, atol=1e-12)
    assert_same_state(heir, last)


@pytest.mark.parametrize('ours, theirs, options', on, ids=named)
def test_fresh_state_has_all_keys(ours, theirs, options):
    params = [leaf(2), leaf(3)]
    assert ours(params, **options).state_dict() == theirs(params, **options).state_dict()


@pytest.mark.parametrize('ours, theirs, options', on, ids=named)
def test_deepcopy_and_pickle_continue_alike(ours, theirs, options):
    params, opt = race(ours, 30, **options)
    for copied in copy.deepcopy((params, opt)), pickle.loads(pickle.dumps((params, opt))):
        new, new_opt = copied
        mine, my_opt = copy.deepcopy((params, opt))
        drive(new, new_opt, range(30, 50))
        drive(mine, my_opt, range(30, 50))
        assert_close(new, mine, rtol=0, atol=0)


@pytest.mark.parametrize('ours, theirs, options', on, ids=named)
@pytest.mark.parametrize('engine', ['ours', 'torch'])
def test_trains_both_engines_like_its_twin(ours, theirs, options, engine):
    options = {**options, 'maximize': False, 'lr': .01}
    x, y = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)).double(), torch.arange(20) % 3
    ends = []
    for kind in ours, theirs:
        torch.manual_seed(0)
        if engine == 'ours': net = Sequential(Linear(6, 5), ReLU(), Linear(5, 3)).to(torch.float64)
        else: net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(torch.float64)
        opt = kind(net.parameters(), **options)
        for _ in range(20):
            CrossEntropyLoss()(net(x), y).backward()
            opt.step()
            opt.zero_grad()
        ends.append([p.detach() for p in net.parameters()])
    assert_close(*ends, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('ours, theirs, options', on, ids=named)
def test_gradients_and_kept_gradients_stay(ours, theirs, options):
    p = torch.ones(3, requires_grad=True)
    opt = ours([p], **options)
    p.grad = kept = torch.tensor([1., -2., 3.])
    for _ in range(3): opt.step()
    assert p.grad is kept
    assert_close(kept, torch.tensor([1., -2., 3.]))
    kept.fill_(7)
    assert not any((v == 7).any() for s in opt.state.values() for v in s.values() if v.ndim)


@pytest.mark.parametrize('ours, theirs, options', on, ids=named)
def test_mixed_types_and_odd_layouts_in_one_group(ours, theirs, options):
    def some():
        params = [torch.ones(4, 3, dtype=d, requires_grad=True) for d in (torch.float32, torch.float64, torch.bfloat16)]
        return [*params, torch.ones(3, 4).t().requires_grad_(), torch.ones(0, 2, requires_grad=True)]
    mixed, alone = some(), some()
    opt, twins = ours(mixed, **options), [theirs([p], **options) for p in alone]
    for t in range(6):
        for p in mixed + alone: p.grad = torch.full((1,), .3 - t, dtype=p.dtype).expand(p.shape) # like the gradient of `p.sum()`
        for o in opt, *twins: o.step()
    assert_close(mixed, alone)
    assert all(s['exp_avg'].stride() == p.stride() for p, s in opt.state.items() if 'exp_avg' in s)


def test_meta_device_beside_cpu():
    p, q = torch.ones(2, requires_grad=True), torch.ones(2, device='meta', requires_grad=True)
    p.grad, q.grad = torch.ones(2), torch.ones(2, device='meta')
    opt = Momentum([p, q], lr=.1, momentum=.9)
    for _ in range(2): opt.step()
    assert_close(p.detach(), torch.full((2,), 1 - .1 - .19))


@pytest.mark.parametrize('kind', [Momentum, RMSprop, Adam, AdamW])
def test_errors_name_the_option(kind):
    p = leaf(2)
    for options, text in [(dict(lr=torch.tensor(.1)), 'lr is tensor'), (dict(lr=-1), 'lr is -1'),
                        (dict(weight_decay=-.1), 'weight_decay is -0.1'), (dict(differentiable=True), 'differentiable is True')]:
        with pytest.raises(ValueError, match=f'{kind.__name__}.*{text}'): kind([p], **options)
    with pytest.raises(TypeError, match='unexpected keyword'): kind([p], learning_rate=1)
    with pytest.raises(ValueError, match='unknown options'): kind([{'params': p, 'learning_rate': 1}])
    with pytest.raises(TypeError, match='complex'): kind([leaf(2, dtype=torch.complex64)])
    if kind is not RMSprop:
        with pytest.raises(ValueError, match='fused is True'): kind([p], fused=True)
        state = (torch.optim.SGD if kind is Momentum else torch.optim.Adam)([p], fused=True).state_dict()
        with pytest.raises(ValueError, match='fused is True'): kind([p]).load_state_dict(state)


def test_parameters_may_be_a_generator_and_a_group_one_tensor():
    net = nn.Linear(2, 2)
    assert len(Adam(net.parameters()).param_groups[0]['params']) == 2
    assert Adam([{'params': net.weight}, {'params': net.parameters() if False else [net.bias]}]).param_groups[0]['params'][0] is net.weight


# ---- schedules


def two_groups(kind, **options): return kind([{'params': [leaf(1)]}, {'params': [leaf(2)], 'lr': .02}], lr=.3, **options)


def warm_cosine(m, o): return m['SequentialLR'](o, [m['LinearLR'](o, .1, total_iters=7), m['CosineAnnealingLR'](o, 40)], [7])


schedules = {f'{name} {options}': (lambda m, o, name=name, options=options: m[name](o, **options)) for name, options in [
    *(('StepLR', w) for w in grid(step_size=(1, 7, 60), gamma=(.1, .9))),
    *(('ExponentialLR', w) for w in grid(gamma=(.5, .99))),
    *(('LinearLR', w) for w in grid(start_factor=(.1, 1.), end_factor=(0., .5, 1.), total_iters=(1, 12))),
    *(('CosineAnnealingLR', w) for w in grid(T_max=(1, 9, 50), eta_min=(0, .001))),
    *(('OneCycleLR', w) for w in grid(max_lr=(.4, [.4, .1]), total_steps=(60,), pct_start=(0., .3, .45),
                                      anneal_strategy=('cos', 'linear'), three_phase=(False, True)))]}
schedules['warm-up and cosine'] = warm_cosine


@pytest.mark.parametrize('pair', [(Momentum, torch.optim.SGD), (AdamW, torch.optim.AdamW)], ids=['sgd', 'adamw'])
@pytest.mark.parametrize('name', schedules)
def test_schedule_and_its_state(name, pair):
    modules = vars(optim), vars(lr_scheduler)
    def values(opt): return [(g['lr'], g.get('momentum'), g.get('betas')) for g in opt.param_groups]
    def run(sched, steps):
        seen = []
        for _ in range(steps):
            seen.append(values(sched.optimizer))
            sched.optimizer.step()
            sched.step()
        return seen
    ours, theirs = (schedules[name](m, two_groups(kind)) for m, kind in zip(modules, pair))
    assert_close(run(ours, 25), run(theirs, 25), rtol=1e-9, atol=1e-12)
    heirs = [schedules[name](m, two_groups(kind)) for m, kind in zip(modules, pair)]
    for heir, last in zip(heirs, (theirs, ours)):
        heir.load_state_dict(copy.deepcopy(last.state_dict()))
        heir.optimizer.load_state_dict(last.optimizer.state_dict())
    expected = run(theirs, 24)
    for sched in ours, *heirs: assert_close(run(sched, 24), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize('options', grid(mode=('min', 'max'), threshold_mode=('rel', 'abs'), threshold=(1e-4, .1), patience=(0, 2),
                                       cooldown=(0, 2), min_lr=(0, [.05, .001])), ids=named)
def test_plateau(options):
    g = torch.Generator().manual_seed(1)
    ours, theirs = (k(two_groups(o), factor=.5, **options) for k, o in ((optim.ReduceLROnPlateau, Momentum),
                                                                      (lr_scheduler.ReduceLROnPlateau, torch.optim.SGD)))
    for i in range(60):
        value = torch.randn((), generator=g).item() if i != 20 else math.nan
        ours.step(value)
        theirs.step(value)
        assert ours.state_dict() == theirs.state_dict()


@pytest.mark.parametrize('kind', [SGD, Momentum, Adam])
def test_torch_schedule_on_our_optimiser(kind):
    opt = kind([leaf(1)], lr=.4)
    with pytest.raises(TypeError): lr_scheduler.StepLR(opt, 2)
    sched = lr_scheduler.StepLR(AsTorch(opt), 2)
    for want in .4, .4, .04, .04:
        assert opt.param_groups[0]['lr'] == pytest.approx(want)
        opt.step()
        sched.step()
    opt.load_state_dict(kind([leaf(1)], lr=.4).state_dict())         # the groups are other dicts now
    assert sched.optimizer.param_groups is opt.param_groups


def test_no_warnings(recwarn):
    opt = Adam([leaf(1)])
    for sched in lr_scheduler.OneCycleLR(AsTorch(opt), .1, 10), optim.OneCycleLR(opt, .1, 10):
        for _ in range(3):
            opt.step()
            sched.step()
    assert not recwarn.list

"Optimisers and schedules against PyTorch's, states exchanged in the middle, and `SchedulerCB` in a learner."
import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.testing import assert_close

from miniai import optim
from miniai.checkpoints import CheckpointCB
from miniai.learner import Callback, CancelBatch, CancelEpoch, CancelStep, Learner
from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, ReLU, Sequential
from miniai.optim import Adam, AdamW, CosineAnnealingLR, LinearLR, Momentum, OneCycleLR, RMSprop, Schedule, SchedulerCB, UpdateRule
from miniai.training import SGD, DataLoader, Dataset

STEPS = 200
gen = torch.Generator().manual_seed(0)
starts = [torch.randn(s, generator=gen, dtype=torch.float64) for s in ((3, 4), (4,), (), (2, 1, 3))]
pushes = [[torch.randn(s.shape, generator=gen, dtype=torch.float64) for s in starts] for _ in range(STEPS)]
TWINS = {Momentum: torch.optim.SGD, RMSprop: torch.optim.RMSprop, Adam: torch.optim.Adam, AdamW: torch.optim.AdamW}


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
    *((RMSprop, torch.optim.RMSprop, dict(eps=.1, centered=c)) for c in (False, True)),
    *((Adam, torch.optim.Adam, w) for w in grid(betas=((.9, .999), (0., .5)), amsgrad=(False, True), weight_decay=(0, .1),
                                                maximize=(False, True), decoupled_weight_decay=(False, True))),
    *((AdamW, torch.optim.AdamW, w) for w in grid(eps=(1e-8, .1), amsgrad=(False, True), weight_decay=(0, .1),
                                                  maximize=(False, True))),
    *((ours, theirs, dict(lr=0)) for ours, theirs in TWINS.items()),
]


def named(item): return item.__name__ if callable(item) else '-'.join(f'{k}={v}' for k, v in item.items())


@pytest.mark.parametrize('ours, theirs, options', combinations, ids=named)
def test_same_trajectory_and_state(ours, theirs, options):
    (params, opt), (expected, twin) = race(ours, **options), race(theirs, **options)
    assert all(p.isfinite().all() for p in expected)
    assert_close(params, expected, rtol=1e-9, atol=1e-12)
    assert_same_state(opt, twin)


on = [(Momentum, torch.optim.SGD, dict(momentum=.9, dampening=.3, weight_decay=.1, maximize=True)),
      (Momentum, torch.optim.SGD, dict(momentum=.9, nesterov=True, weight_decay=.1)), (Momentum, torch.optim.SGD, {}),
      (RMSprop, torch.optim.RMSprop, dict(centered=True, momentum=.9, eps=.01, weight_decay=.1, maximize=True)),
      (RMSprop, torch.optim.RMSprop, {}), (Adam, torch.optim.Adam, dict(betas=(0., .9))),
      (Adam, torch.optim.Adam, dict(eps=.01, amsgrad=True, weight_decay=.1, maximize=True)),
      (AdamW, torch.optim.AdamW, dict(amsgrad=True, weight_decay=.1, maximize=True))]


@pytest.mark.parametrize('way', ['ours to theirs', 'theirs to ours', 'ours to ours'])
@pytest.mark.parametrize('ours, theirs, options', on, ids=named)
def test_states_can_be_exchanged_in_the_middle(ours, theirs, options, way):
    expected, last = race(theirs, **options)
    first, then = {'ours to theirs': (ours, theirs), 'theirs to ours': (theirs, ours), 'ours to ours': (ours, ours)}[way]
    params, opt = race(first, 90, **options)
    heirs = [p.detach().clone().requires_grad_() for p in params]
    heir = make(then, heirs, lr=9.)
    heir.load_state_dict(copy.deepcopy(opt.state_dict()) if first is theirs else opt.state_dict())
    drive(heirs, heir, range(90, STEPS))
    assert_close(heirs, expected, rtol=1e-9, atol=1e-12)
    assert_same_state(heir, last)


@pytest.mark.parametrize('ours, theirs, options', on, ids=named)
def test_fresh_state_has_all_keys(ours, theirs, options):
    params = [leaf(2), leaf(3)]
    assert ours(params, **options).state_dict() == theirs(params, **options).state_dict()
    assert ours(params, foreach=True, **options).state_dict() == theirs(params, foreach=True, **options).state_dict()
    assert ours(params).state_dict() == theirs(params).state_dict()


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


@pytest.mark.parametrize('ours, theirs, options', on, ids=named)
def test_a_cast_in_the_middle(ours, theirs, options):
    ends = []
    for kind in ours, theirs:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(5))
        opt = kind([p], **{'lr': .01, **options})
        for t in range(4):
            if t == 2:          # as `DeviceCB` does
                p.data, p.grad = p.data.double(), None
                opt.load_state_dict(opt.state_dict())
            p.grad = p.detach()*1.2345678 + .1
            opt.step()
        assert all(v.dtype == torch.float64 for s in opt.state.values() for k, v in s.items() if k != 'step')
        ends.append(p.detach())
    assert_close(*ends, rtol=1e-12, atol=0)


def test_meta_device_beside_cpu():
    p, q = torch.ones(2, requires_grad=True), torch.ones(2, device='meta', requires_grad=True)
    p.grad, q.grad = torch.ones(2), torch.ones(2, device='meta')
    opt = Momentum([p, q], lr=.1, momentum=.9)
    for _ in range(2): opt.step()
    assert_close(p.detach(), torch.full((2,), 1 - .1 - .19))


# ---- the base class


class SignDescent(UpdateRule):
    "Changes every entry by `lr`, whatever the size of its gradient"
    keeps = 'step', 'last'
    def __init__(self, params, lr=.5, weight_decay=0, maximize=False):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, maximize=maximize))
    def update(self, p, grad, group):
        t, last = self.kept(p, 'step', 'last')
        t += 1
        last.copy_(grad)
        p.add_(grad.sign(), alpha=-group['lr'])


def signs():
    "Three steps with two groups; one parameter has no gradient"
    p, q, idle = leaf(2), leaf(), leaf(3)
    opt = SignDescent([{'params': [p, idle]}, {'params': q, 'lr': 2, 'maximize': True, 'name': 'up'}])
    for _ in range(3):
        p.grad, q.grad = torch.tensor([7., -.1]), torch.tensor(4.)
        opt.step()
    return opt, p, q, idle


def test_groups_have_their_options_and_parameters_their_state():
    opt, p, q, idle = signs()
    assert_close([p.detach(), q.detach(), idle.detach()], [torch.tensor([-1.5, 1.5]), torch.tensor(6.), torch.zeros(3)])
    assert_close([p.grad, q.grad], [torch.tensor([7., -.1]), torch.tensor(4.)])          # a step does not change the gradients
    state = copy.deepcopy(opt.state_dict())
    assert_close(state['state'], {0: {'step': torch.tensor(3.), 'last': torch.tensor([7., -.1])},
                                  2: {'step': torch.tensor(3.), 'last': torch.tensor(-4.)}})
    assert state['param_groups'] == [dict(lr=.5, weight_decay=0, maximize=False, params=[0, 1]),
                                     dict(lr=2, weight_decay=0, maximize=True, name='up', params=[2])]
    group = {'params': [extra := torch.ones(1, requires_grad=True)], 'weight_decay': .1}
    opt.add_param_group(group)
    assert set(group) == {'params', 'weight_decay'}
    p.grad = q.grad = None
    extra.grad = torch.tensor([-.05])                                    # smaller than the decay: the entry decreases
    opt.step()
    assert_close([extra.detach(), opt.state[extra]['last'], extra.grad], [torch.tensor([.5]), torch.tensor([.05]), torch.tensor([-.05])])
    assert opt.state[p]['step'] == 3 and sorted(opt.state_dict()['state']) == [0, 2, 3]


def test_what_is_inherited():
    opt, p, q, _ = signs()
    assert isinstance(opt, torch.optim.Optimizer)
    seen = []
    opt.register_step_pre_hook(lambda *args: seen.append('before'))
    opt.register_step_post_hook(lambda *args: seen.append('after'))

    def closure():
        opt.zero_grad()
        loss = (p - 3).square().sum() + q
        loss.backward()
        return loss
    before = p.detach().clone()
    assert opt.step(closure).item() == (before - 3).square().sum().item() + 6 and seen == ['before', 'after']
    assert_close(p.detach(), before + .5)
    opt.zero_grad()
    assert p.grad is None and opt.step() is None
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    opt.load_state_dict(torch.load(buffer, weights_only=True))
    assert opt.state[p]['step'] == 4
    named_opt = SignDescent([('p', p), ('q', q)])
    assert named_opt.param_groups[0]['param_names'] == ['p', 'q'] and named_opt.param_groups[0]['params'][1] is q
    assert 'SignDescent' in repr(opt)


def test_parameters_may_be_a_generator_and_a_group_one_tensor():
    net = nn.Linear(2, 2)
    assert len(Adam(net.parameters()).param_groups[0]['params']) == 2
    assert Adam([{'params': net.weight}, {'params': [net.bias]}]).param_groups[0]['params'][0] is net.weight
    assert len(Adam([{'params': net.parameters()}]).param_groups[0]['params']) == 2
    assert SignDescent([{'params': leaf(1)}, {'params': torch.zeros(1)}], lr=0).param_groups[1]['lr'] == 0    # a frozen group


x = leaf(2)
wrong = {
    'one tensor': (lambda: SignDescent(leaf(3)), TypeError, 'iterable of Tensors'),
    'empty': (lambda: SignDescent([]), ValueError, 'empty'),
    'computed': (lambda: SignDescent([leaf(2)*1]), ValueError, 'non-leaf'),
    'complex': (lambda: SignDescent([leaf(2, dtype=torch.complex64)]), ValueError, 'complex'),
    'a number': (lambda: SignDescent([3.]), TypeError, 'float'),
    'a mixture': (lambda: SignDescent([{'params': [leaf(1)]}, leaf(2)]), TypeError, 'dict'),
    'a set': (lambda: SignDescent([{'params': {x}}]), TypeError, 'ordered'),
    'twice in a group': (lambda: SignDescent([x, x]), ValueError, 'twice'),
    'twice in a generator': (lambda: SignDescent([{'params': (p for p in (x, x))}]), ValueError, 'twice'),
    'in two groups': (lambda: SignDescent([x]).add_param_group({'params': x}), ValueError, 'more than one'),
    'misspelt': (lambda: SignDescent([x]).add_param_group({'params': leaf(1), 'rate': 1}), ValueError, "unknown option 'rate'"),
    'misspelt argument': (lambda: Momentum([x], eps=1), TypeError, 'eps'),
    'decay': (lambda: SignDescent([x], weight_decay=-1), ValueError, 'weight_decay is -1'),
    'decay in a group': (lambda: SignDescent([{'params': x, 'weight_decay': -1}]), ValueError, 'weight_decay is -1'),
    'alpha': (lambda: RMSprop([x], alpha=-1), ValueError, 'alpha is'),
    'eps': (lambda: Adam([x], eps=-1e-8), ValueError, 'eps is'),
    'momentum': (lambda: Momentum([x], momentum=-1), ValueError, 'momentum is'),
    'nesterov': (lambda: Momentum([x], nesterov=True), ValueError, 'nesterov requires .* got 0 and 0'),
    'nesterov damped': (lambda: Momentum([x], momentum=.5, dampening=.1, nesterov=True), ValueError, 'got 0.5 and 0.1'),
    'nesterov in a group': (lambda: Momentum([{'params': x, 'nesterov': True}]), ValueError, 'nesterov'),
    'AdamW decoupled': (lambda: AdamW([x], decoupled_weight_decay=False), TypeError, 'decoupled'),
    'AdamW misspelt': (lambda: AdamW([x], momentum=.9), TypeError, 'momentum'),
    'option of another': (lambda: Adam([x]).load_state_dict(RMSprop([x]).state_dict()), ValueError, 'unknown option'),
    **{f'lr {lr}': (lambda lr=lr: SignDescent([x], lr=lr), ValueError, 'must be a number, 0')
       for lr in (-.1, math.nan, torch.tensor(.1), '1')},
    **{f'betas {b}': (lambda b=b: Adam([x], betas=b), ValueError, 'betas is')
       for b in ((.9,), (1., .9), (.9, -.1), ('0', .9), (.9, .99, .999), (torch.tensor(.9), .9), (.9, 1.))},
}


@pytest.mark.parametrize('name', wrong)
def test_wrong_arguments(name):
    call, error, text = wrong[name]
    with pytest.raises(error, match=text): call()


@pytest.mark.parametrize('kind', TWINS)
def test_errors_name_the_option(kind):
    p = leaf(2)
    for options, text in [(dict(lr=torch.tensor(.1)), 'lr is tensor'), (dict(lr=-1), 'lr is -1'),
                        (dict(weight_decay=-.1), 'weight_decay is -0.1'), (dict(differentiable=True), 'differentiable is True')]:
        with pytest.raises(ValueError, match=f'{kind.__name__}.*{text}'): kind([p], **options)
        opt = kind([leaf(1)])
        with pytest.raises(ValueError, match=text): opt.add_param_group({'params': p, **options})
        assert len(opt.param_groups) == 1
    with pytest.raises(TypeError, match='unexpected keyword'): kind([p], learning_rate=1)
    with pytest.raises(ValueError, match='unknown option'): kind([{'params': p, 'learning_rate': 1}])
    if kind is not Momentum:
        with pytest.raises(ValueError, match='capturable is True'): kind([p], capturable=True)
    if kind is not RMSprop:
        with pytest.raises(ValueError, match='fused is True'): kind([p], fused=True)
        state = TWINS[kind]([p], fused=True).state_dict()
        with pytest.raises(ValueError, match='fused is True'): kind([p]).load_state_dict(state)


@pytest.mark.parametrize('kind', TWINS)
def test_sparse_gradients_raise(kind):
    p = leaf(2)
    p.grad = torch.sparse_coo_tensor([[0]], [1.], (2,), check_invariants=True)
    with pytest.raises(TypeError, match=f'{kind.__name__}.*sparse'): kind([p]).step()
    assert_close(p.detach(), torch.zeros(2))


def test_a_rule_needs_an_update():
    class Nothing(UpdateRule): "Has no update"
    p = leaf(2)
    p.grad = torch.ones(2)
    with pytest.raises(NotImplementedError, match='Nothing does not define update'):
        Nothing([p], dict(lr=.1, weight_decay=0, maximize=False)).step()


breaks = {
    'a group less': (lambda s: s['param_groups'].pop(), 'parameter groups'),
    'another size': (lambda s: s['param_groups'][0]['params'].pop(), 'size'),
    'lr': (lambda s: s['param_groups'][1].update(lr=-1), 'lr is -1'),
    'option': (lambda s: s['param_groups'][1].update(alpha=.9), "'alpha'"),
    'state': (lambda s: s['state'][2].update(exp_avg=torch.tensor(0.)), 'is it the state of another'),
}


@pytest.mark.parametrize('name', breaks)
def test_a_wrong_state_changes_nothing(name):
    state = copy.deepcopy(signs()[0].state_dict())
    opt = SignDescent([{'params': [leaf(2), leaf(3)]}, {'params': leaf()}], lr=.25)
    opt.param_groups[0]['params'][0].grad = torch.ones(2)
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    change, text = breaks[name]
    change(state)
    with pytest.raises(ValueError, match=text): opt.load_state_dict(state)
    assert_close(opt.state_dict()['state'], before['state'], rtol=0, atol=0)
    assert opt.state_dict()['param_groups'] == before['param_groups']


def test_loading_casts_copies_and_fills_in():
    state = copy.deepcopy(signs()[0].state_dict())
    a, b, c = leaf(2, dtype=torch.float64), leaf(3), leaf()
    opt = SignDescent([{'params': [a, b]}, {'params': c}])
    del state['param_groups'][0]['maximize']                             # older than this option
    opt.load_state_dict(state)
    assert [g['lr'] for g in opt.param_groups] == [.5, 2] and opt.param_groups[1]['name'] == 'up'
    assert opt.param_groups[0]['params'][0] is a and a.dtype == torch.float64 and opt.param_groups[0]['maximize'] is False
    assert [set(opt.state[t]) for t in (a, c)] == [{'step', 'last'}]*2
    assert opt.state[a]['last'].dtype == torch.float64 and opt.state[a]['step'].dtype == torch.float32
    opt.state[a]['step'] += 1
    assert state['state'][0]['step'] == 3
    state['param_groups'][0]['foreach'] = state['state'][0]['last'] = None   # None is accepted
    state['state'][0]['step'] = 7                                            # older files of PyTorch have a plain number
    opt.load_state_dict(state)
    assert_close(opt.state[a]['step'], torch.tensor(7.))


@pytest.mark.parametrize('default, counts', [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_type_of_the_count(default, counts):
    torch.set_default_dtype(default)
    try:
        t, last = SignDescent([p := leaf(3)]).kept(p, 'step', 'last')
        assert t.dtype == counts and t == 0 and last.dtype == default
    finally: torch.set_default_dtype(torch.float32)


def test_adamw_stays_decoupled():
    params, opt = race(AdamW, 20)
    opt.load_state_dict(race(Adam, 20)[1].state_dict())
    assert [g['decoupled_weight_decay'] for g in opt.param_groups] == [True, True]


def test_a_count_for_each_parameter():
    assert race(Adam, 9)[1].state_dict()['state'][1]['step'] == 6        # three of nine gradients were missing


# ---- schedules


def two_groups(kind, **options): return kind([{'params': [leaf(1)]}, {'params': [leaf(2)], 'lr': .02}], lr=.3, **options)


def values(opt):
    "What a schedule may change, for each group"
    return [(g['lr'], g.get('momentum'), g.get('betas')) for g in opt.param_groups]


def run(opt, scheds, steps):
    "`values` before each step"
    seen = []
    for _ in range(steps):
        seen.append(values(opt))
        opt.step()
        for s in scheds: s.step()
    return seen


OURS, THEIRS = vars(optim), vars(lr_scheduler)


def warm_cosine(m, o):
    parts = m['LinearLR'](o, .1, total_iters=7), m['CosineAnnealingLR'](o, 40, .001)
    return lr_scheduler.SequentialLR(o, [*parts], [7])


def early_change(m, o):
    "Each begins before the one before it is at its end"
    parts = m['LinearLR'](o, .1, .9, total_iters=20), m['CosineAnnealingLR'](o, 10, .001), m['LinearLR'](o)
    return lr_scheduler.SequentialLR(o, [*parts], [5, 12])


schedules = {f'{name} {options}': (lambda m, o, name=name, options=options: m[name](o, **options)) for name, options in [
    *(('LinearLR', w) for w in grid(start_factor=(.1, 1.), end_factor=(0., .5, 1.), total_iters=(1, 12))), ('LinearLR', {}),
    *(('CosineAnnealingLR', w) for w in grid(T_max=(1, 7, 9, 50), eta_min=(0, .001))),
    *(('OneCycleLR', w) for w in grid(max_lr=(.4, [.4, .1]), total_steps=(60,), pct_start=(0., .3, .45),
                                      anneal_strategy=('cos', 'linear'), three_phase=(False, True))),
    *(('OneCycleLR', dict(max_lr=.5, total_steps=50, div_factor=10., final_div_factor=100., **w))
      for w in (dict(cycle_momentum=False), dict(base_momentum=.5, max_momentum=(.8, .9)), dict(pct_start=1.))),
    ('OneCycleLR', dict(max_lr=.5, epochs=5, steps_per_epoch=10))]}
schedules.update({'warm-up and cosine': warm_cosine, 'change before the end': early_change})


@pytest.mark.parametrize('pair', [(Momentum, torch.optim.SGD), (AdamW, torch.optim.AdamW)], ids=['sgd', 'adamw'])
@pytest.mark.parametrize('name', schedules)
def test_schedule_and_its_state(name, pair):
    opts = [two_groups(kind) for kind in pair]
    ours, theirs = (schedules[name](m, opt) for m, opt in zip((OURS, THEIRS), opts))
    assert_close(run(opts[0], [ours], 25), run(opts[1], [theirs], 25), rtol=1e-9, atol=1e-12)
    assert ours.get_last_lr() == [g['lr'] for g in opts[0].param_groups]
    assert [g['initial_lr'] for g in opts[0].param_groups] == [g['initial_lr'] for g in opts[1].param_groups]
    new = [two_groups(kind) for kind in pair]
    heirs = [schedules[name](m, opt) for m, opt in zip((OURS, THEIRS), new)]
    for heir, opt, last, saved in zip(heirs, new, (theirs, ours), opts[::-1]):
        heir.load_state_dict(copy.deepcopy(last.state_dict()))
        opt.load_state_dict(saved.state_dict())
    expected = run(opts[1], [theirs], 24)
    for opt, sched in zip((opts[0], *new), (ours, *heirs)): assert_close(run(opt, [sched], 24), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize('kinds', [*itertools.product([OURS, THEIRS], repeat=3)], ids=range(8))
def test_schedules_stepped_in_turn_multiply(kinds):
    def chain(modules):
        opt = two_groups(torch.optim.SGD)
        a, b, c = modules
        return run(opt, [a['LinearLR'](opt, .2, total_iters=6), b['CosineAnnealingLR'](opt, 15), c['LinearLR'](opt, 1., .5, 9),
                         lr_scheduler.ExponentialLR(opt, .9)], 14)
    seen = chain(kinds)
    assert_close(seen, chain([THEIRS]*3), rtol=1e-9, atol=1e-12)
    assert_close(seen[8][0][0], .3*(1 + math.cos(math.pi*8/15))/2*(1 - .5*8/9)*.9**8)


@pytest.mark.parametrize('steps', [0, 1, 5, 12])
@pytest.mark.parametrize('order', ['optimiser first', 'schedule first', 'schedule made first'])
@pytest.mark.parametrize('name, options', [('CosineAnnealingLR', dict(T_max=10)), ('CosineAnnealingLR', dict(T_max=30, eta_min=.01)),
                                           ('LinearLR', dict(total_iters=8)), ('LinearLR', dict(start_factor=1., end_factor=.1)),
                                           ('OneCycleLR', dict(max_lr=1., total_steps=30))])
def test_resumed_by_hand_in_any_order(name, options, order, steps):
    def new():
        opt = two_groups(Adam)
        return opt, lambda: OURS[name](opt, **options)
    opt, begin = new()
    sched = begin()
    run(opt, [sched], steps)
    again, begin = new()
    saved = copy.deepcopy(opt.state_dict())
    if order == 'optimiser first': again.load_state_dict(saved)
    resumed = begin()
    if order == 'schedule made first': again.load_state_dict(saved)
    resumed.load_state_dict(sched.state_dict())
    if order == 'schedule first': again.load_state_dict(saved)
    assert_close(values(again), values(opt), rtol=1e-12, atol=0)
    assert_close(run(again, [resumed], 6), run(opt, [sched], 6), rtol=1e-12, atol=0)


def test_loading_a_cycle_keeps_a_rate_that_was_set_since():
    opt, again = two_groups(Adam), two_groups(Adam)
    run(opt, [sched := OneCycleLR(opt, 1., 30)], 5)
    resumed = OneCycleLR(again, 1., 30)
    for g in again.param_groups: g['lr'] = .7
    resumed.load_state_dict(sched.state_dict())
    assert [g['lr'] for g in again.param_groups] == [.7, .7]


def test_two_schedules_resumed_by_hand():
    def new(saved=None):
        opt = two_groups(Momentum)
        if saved: opt.load_state_dict(saved)
        return opt, [LinearLR(opt, .2, total_iters=9), CosineAnnealingLR(opt, 20), lr_scheduler.ExponentialLR(opt, .9)]
    opt, scheds = new()
    run(opt, scheds, 5)
    again, resumed = new(opt.state_dict())
    for s, old in zip(resumed, scheds): s.load_state_dict(old.state_dict())
    assert_close(run(again, resumed, 6), run(opt, scheds, 6), rtol=1e-12, atol=0)


def test_one_cycle_by_hand():
    opt = two_groups(Momentum, momentum=.2)
    seen = run(opt, [OneCycleLR(opt, .5, 11, pct_start=.4 + .6/11)], 11)
    lrs = [first[0] for first, _ in seen]
    assert_close([lrs[0], max(lrs), lrs[-1]], [.5/25, .5, .5/25e4])
    assert lrs.index(max(lrs)) == 4
    assert_close([seen[0][1][1], seen[4][1][1], seen[10][1][1]], [.95, .85, .95])


def test_errors_of_schedules():
    opt = two_groups(Momentum, momentum=.2)
    sched = OneCycleLR(opt, .5, 1)
    opt.step()
    sched.step()
    with pytest.raises(ValueError, match='step 2 is beyond the cycle of 1'): sched.step()
    for options in {}, dict(epochs=3), dict(total_steps=0), dict(total_steps=2.), dict(steps_per_epoch=3):
        with pytest.raises(ValueError, match='total_steps'): OneCycleLR(opt, .5, **options)
    with pytest.raises(ValueError, match="anneal_strategy is 'log'"): OneCycleLR(opt, .5, 10, anneal_strategy='log')
    for share in -.1, 1.1:
        with pytest.raises(ValueError, match='pct_start is'): OneCycleLR(opt, .5, 10, pct_start=share)
    for options in dict(max_lr=[.1]*3), dict(max_lr=.1, base_momentum=[.5]), dict(max_lr=.1, max_momentum=[.5]):
        with pytest.raises(ValueError, match='for 2 groups'): OneCycleLR(opt, total_steps=9, **options)
    class Plain(SignDescent): "An optimiser without momentum"
    with pytest.raises(ValueError, match='no momentum to change'): OneCycleLR(Plain([leaf(1)]), .5, 10)
    assert OneCycleLR(Plain([leaf(1)]), .5, 10, cycle_momentum=False).get_last_lr() == [.02]
    with pytest.raises(NotImplementedError, match='does not define share'): Schedule(opt)
    with pytest.raises(TypeError, match='last_epoch'): CosineAnnealingLR(opt, 3, last_epoch=5)
    for begin in lambda: LinearLR(opt, total_iters=0), lambda: CosineAnnealingLR(opt, 0):
        with pytest.raises(ZeroDivisionError): begin()
    with pytest.raises(TypeError, match='not an Optimizer'): CosineAnnealingLR(SGD([leaf(1)], lr=.1), 4)


def test_a_warm_up_may_begin_at_zero():
    opt = two_groups(Momentum)
    sched = LinearLR(opt, 0., total_iters=4)
    assert_close([first[0] for first, _ in run(opt, [sched], 6)], [.3*s for s in (0, .25, .5, .75, 1, 1)])
    LinearLR(two_groups(Momentum), 0., total_iters=4).load_state_dict(sched.state_dict())


def test_no_schedule_forgets_a_change_by_hand():
    opt = two_groups(Momentum)
    sched = CosineAnnealingLR(opt, 10)
    run(opt, [sched], 3)
    for g in opt.param_groups: g['lr'] /= 2
    assert_close([first[0] for first, _ in run(opt, [sched], 3)], [.15*(1 + math.cos(math.pi*t/10))/2 for t in (3, 4, 5)])


@pytest.mark.parametrize('kind', [Momentum, Adam])
def test_torch_schedule_on_our_optimiser(kind, recwarn):
    opt = kind([leaf(1)], lr=.4)
    sched = lr_scheduler.StepLR(opt, 2)
    for want in .4, .4, .04, .04:
        assert opt.param_groups[0]['lr'] == pytest.approx(want)
        opt.step()
        sched.step()
    assert not recwarn.list


# ---- in a learner

x_few = torch.randn(100, 6, generator=torch.Generator().manual_seed(5))
few, valid = Dataset(x_few, x_few[:, :3].argmax(1)), Dataset(x_few[:40], x_few[:40, :3].argmax(1))


class Watch(Callback):
    "The values of each batch, and the batches with a step"
    def __init__(self): self.seen, self.steps = [], []
    def before_get_loss(self, learn):
        if learn.training: self.seen.append(values(learn.opt))
    def after_step(self, learn): self.steps.append(len(self.seen) - 1)
    @property
    def lrs(self): return [lr for (lr, *_), in self.seen]


def new_net(engine):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    if engine == 'torch': return net
    own = Sequential(Linear(6, 5), ReLU(), Linear(5, 3))
    own.load_state_dict(net.state_dict())
    return own


def loaders(): return DataLoader(few, 10, shuffle=True, generator=torch.Generator().manual_seed(0)), DataLoader(valid, 20)


def new_learner(engine='ours', opt_func=Adam, lr=.01, dls=None, **kwargs):
    return Learner(new_net(engine), dls or loaders(), CrossEntropyLoss(), opt_func, lr, **kwargs)


asked = []


def maker(kind, **options):
    "A function that makes this schedule for `n` steps, and records `n`"
    def begin(opt, n):
        asked.append(n)
        return kind(opt, n, **options)
    return begin


def cosine(n, lr=.01, start=0): return [lr*(1 + math.cos(math.pi*t/n))/2 for t in range(start, n)]


def halving(opt, n): return lr_scheduler.ExponentialLR(opt, .5)


def fit(epochs, *cbs, **kwargs):
    "The learning rate of each batch, the learner, and the watching callback"
    fit_kwargs = {k: kwargs.pop(k) for k in ('train', 'lr') if k in kwargs and k == 'train'}
    learn = new_learner(cbs=[*cbs, watch := Watch()], **kwargs)
    learn.fit(epochs, progress=False, **fit_kwargs)
    return watch.lrs, learn, watch


@pytest.mark.parametrize('opt_func', [Adam, torch.optim.Adam], ids=['ours', 'torch'])
@pytest.mark.parametrize('engine', ['ours', 'torch'])
def test_every_batch_has_its_rate_and_momentum(engine, opt_func, recwarn):
    by_hand = Adam([leaf(1)])
    expected, ends = run(by_hand, [OneCycleLR(by_hand, .02, 30)], 30), []
    for kind in OneCycleLR, lr_scheduler.OneCycleLR:
        learn, watch, cb = new_learner(engine, opt_func), Watch(), SchedulerCB(maker(kind, max_lr=.02))
        cb.make = lambda opt, n, kind=kind: asked.append(n) or kind(opt, .02, n)
        learn.fit(3, cbs=[cb, watch], progress=False)
        assert_close(watch.seen, expected, rtol=1e-9, atol=1e-12)
        assert asked[-1] == 30 and cb.sched is None and cb.state_dict() == {}
        assert {k: v for k, v in learn.opt.param_groups[0].items() if k != 'params'} == opt_func([leaf(1)], lr=.01).defaults
        ends.append([p.detach() for p in learn.model.parameters()])
    assert_close(*ends, rtol=1e-6, atol=1e-7)
    assert not recwarn.list


@pytest.mark.parametrize('opt_func', [SGD, Momentum, torch.optim.SGD])
def test_the_default_optimiser_has_a_schedule_too(opt_func):
    lrs, learn, _ = fit(2, SchedulerCB(maker(CosineAnnealingLR)), opt_func=opt_func)
    assert_close(lrs, cosine(20))
    assert learn.opt.param_groups[0]['lr'] == .01 and 'initial_lr' not in learn.opt.param_groups[0]


def test_by_epochs():
    lrs, *_ = fit(3, SchedulerCB(lambda opt, n: asked.append(n) or halving(opt, n), each='epoch'))
    assert_close(lrs, [.01]*10 + [.005]*10 + [.0025]*10)
    assert asked[-1] == 3


def test_each_fit_has_its_schedule():
    half, watch = SchedulerCB(lambda opt, n: lr_scheduler.StepLR(opt, n//2, .1)), Watch()
    learn = new_learner(cbs=[half, watch])
    for lr in None, .003, None:
        watch.seen.clear()
        learn.fit(1, lr=lr, progress=False)
        now = learn.lr
        assert_close(watch.lrs, [now]*5 + [now/10]*5)
        assert learn.opt.param_groups[0]['lr'] == now
    watch.seen.clear()
    learn.fit(1, train=False, progress=False)
    assert 'loss' in learn.evaluate() and half.sched is None and not watch.seen
    learn.fit(0, progress=False)
    assert learn.opt.param_groups[0]['lr'] == .003


class Interrupt(Callback):
    order = 60
    def __init__(self, at, error=KeyboardInterrupt): self.at, self.error = at, error
    def after_batch(self, learn):
        if learn.training and learn.epochs_done*10 + learn.batch_idx == self.at: raise self.error


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_options_are_restored_after_an_error(error):
    learn = new_learner(cbs=[SchedulerCB(maker(OneCycleLR, max_lr=.1)), Interrupt(4, error)])
    learn.cbs[0].make = lambda opt, n: OneCycleLR(opt, .1, n)
    with pytest.raises(error): learn.fit(1, progress=False)
    assert {k: v for k, v in learn.opt.param_groups[0].items() if k != 'params'} == Adam([leaf(1)], lr=.01).defaults


class Skip(Callback):
    "Ends chosen batches in a chosen way"
    def __init__(self, event, error, which): setattr(self, event, self.skip); self.error, self.which = error, which
    def skip(self, learn):
        if learn.training and self.which(learn.epochs_done*10 + learn.batch_idx): raise self.error


skips = {
    'no steps': Skip('before_step', CancelStep, lambda k: True),
    'first steps, as a scaler': Skip('before_step', CancelStep, lambda k: k < 4),
    'every fourth, and the last': Skip('before_step', CancelStep, lambda k: k % 10 % 4 != 3 and k % 10 != 9),
    'odd batches': Skip('before_backward', CancelBatch, lambda k: k % 2),
    'end of the second epoch': Skip('before_forward', CancelEpoch, lambda k: k == 14),
}


@pytest.mark.parametrize('name', skips)
@pytest.mark.parametrize('kind', [CosineAnnealingLR, lr_scheduler.CosineAnnealingLR], ids=['ours', 'torch'])
def test_the_position_is_a_number_of_batches(name, kind, recwarn):
    lrs, _, watch = fit(3, SchedulerCB(maker(kind)), skips[name])
    expected = cosine(30)
    if name.startswith('end'): del expected[14:20]       # never read
    assert_close(lrs, expected)
    assert asked[-1] == 30 and not [w for w in recwarn.list if 'lr_scheduler' in str(w.message)]
    assert len(watch.steps) == {'n': 0, 'f': 26, 'e': 9 if name[1] == 'v' else 24, 'o': 15}[name[0]]


def test_two_schedules_in_one_fit():
    warm = SchedulerCB(lambda opt, n: LinearLR(opt, .1, total_iters=6))
    lrs, learn, _ = fit(2, warm, SchedulerCB(maker(CosineAnnealingLR)), SchedulerCB(halving, each='epoch'))
    assert_close(lrs, [lr*min(1, .1 + .9*t/6)*.5**(t//10) for t, lr in enumerate(cosine(20))])
    assert {k: v for k, v in learn.opt.param_groups[0].items() if k != 'params'} == Adam([leaf(1)], lr=.01).defaults


class NoLength:
    "A loader whose number of batches is unknown"
    def __iter__(self): return iter(DataLoader(few, 10))


def test_a_loader_without_a_length():
    lrs, *_ = fit(2, SchedulerCB(lambda opt, n: asked.append(n) or lr_scheduler.ExponentialLR(opt, .9)), dls=(NoLength(), None))
    assert asked[-1] is None
    assert_close(lrs, [.01*.9**k for k in range(20)])
    lrs, *_ = fit(2, SchedulerCB(halving, each='epoch'), dls=(NoLength(), None))
    assert_close(lrs, [.01]*10 + [.005]*10)
    for kind in CosineAnnealingLR, lr_scheduler.CosineAnnealingLR, lambda opt, n: OneCycleLR(opt, 1., n):
        with pytest.raises(ValueError, match='SchedulerCB: the training loader has no length, so make got n=None'):
            fit(1, SchedulerCB(lambda opt, n, kind=kind: kind(opt, n)), dls=(NoLength(), None))


def test_a_loader_with_more_batches_than_it_says_ends_at_the_end():
    class Short(NoLength):
        def __len__(self): return 8
    lrs, *_ = fit(2, SchedulerCB(one_cycle), dls=(Short(), None))
    opt = Adam([leaf(1)])
    expected = [first[0] for first, in run(opt, [OneCycleLR(opt, .02, 16)], 16)]
    assert_close(lrs, [expected[k] for k in (*range(10), 9, 9, *range(10, 16), 15, 15)])


def test_other_errors_of_make_stay():
    with pytest.raises(ValueError, match='pct_start is 7'): fit(1, SchedulerCB(lambda opt, n: OneCycleLR(opt, 1., n, pct_start=7)))
    with pytest.raises(ValueError, match="each is 'step'"): SchedulerCB(halving, 'step')


def reduce(opt, n): return lr_scheduler.ReduceLROnPlateau(opt, threshold=.3, patience=0, factor=.5)


def test_a_plateau():
    learn, watch = new_learner(), Watch()
    records = learn.fit(5, cbs=[watch, SchedulerCB(reduce, 'epoch')], progress=False)
    opt = Momentum([leaf(1)], lr=.01)
    by_hand, rates = reduce(opt, 5), []
    for r in records:
        rates += by_hand.get_last_lr()*10
        by_hand.step(r['valid_loss'])
    assert_close(watch.lrs, rates)
    assert rates[-1] < .01 and learn.opt.param_groups[0]['lr'] == .01
    train = fit(3, SchedulerCB(reduce, 'epoch', monitor='train_loss'), dls=(loaders()[0], None))[0]
    assert len(train) == 30
    with pytest.raises(ValueError, match="monitor is 'f1', but the record of the epoch has only epoch, train_loss, valid_loss"):
        fit(1, SchedulerCB(reduce, 'epoch', 'f1'))
    with pytest.raises(ValueError, match="pass each='epoch'"): fit(1, SchedulerCB(reduce))


def make_cosine(opt, n): return CosineAnnealingLR(opt, n)


def test_a_learner_with_a_schedule_can_be_pickled():
    learn = new_learner(cbs=[SchedulerCB(make_cosine), Watch()])
    for _ in range(2):
        learn = pickle.loads(pickle.dumps(learn))
        learn.fit(1, progress=False)
    assert_close(learn.cbs[1].lrs, cosine(10)*2)
    assert_close(learn.trial().opt.state_dict()['param_groups'][0]['lr'], .01)


# ---- resumed


class Save(Callback):
    "Keeps all states after the batch with this number, and ends the fit"
    order = 90
    def __init__(self, at): self.at, self.batches = at, 0
    def after_batch(self, learn):
        self.batches += learn.training
        if self.batches == self.at and learn.training:
            cbs = [cb.state_dict() for cb in learn.cbs[:-2]]
            self.states = copy.deepcopy([learn.model.state_dict(), learn.opt.state_dict(), learn.state_dict(), cbs])
            raise KeyboardInterrupt


def load(learn, states):
    model, opt, run, cbs = states
    learn.model.load_state_dict(model)
    learn.create_opt().load_state_dict(opt)
    learn.load_state_dict(run)
    for cb, state in zip(learn.cbs, cbs): cb.load_state_dict(state)


class Late(Callback):
    "Loads all states when the fit has started, as `CheckpointCB` does"
    order = 1000
    def __init__(self, states=None): self.states = states
    def before_fit(self, learn):
        if self.states: load(learn, self.states)


def one_cycle(opt, n): return OneCycleLR(opt, .02, n)


def torch_cycle(opt, n): return lr_scheduler.OneCycleLR(opt, .02, n)


def sequence(opt, n):
    return lr_scheduler.SequentialLR(opt, [LinearLR(opt, .1), CosineAnnealingLR(opt, n - 5)], [5])


resumable = {'one cycle': [(one_cycle, 'batch')], 'torch': [(torch_cycle, 'batch')], 'sequence': [(sequence, 'batch')],
             'plateau': [(reduce, 'epoch')], 'epochs': [(halving, 'epoch')],
             'two': [(make_cosine, 'batch'), (sequence, 'batch')], 'with plateau': [(make_cosine, 'batch'), (reduce, 'epoch')]}


@pytest.mark.parametrize('late', [False, True], ids=['before the fit', 'in before_fit'])
@pytest.mark.parametrize('at', [14, 20])
@pytest.mark.parametrize('opt_func', [AdamW, torch.optim.AdamW, SGD], ids=['ours', 'torch', 'by hand'])
@pytest.mark.parametrize('name', resumable)
def test_a_resumed_run_is_the_same_bit_for_bit(name, opt_func, at, late):
    if opt_func is SGD and 'cycle' in str(resumable[name]): pytest.skip('no momentum')
    def new(last): return new_learner('torch', opt_func, cbs=[*(SchedulerCB(*a) for a in resumable[name]), Watch(), last])
    unbroken, first = new(Late()), new(save := Save(at))
    unbroken.fit(3, progress=False)
    with pytest.raises(KeyboardInterrupt): first.fit(3, progress=False)
    second = new(Late(save.states if late else None))
    if not late: load(second, save.states)
    second.fit(3, progress=False)
    assert second.cbs[-2].seen == unbroken.cbs[-2].seen[at:]
    assert_close([*second.model.parameters()], [*unbroken.model.parameters()], rtol=0, atol=0)
    assert second.opt.param_groups[0]['lr'] == .01 and second.cbs[0]._resume is None


def test_a_loader_without_a_length_resumes():
    def new(last): return new_learner(cbs=[SchedulerCB(halving), Watch(), last], dls=(NoLength(), None))
    with pytest.raises(KeyboardInterrupt): new(save := Save(4)).fit(1, progress=False)
    second = new(Late(save.states))
    second.fit(1, progress=False)
    assert_close(second.cbs[1].lrs, [.01*.5**k for k in range(4, 10)])


@pytest.mark.parametrize('make', [make_cosine, lambda opt, n: lr_scheduler.CosineAnnealingLR(opt, n)], ids=['ours', 'torch'])
def test_more_epochs_for_a_finished_run(tmp_path, make):
    for epochs, expected in (2, cosine(20)), (4, cosine(40, start=20)), (4, []), (5, cosine(50, start=40)):
        lrs, learn, _ = fit(epochs, SchedulerCB(make), CheckpointCB(tmp_path, resume=True), opt_func=Momentum)
        assert_close(lrs, expected)
        assert learn.opt.param_groups[0]['lr'] == .01


def test_more_epochs_in_the_middle_of_one_with_two_schedules():
    def new(last):
        return new_learner(cbs=[SchedulerCB(lambda opt, n: LinearLR(opt, .1, total_iters=n//2)), SchedulerCB(make_cosine), Watch(), last])
    with pytest.raises(KeyboardInterrupt): new(save := Save(14)).fit(2, progress=False)
    second = new(Late(save.states))
    second.fit(4, progress=False)
    assert_close(second.cbs[2].lrs, [lr*min(1, .1 + .9*t/20) for t, lr in enumerate(cosine(40))][14:])


def test_a_plateau_keeps_what_it_saw_when_the_run_grows(tmp_path):
    class Note(Callback):
        order = 60
        def after_epoch(self, learn): self.bad = learn.cbs[0].sched.state_dict()
    for epochs in 3, 5:
        learn = new_learner(cbs=[SchedulerCB(reduce, 'epoch'), CheckpointCB(tmp_path, resume=True), note := Note()])
        records = learn.fit(epochs, progress=False)
    unbroken = new_learner(cbs=[SchedulerCB(reduce, 'epoch'), other := Note()])
    assert [r['valid_loss'] for r in unbroken.fit(5, progress=False)] == [r['valid_loss'] for r in records]
    assert note.bad == other.bad


def test_an_empty_state_and_a_validation_leave_the_next_fit_alone():
    cb = SchedulerCB(make_cosine)
    cb.load_state_dict({})
    learn = new_learner(cbs=[cb, watch := Watch()])
    learn.fit(1, train=False, progress=False)
    learn.fit(1, progress=False)
    assert_close(watch.lrs, cosine(10))


def test_a_validation_between_loading_and_resuming():
    def new(last): return new_learner(cbs=[SchedulerCB(make_cosine), Watch(), last])
    with pytest.raises(KeyboardInterrupt): new(save := Save(14)).fit(2, progress=False)
    second = new(Late())
    load(second, save.states)
    second.fit(1, train=False, progress=False)
    second.load_state_dict(save.states[2])
    second.fit(2, progress=False)
    assert_close(second.cbs[1].lrs, cosine(20)[14:])
    assert second.opt.param_groups[0]['lr'] == .01

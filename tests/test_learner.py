"The learner beyond chapter 05: batches and loaders of every kind, events and errors, uses that change nothing, resuming"
import copy
import io
import random
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from common import BATCHES, exact, gen, rows, x, y
from torch import nn
from torch.testing import assert_close
from torch.utils import data as torch_data

from miniai.batches import random_state, set_random_state, tensors_in
from miniai.data import mnist
from miniai.learner import (
    EVENTS,
    PHASES,
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelStep,
    Learner,
)
from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, ReLU, Sequential
from miniai.training import BatchSampler, DataLoader, Dataset, get_dls

fast = dict(progress=False)


class Noisy(torch_data.Dataset):
    "Examples that draw from three global generators whenever they are read"
    def __len__(self): return len(x)
    def __getitem__(self, i): return x[i] + .01*torch.randn(9) + .01*random.random() + np.float32(.01*np.random.rand()), y[i]


LOADERS = {
    'ours, own generator': lambda: get_dls(Dataset(x, y), Dataset(x, y), 16, gen(3))[0],
    'ours, global seed': lambda: get_dls(Dataset(x, y), Dataset(x, y), 16)[0],
    'torch, own generator': lambda: torch_data.DataLoader(rows, 16, shuffle=True, generator=gen(3)),
    'torch, global seed': lambda: torch_data.DataLoader(rows, 16, shuffle=True),
    'torch, workers': lambda: torch_data.DataLoader(rows, 16, shuffle=True, generator=gen(3), num_workers=2),
    'torch, our sampler': lambda: torch_data.DataLoader(rows, sampler=BatchSampler(rows, 16, True, generator=gen(3)), batch_size=None),
    'examples that draw': lambda: torch_data.DataLoader(Noisy(), 16, shuffle=True),
    'a list': lambda: BATCHES,
}
LASTING = dict(num_workers=1, persistent_workers=True)
PERSISTENT = {
    'persistent workers': lambda: torch_data.DataLoader(rows, 16, shuffle=True, **LASTING),
    'persistent workers, own generator': lambda: torch_data.DataLoader(rows, 16, True, generator=gen(3), **LASTING),
    'persistent workers, our sampler': lambda: torch_data.DataLoader(rows, sampler=BatchSampler(rows, 16, True),
                                                                     batch_size=None, **LASTING),
}


def seed_all(k):
    torch.manual_seed(k)
    np.random.seed(k)
    random.seed(k)


def model(engine='torch'):
    if engine == 'ours': return Sequential(Linear(9, 8), ReLU(), Linear(8, 3))
    return nn.Sequential(nn.Linear(9, 8), nn.Dropout(.2), nn.ReLU(), nn.Linear(8, 3))


def learner(train_dl=BATCHES, engine='torch', cbs=(), valid_dl=None, cls=Learner):
    loss = CrossEntropyLoss() if engine == 'ours' else nn.CrossEntropyLoss()
    return cls(model(engine), (train_dl, valid_dl), loss, torch.optim.AdamW, .01, cbs)


def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]
def callback(name='Mine', **methods): return type(name, (Callback,), methods)()
def at(event, act): return callback(**{event: lambda self, learn: act(learn)})
def numbers(state): return [t.tolist() for t in tensors_in(state)], state['python'], state['numpy'][2:]
def losses(records): return [{k: v for k, v in r.items() if k != 'seconds'} for r in records]


# ---- how a batch is read

one_tensor, triple, dicts = [x[:32]], [(x[:32], torch.arange(32), y[:32])], [{'pixels': a, 'label': b} for a, b in BATCHES]


@pytest.mark.parametrize('batches,found', [(one_tensor, r'Tensor of shape \(32, 9\)'), (triple, 'tuple of 3 parts'), (dicts,
    'dict of 2 parts'),
                                           ([[x[0], x[1], y[0], y[1]]], 'list of 4 parts'), ([7], 'a int, must')])
@pytest.mark.parametrize('use', ['fit', 'evaluate', 'predict', 'summary', 'show_batch', 'show_results'])
def test_a_batch_that_is_no_pair_raises_everywhere(batches, found, use):
    learn = learner(batches, valid_dl=batches)
    before = weights(learn)
    calls = {'fit': lambda: learn.fit(1, **fast), 'evaluate': learn.evaluate, 'summary': learn.summary, 'show_batch': learn.show_batch,
             'predict': lambda: learn.predict(iter(batches)), 'show_results': learn.show_results}
    with pytest.raises(ValueError, match=f'{found}.* pair .*override inputs'): calls[use]()
    exact(weights(learn), before)


class Images(Learner):
    "Shows its inputs as images of 3 by 3 pixels"
    def inputs(self): return super().inputs().view(-1, 3, 3)
    def forward(self): self.preds = self.model(self.xb.flatten(1))


class Named(Learner):
    def inputs(self): return self.batch['pixels']
    def targets(self): return self.batch['label']


def test_two_methods_make_everything_work_with_dicts():
    torch.manual_seed(0)
    named, plain = learner(dicts, valid_dl=dicts, cls=Named), learner(BATCHES, valid_dl=BATCHES)
    plain.model.load_state_dict(named.model.state_dict())
    records = []
    for learn in named, plain:
        torch.manual_seed(1)
        records.append(losses(learn.fit(2, **fast)))
    assert records[0] == records[1] and named.evaluate() == plain.evaluate() and named.summary() == plain.summary()
    exact(weights(named), weights(plain))
    exact(named.predict(dicts), plain.predict(BATCHES))
    exact(named.predict(x), plain.predict(x))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(9, 3)
    def forward(self, a, b=0.): return self.lin(a) + b


@pytest.mark.parametrize('make', [lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {'a': a, 'b': b}, lambda a, b: {'b': b, 'a': a}])
def test_models_with_several_inputs(make):
    torch.manual_seed(0)
    b = torch.randn(200, 3)
    net = Two()
    batches = [(make(x[i:i + 40], b[i:i + 40]), y[i:i + 40]) for i in range(0, 200, 40)]
    learn = Learner(net, (batches, batches), nn.CrossEntropyLoss(), lr=.1)
    assert_close(learn.predict(make(x, b)), net(x, b).detach())
    exact(learn.predict(batches), learn.predict(make(x, b)))
    records = learn.fit(3, **fast)
    assert records[-1]['train_loss'] < records[0]['train_loss'] and learn.evaluate()['loss'] == records[-1]['valid_loss']
    assert "lin" in learn.summary() and "(40, 3)" in learn.summary()


def test_inputs_of_unequal_length_raise():
    learn = Learner(Two(), (BATCHES, None), nn.CrossEntropyLoss())
    with pytest.raises(ValueError): learn.predict((torch.randn(3000, 9), torch.randn(1024, 3)))
    with pytest.raises(RuntimeError): learn.predict((x, torch.randn(7, 3)))


def test_the_weight_of_a_batch_is_its_number_of_examples():
    class Pixels(Learner):
        def n_examples(self): return 3
    plain, other = learner(BATCHES[-2:]), learner(BATCHES[-2:], cls=Pixels)
    for learn, expected in (plain, [16, 8]), (other, [3, 3]):
        seen = []
        record = learn.fit(1, cbs=[at('after_batch', lambda l, seen=seen: seen.append(l.loss.item()))], **fast)[0]
        assert learn.sizes == expected and abs(record['train_loss'] - np.average(seen, weights=expected)) < 1e-6


@pytest.mark.parametrize('targets,n', [(y, 200), ((y, x[:7]), 200), ([x[:5], y], 5), ({'a': x[:4], 'b': y}, 4), ([{'a': x[:3]}], 3)])
def test_the_number_of_examples_of_nested_targets(targets, n):
    learn = learner()
    learn.batch = x, targets
    assert learn.n_examples() == n and learn.yb is targets and learn.xb is x


# ---- shapes, arguments, parameters: silent mistakes that raise

def squares(out, yb): return (out - yb).square().mean()


@pytest.mark.parametrize('loss', [squares, lambda out, yb: (out - yb).abs().mean(), nn.MSELoss(), nn.HuberLoss()])
@pytest.mark.parametrize('out,target', [((16, 1), (16,)), ((16,), (16, 1)), ((16, 1, 5), (16, 5))])
def test_outputs_and_targets_that_would_broadcast(loss, out, target):
    net = nn.Sequential(nn.Linear(9, 16), nn.Flatten(0))
    net.forward = lambda xb: net[0](xb).sum().expand(out)
    batches = [(x[:16], torch.randn(target))]
    learn = Learner(net, (batches, batches), loss, lr=.1)
    before = weights(learn)
    for use in (lambda: learn.fit(1, **fast)), learn.evaluate:
        with pytest.raises(ValueError, match=r'would broadcast.*\.squeeze\(1\)') as e: use()
        assert f'outputs {out} and targets {target}' in str(e.value)
    exact(weights(learn), before)


def test_shapes_that_are_right_train():
    torch.manual_seed(0)
    truth = x @ torch.randn(9)
    for target, squeeze in (truth, True), (truth[:, None], False):
        net = nn.Linear(9, 1)
        if squeeze: net = nn.Sequential(net, nn.Flatten(0))
        learn = Learner(net, get_dls((x, target), (x, target), 50), squares, lr=.1)
        assert learn.fit(20, **fast)[-1]['valid_loss'] < .01
    Learner(nn.Linear(9, 1), ([(x[:1], torch.ones(1))], None), squares, lr=.1).fit(1, **fast)    # one example: nothing to broadcast


def test_everything_after_epochs_has_a_name():
    learn = learner()
    with pytest.raises(TypeError): learn.fit(1, 1e-2)
    assert learn.opt is None and learn.steps == 0
    learn.fit(1, lr=.03, **fast)
    assert learn.opt.param_groups[0]['lr'] == .03 and learn.steps == 13


@pytest.mark.parametrize('epochs', [np.int64(2), np.uint8(2), torch.tensor(2), True + 1])
def test_whole_numbers_of_any_type(epochs): assert len(learner().fit(epochs, **fast)) == 2


@pytest.mark.parametrize('arguments,error,message', [
    (dict(epochs=1.5), TypeError, 'integer'), (dict(epochs='2'), TypeError, 'integer'), (dict(epochs=-1), ValueError,
        'epochs is -1, needs 0 or more'),
    (dict(epochs=1, lr=-3.), ValueError, 'lr is -3.0, needs 0'), (dict(epochs=1, lr=float('nan')), ValueError, 'lr is nan')])
def test_arguments_of_fit(arguments, error, message):
    learn = learner()
    with pytest.raises(error, match=message): learn.fit(**arguments)
    assert learn.opt is None


@pytest.mark.parametrize('lr', [np.float32(.25), np.float64(.25), .25])
def test_a_learning_rate_is_stored_as_a_plain_number(lr):
    first, second = learner(), learner()
    first.fit(1, lr=lr, **fast)
    second.lr = lr
    second.fit(1, **fast)
    for learn in first, second: assert type(learn.opt.param_groups[0]['lr']) is float and learn.opt.param_groups[0]['lr'] == .25


class TestNewParameters:
    def fitted(self):
        learn = Learner(model('ours'), (BATCHES, None), CrossEntropyLoss(), torch.optim.SGD, .1)
        learn.fit(1, **fast)
        return learn

    def test_a_replaced_layer_raises_and_is_named(self):
        learn = self.fitted()
        learn.model[2] = nn.Linear(8, 3)
        with pytest.raises(ValueError, match='2.weight, 2.bias did not exist .* learn.opt = None'): learn.fit(1, **fast)

    def test_with_a_new_optimiser_it_is_trained(self):
        learn = self.fitted()
        learn.model[2] = nn.Linear(8, 3)
        learn.opt = None
        before = weights(learn)
        learn.fit(1, **fast)
        assert all(not torch.equal(p, q) for p, q in zip(weights(learn), before))

    def test_in_a_group_of_the_optimiser_it_is_trained(self):
        learn = self.fitted()
        learn.model[2] = nn.Linear(8, 3)
        learn.opt.add_param_group({'params': learn.model[2].parameters()})
        before = weights(learn)
        learn.fit(1, **fast)
        assert all(not torch.equal(p, q) for p, q in zip(weights(learn), before))

    def test_an_optimiser_of_the_callers_own_may_train_a_part(self):
        learn = self.fitted()
        learn.opt = None
        learn.fit(0)
        learn.opt = torch.optim.SGD(learn.model[2].parameters(), lr=.1)
        before = weights(learn)
        learn.fit(1, **fast)
        assert [torch.equal(p, q) for p, q in zip(weights(learn), before)] == [True, True, False, False]

    def test_a_frozen_new_layer_raises_when_it_is_to_learn(self):
        learn = self.fitted()
        learn.model[0] = nn.Linear(9, 8).requires_grad_(False)
        learn.fit(1, **fast)
        learn.model[0].requires_grad_(True)
        with pytest.raises(ValueError, match='0.weight, 0.bias did not exist'): learn.fit(1, **fast)

    def test_an_old_frozen_layer_may_be_unfrozen(self):
        learn = learner(engine='ours')
        learn.model[0].requires_grad_(False)
        learn.fit(1, **fast)
        learn.model[0].requires_grad_(True)
        before = weights(learn)
        learn.fit(1, **fast)
        assert not torch.equal(learn.model[0].weight, before[0])

    def test_another_model_and_evaluation_only(self):
        learn = self.fitted()
        learn.model = model()
        assert len(learn.fit(1, train=False, **fast) if learn.dls[1] else learn.predict(x)) == 200
        with pytest.raises(ValueError, match='0.weight'): learn.fit(1, **fast)


class Nested(Callback):
    def before_batch(self, learn): learn.fit(1)


def mistakes():
    empty = DataLoader(Dataset(x[:0], y[:0]), 4)
    frozen = model().requires_grad_(False)
    stranger = torch.optim.SGD(model().parameters(), lr=.1)
    loss = nn.CrossEntropyLoss()
    def fit(train=BATCHES, valid=BATCHES, loss=loss, opt=torch.optim.SGD, net=None, cbs=(), **kwargs):
        return Learner(net or model(), (train, valid), loss, opt, .1).fit(1, cbs=cbs, **fast, **kwargs)
    same = Callback()
    return {
        'nothing to train': (lambda: fit(net=frozen), 'no parameter of the model requires grad'),
        'another model': (lambda: fit(opt=lambda params, lr: stranger), 'is it of another model'),
        'empty loader': (lambda: fit(empty), 'train_dl gave no batch'), 'empty validation': (lambda: fit(valid=[]),
        'valid_dl gave no batch'),
        'used generator': (lambda: fit(iter(())), 'used generator'), 'no loader': (lambda: fit(None), 'there is no training loader'),
        'all cancelled': (lambda: fit(cbs=[at('before_batch', lambda l: cancel(CancelBatch))]),
        'train_dl gave no batch, or all of them were cancelled'),
        'no validation': (lambda: fit(valid=None, train=BATCHES) and Learner(model(), (BATCHES, None), loss).evaluate(),
        'no validation loader'),
        'a sum': (lambda: fit(loss=nn.CrossEntropyLoss(reduction='sum')), "needs 'mean'"),
        'twice the same': (lambda: fit(cbs=[same, Callback(), same]), 'the same Callback object is given twice'),
        'infinite loss': (lambda: fit(loss=lambda out, yb: loss(out, yb) * (torch.inf if len(yb) == 8 else 1)),
                          r'the loss became inf in epoch 1, training batch 12 \(counted from 0\)'),
        'infinite, valid': (lambda: fit(loss=lambda out, yb: loss(out, yb) * (1 if out.requires_grad or len(yb) == 16 else torch.nan)),
                            'the loss became nan in epoch 1, validation batch 12')}


def cancel(kind): raise kind


@pytest.mark.parametrize('name', mistakes())
def test_mistakes(name):
    call, message = mistakes()[name]
    with pytest.raises((ValueError, FloatingPointError), match=message): call()


def test_a_fit_inside_a_fit_raises():
    with pytest.raises(RuntimeError, match='a fit is running'): learner(cbs=[Nested()]).fit(1, **fast)


# ---- events

def define(name, value=lambda self, learn: None, base=Callback): return type('Mine', (base,), {name: value})


@pytest.mark.parametrize('name', [*EVENTS, 'plot', 'cleanup', 'on_new_best', 'after', '_before_fit', 'losses', 'state_dict',
    'on_train_begin'])
def test_names_of_methods(name): assert callable(getattr(define(name), name))


@pytest.mark.parametrize('name,hint', [('after_bacth', 'did you mean after_batch'), ('befor_fit', 'did you mean before_fit'),
    ('after_loss', ''),
                                       ('before_predict', 'the phases are fit, epoch'), ('before_update', ''), ('cleanup_all',
                                       'phases are')])
def test_names_that_are_no_event_raise(name, hint):
    for base in Callback, define('before_fit'):
        with pytest.raises(TypeError, match=f'Mine.{name}: there is no such event; .*{hint}'): define(name, base=base)
    define(name, 7)                                                     # not a method, so not an event


def test_events_and_defaults():
    assert len(EVENTS) == 3 * len(PHASES) == 33 and EVENTS[:4] == ('before_fit', 'after_fit', 'cleanup_fit', 'before_epoch')
    cb = define('before_fit')()
    assert (cb.order, cb.shows_progress, cb.needed, cb.state_dict(), cb.load_state_dict({}), repr(cb)) == (0, False, False, {}, None,
        'Mine')


class Log(Callback):
    "Logs the events of epoch and batch, and raises an error at one of them"
    def __init__(self, log, name='', order=0, **raises): self.log, self.name, self.order, self.raises = log, name, order, raises
for event in EVENTS:
    def note(self, learn, event=event):
        if event.endswith(('epoch', 'batch')): self.log.append(self.name + event)
        if event in self.raises: raise self.raises[event]
    setattr(Log, event, note)

BATCH = ['before_batch', 'after_batch', 'cleanup_batch']


@pytest.mark.parametrize('raises,error,expected', [
    ({}, None, ['before_epoch', *BATCH, *BATCH, 'after_epoch', 'cleanup_epoch']),
    ({'before_batch': CancelBatch}, ValueError, ['before_epoch', *BATCH[::2], *BATCH[::2], 'cleanup_epoch']),
    ({'after_forward': CancelBatch}, ValueError, ['before_epoch', *BATCH[::2], *BATCH[::2], 'cleanup_epoch']),
    ({'after_batch': CancelEpoch}, None, ['before_epoch', *BATCH, 'cleanup_epoch']),
    ({'before_step': CancelStep}, None, ['before_epoch', *BATCH, *BATCH, 'after_epoch', 'cleanup_epoch']),
    ({'after_batch': CancelFit}, None, ['before_epoch', *BATCH, 'cleanup_epoch']),
    ({'before_fit': CancelFit}, None, []),
    ({'before_batch': OSError}, OSError, ['before_epoch', *BATCH[::2], 'cleanup_epoch']),
    ({'before_epoch': CancelBatch}, CancelBatch, ['before_epoch', 'cleanup_epoch']),              # outside any batch: an error
    ({'cleanup_batch': OSError}, OSError, ['before_epoch', *BATCH, 'cleanup_epoch'])])
def test_the_log_of_an_epoch(raises, error, expected):
    log = []
    with pytest.raises(error) if error else nullcontext(): learner(BATCHES[:2]).fit(1, cbs=[Log(log, **raises)], **fast)
    assert log == expected


def test_order_and_reverse_cleanup_even_if_one_fails():
    log = []
    cbs = [Log(log, 'c.', 3, cleanup_epoch=OSError), Log(log, 'a.', -1), Log(log, 'b.', 2)]
    with pytest.raises(OSError): learner(BATCHES[:1]).fit(1, cbs=cbs, **fast)
    assert log == [name + event for event in ('before_epoch', *BATCH[:2]) for name in ('a.', 'b.', 'c.')] + [
        name + event for event in ('cleanup_batch',) for name in ('c.', 'b.', 'a.')] + [
        name + 'after_epoch' for name in ('a.', 'b.', 'c.')] + [name + 'cleanup_epoch' for name in ('c.', 'b.', 'a.')]


def test_an_event_set_to_none_is_left_out():
    log = []
    quiet = Log(log)
    quiet.after_batch = None
    learner(BATCHES[:1]).fit(1, cbs=[quiet], **fast)
    assert 'after_batch' not in log and 'cleanup_batch' in log


@pytest.mark.parametrize('event', ['before_batch', 'after_forward', 'after_backward', 'after_step', 'after_batch', 'before_validate',
    'after_epoch',
                                   'before_evaluate'])
def test_a_cancelled_fit_ends_like_any_other(event):
    ended = []
    end = callback(after_fit=lambda self, learn: ended.append((len(learn.records), learn.epochs_done)),
        cleanup_fit=lambda self, learn: ended.append('clean'))
    learn = learner(valid_dl=BATCHES[:2])
    records = learn.fit(5, cbs=[at(event, lambda l: cancel(CancelFit)), end], **fast)
    done = int(event == 'after_epoch')                                  # only there the epoch has its record
    assert len(records) == done and ended == [(done, done), 'clean'] and learn.batch is None and not learn.training
    assert len(learn.fit(2, **fast)) == 2


def test_no_after_fit_after_an_error():
    ended = []
    with pytest.raises(OSError): learner().fit(1, cbs=[at('after_batch', lambda l: cancel(OSError)), at('after_fit', ended.append)], **fast)
    assert not ended


@pytest.mark.parametrize('kind,event,batch,steps,epochs', [
    (CancelFit, 'before_batch', 3, 3, 0), (CancelEpoch, 'after_batch', 3, 8, 0), (CancelBatch, 'before_batch', 3, 24, 2), (CancelBatch,
        'after_get_loss', 3, 24, 2),
    (CancelStep, 'before_step', 3, 24, 2), (CancelStep, 'after_step', 3, 25, 2), (CancelBatch, 'before_step', 3, 24, 2)])
def test_what_each_exception_skips(kind, event, batch, steps, epochs):
    def act(learn):
        if learn.training and learn.batch_idx == batch: raise kind
    learn = learner()
    records = learn.fit(2, cbs=[at(event, act)], **fast)
    if event == 'after_step': steps = 26 - 2                            # the step is taken, but not counted
    assert (learn.steps, len(records)) == (steps, epochs)
    if epochs: assert len(learn.losses) == (12 if kind is CancelBatch else 13)


def test_a_callback_may_take_a_step_of_its_own():
    class Last(Callback):
        "One step an epoch, at its end, with the sum of all gradients"
        due = False
        def before_train(self, learn): self.due = False
        def before_step(self, learn):
            if not self.due: raise CancelStep
        def after_train(self, learn):
            self.due = True
            learn.update()
    seen = []
    learn = learner(BATCHES[:3], engine='ours')
    other = copy.deepcopy(learn)
    learn.fit(2, cbs=[Last(), at('after_zero_grad', lambda l: seen.append(l.steps))], **fast)
    opt = other.create_opt()
    for _ in range(2):
        sum(other.loss_func(other.model(xb), yb) for xb, yb in BATCHES[:3]).backward()
        opt.step()
        opt.zero_grad()
    assert_close(weights(learn), weights(other))
    assert learn.steps == 2 and seen == [1, 2]


@pytest.mark.parametrize('engine', ['ours', 'torch'])
@pytest.mark.parametrize('event', EVENTS)
def test_an_error_at_any_event_leaves_a_learner_that_works(event, engine):
    fails = at(event, lambda learn: cancel(OSError('as a test')))
    learn = learner(engine=engine, valid_dl=BATCHES)
    learn.model[0].eval()
    with pytest.raises(OSError, match='as a test') as e: learn.fit(1, cbs=[fails], **fast)
    where = 'in before the first epoch' if event == 'before_fit' else 'in epoch 1, '
    assert e.value.__notes__[0].startswith(where) and len(e.value.__notes__) == 1
    assert not learn.training and learn.batch is None and torch.is_grad_enabled()
    assert learn.model.training and not learn.model[0].training         # every layer has its old mode
    assert len(learn.fit(2, **fast)) == 2


def test_the_note_says_where():
    class Breaks:
        def __iter__(self):
            yield BATCHES[0]
            raise OSError('the disk is gone')
    for name, note in ('train_dl', 'in epoch 1, training batch 0 (counted from 0)'), ('valid_dl', 'in epoch 1, validation batch 0'):
        learn = learner(**{name: Breaks()})
        with pytest.raises(OSError) as e: learn.fit(1, **fast)
        assert e.value.__notes__[0].startswith(note)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[at('after_batch', lambda l: cancel(KeyboardInterrupt))], **fast)
    assert learn.batch is None and not learn.will_train


# ---- fit

@pytest.mark.parametrize('engine', ['ours', 'torch'])
def test_what_callbacks_see(engine):
    seen = []
    class Look(Callback):
        def before_fit(self, learn):
            assert learn.opt is not None and self in learn.running_cbs and not learn.progress and learn.will_train
            seen.append((learn.epochs, learn.epochs_done, learn.batches_done))
        def before_train(self, learn):
            assert learn.training and learn.dl is learn.train_dl is learn.dls[0] and (learn.batches_done, learn.batch_idx) == (0, 0)
            learn.dl = learn.dl[:3]
        def before_validate(self, learn): assert not learn.training and learn.dl is learn.valid_dl and learn.batch_idx == 0
        def before_batch(self, learn):
            assert learn.model.training == learn.training == torch.is_grad_enabled() and len(learn.losses) == learn.batch_idx
            if learn.training: learn.batch = learn.xb*0, learn.yb
        def after_forward(self, learn):
            if learn.training and engine == 'ours': assert_close(learn.preds, learn.preds[:1].expand(16, 3))      # all inputs are zero now
        def after_backward(self, learn): assert all(p.grad is not None for p in learn.model.parameters())
        def after_zero_grad(self, learn): assert all(p.grad is None for p in learn.model.parameters())
        def after_batch(self, learn):
            assert learn.n_examples() == len(learn.yb) == learn.sizes[-1] and not learn.losses[-1].requires_grad
            assert learn.losses[-1].ndim == 0
            exact(learn.losses[-1], learn.loss.detach())
            if learn.training: seen.append((learn.epoch, learn.batch_idx, learn.batches_done, learn.steps))
        def after_validate(self, learn): learn.record['valid_size'] = sum(learn.sizes)
        def after_epoch(self, learn):
            assert learn.records[-1] is learn.record and learn.epochs_done == learn.epoch and learn.batches_done == 0
            seen.append(list(learn.record))
    learn = learner(engine=engine, valid_dl=BATCHES[:4], cbs=[Look()])
    records = learn.fit(2, **fast)
    full = ['epoch', 'train_loss', 'valid_loss', 'valid_size', 'seconds']
    assert seen == [(2, 0, 0), (1, 0, 1, 1), (1, 1, 2, 2), (1, 2, 3, 3), full, (2, 0, 1, 4), (2, 1, 2, 5), (2, 2, 3, 6), full]
    assert (records[1]['valid_size'], learn.training, learn.will_train, learn.running_cbs) == (64, False, False, [])
    assert (learn.batch, learn.preds, learn.loss) == (None, None, None)


def test_records_of_each_kind_of_fit():
    keys = lambda records: [list(r) for r in records]
    learn = learner(valid_dl=BATCHES)
    assert learn.fit(0) == [] and learn.steps == 0 and learn.opt is not None
    assert keys(learn.fit(2, **fast)) == [['epoch', 'train_loss', 'valid_loss', 'seconds']]*2
    before = weights(learn)
    records = learn.fit(3, train=False, **fast)
    assert keys(records) == [['epoch', 'valid_loss', 'seconds']]*3 and records[2]['valid_loss'] == learn.evaluate()['loss']
    assert learn.steps == 26
    exact(weights(learn), before)
    assert keys(learner().fit(1, **fast)) == [['epoch', 'train_loss', 'seconds']]
    frozen = learner(valid_dl=BATCHES)
    frozen.model.requires_grad_(False)
    assert len(frozen.fit(1, train=False, **fast)) == 1                 # evaluation needs no gradients


def test_the_seconds_of_an_epoch():
    learn, start = learner(BATCHES[:2]), time.perf_counter()
    records = learn.fit(2, cbs=[at('before_batch', lambda l: time.sleep(.03))], **fast)
    took = time.perf_counter() - start
    assert all(.06 < r['seconds'] < took for r in records) and .12 < sum(r['seconds'] for r in records) < took


def test_learning_rates():
    learn = learner()
    opt = learn.create_opt()
    assert learn.create_opt() is opt and opt.param_groups[0]['lr'] == .01
    opt.param_groups[0]['initial_lr'] = 5.                              # left over from a schedule
    learn.fit(1, lr=.02, **fast)
    assert learn.opt is opt and 'initial_lr' not in opt.param_groups[0] and (opt.param_groups[0]['lr'], learn.lr) == (.02, .02)
    opt.param_groups[0]['initial_lr'] = 5.
    learn.fit(1, **fast)
    assert opt.param_groups[0]['lr'] == .02 and opt.param_groups[0]['initial_lr'] == 5.
    for lr, expected in (None, .001), (.03, .03):
        own = Learner(model(), (BATCHES, None), nn.CrossEntropyLoss(), torch.optim.Adam)
        own.fit(1, lr=lr, **fast)
        assert own.opt.param_groups[0]['lr'] == expected and own.lr == lr


def test_the_line_of_an_epoch(capsys):
    learn = learner(valid_dl=BATCHES)
    learn.fit(2, cbs=[at('after_validate', lambda l: l.record.update(lr_groups=2))])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith(f'epoch {i}, train loss ') and ', lr groups 2, ' in line and line.endswith(' s')
                                   for i, line in enumerate(lines, 1))
    assert f'valid loss {learn.record["valid_loss"]:.4f}' in lines[1] and f'{learn.record["seconds"]:.1f} s' in lines[1]
    shows = Callback()
    shows.shows_progress = True
    learn.fit(1, progress=False)
    learn.fit(1, cbs=[shows])
    learn.fit(1, cbs=[Callback()])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_fit_records_gradients_even_if_the_caller_does_not():
    learn = learner()
    before = weights(learn)
    with torch.no_grad():
        learn.fit(1, **fast)
        assert not torch.is_grad_enabled()
    assert not torch.equal(weights(learn)[0], before[0])


def test_gradients_from_before_a_fit_do_not_count():
    torch.manual_seed(0)
    clean, dirty = learner(engine='ours'), learner(engine='ours')
    dirty.model.load_state_dict(clean.model.state_dict())
    for p in dirty.model.parameters(): p.grad = torch.ones_like(p)
    for learn in clean, dirty: learn.fit(1, **fast)
    exact(weights(dirty), weights(clean))


def test_nothing_of_a_forward_pass_is_kept_after_a_cancelled_fit():
    learn = learner()
    assert learn.fit(1, cbs=[at('after_forward', lambda l: cancel(CancelFit))], **fast) == [] and learn.preds is None and learn.steps == 0


# ---- uses that change nothing

class Item(torch_data.Dataset):
    "One example at a time, as plain Python"
    def __len__(self): return 200
    def __getitem__(self, i): return x[int(i)], int(y[int(i)])


class Pictures(torch_data.Dataset):
    "Images as bytes, scaled by a transform when they are read"
    images = ((x - x.min())/(x.max() - x.min())*255).byte().numpy()
    def __init__(self, transform): self.transform = transform
    def __len__(self): return 200
    def __getitem__(self, i): return self.transform(self.images[i]), y[i]


def scale(image): return torch.as_tensor(image).float()/256


FORMS = {
    'tensor': (x, x), 'array': (x.numpy(), x), 'Dataset': (Dataset(x, y), x), 'Dataset of arrays': (Dataset(x.numpy(), y.numpy()), x),
    'Dataset of lists': (Dataset(x, y.tolist()), x), 'TensorDataset': (rows, x), 'plain tuples': (Item(), x),
        'Subset': (torch_data.Subset(rows, range(9)), x[:9]),
    'bytes with a transform': (Pictures(scale), scale(Pictures.images)), 'our loader': (DataLoader(Dataset(x, y), 7), x),
        'tuple in our loader': (DataLoader((x, y), 7), x),
    'torch loader': (torch_data.DataLoader(rows, 7), x), 'list of batches': (BATCHES, x), 'generator of batches': (None, x),
        'one example': (x[:1], x[:1])}


@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('engine', ['ours', 'torch'])
def test_predict_and_evaluate_take(name, engine):
    learn = learner(engine=engine)
    given, inputs = FORMS[name]
    fresh = lambda: iter(BATCHES) if given is None else given
    learn.model.eval()
    truth = learn.model(inputs).detach()
    learn.model.train()
    preds = learn.predict(fresh())
    assert_close(preds, truth)
    assert not preds.requires_grad and learn.model.training
    if name in ('tensor', 'array', 'one example'): return               # inputs alone have no loss
    assert_close(learn.evaluate(fresh())['loss'], nn.functional.cross_entropy(truth, y[:len(truth)]).item())


def test_a_list_with_a_batch_that_is_no_pair_is_read_as_batches():
    with pytest.raises(ValueError, match='the batch is a Tensor'): learner().predict([BATCHES[0], x[:16]])


def test_predict_has_all_examples_in_order():
    big = torch.arange(2500.)[:, None]
    learn = Learner(nn.Sequential(nn.Identity(), nn.Linear(1, 1)), (BATCHES, None), squares)
    learn.model = nn.Identity()
    exact(learn.predict(big), big)
    exact(learn.predict(Dataset(big, big)), big)
    exact(learn.predict({'input': big}), big)


@pytest.mark.parametrize('make', [lambda s: get_dls(s.train, s.valid, 50), lambda s: get_dls(Item(), Item(), np.int64(50)),
    lambda s: (DataLoader(s.train, 50), DataLoader(s.valid, 50)),
                                  lambda s: get_dls(Pictures(scale), Pictures(scale), 50),
                                  lambda s: get_dls(Dataset(x.numpy(), y.numpy()), (x, y), 50)])
def test_datasets_of_every_kind_train(make):
    dls = make(mnist(sample=True))
    torch.manual_seed(0)
    net = nn.Linear(next(iter(dls[0]))[0].shape[1], 10)
    learn = Learner(net, dls, nn.CrossEntropyLoss(), torch.optim.Adam, .01)
    records = learn.fit(2, **fast)
    assert records[1]['valid_loss'] < records[0]['valid_loss'] and learn.evaluate(data := dls[1])['loss'] == records[1]['valid_loss']
    assert learn.predict(data).shape == (len(dls[1].dataset), 10)


def test_evaluate_takes_tensors_and_callbacks_and_adds_their_entries():
    learn = learner(valid_dl=BATCHES)
    learn.fit(1, **fast)
    record, records, steps = learn.record, learn.records, learn.steps
    adds = at('after_validate', lambda l: l.record.update(valid_size=sum(l.sizes), other=1))
    assert learn.evaluate(cbs=[adds]) == {'loss': record['valid_loss'], 'size': 200, 'other': 1}
    assert_close(learn.evaluate((x, y))['loss'], record['valid_loss'])
    assert learn.record is record and learn.records is records and learn.steps == steps and learn.losses and learn.train_dl is learn.dls[0]


def pass_through(learn): learn.model(x), torch.rand(1), np.random.rand(1), random.random()


def inside(learn):
    with learn.evaluating(): pass_through(learn)


def failing(learn):
    with pytest.raises(RuntimeError): learn.predict(x[:, :3])


def trial(learn):
    state = random_state(learn.dls)
    learn.trial().fit(1, **fast)
    set_random_state(state, learn.dls)

USES = {'evaluating': inside, 'predict': lambda l: l.predict(x), 'predict(loader)': lambda l: l.predict(l.dls[0]),
    'evaluate': lambda l: l.evaluate(),
        'evaluate(loader)': lambda l: l.evaluate(l.dls[0]), 'summary': lambda l: l.summary(), 'show_batch': lambda l: l.show_batch(5),
        'show_results': lambda l: l.show_results(5), 'a failing use': failing, 'trial': trial}
PASSES = 'predict(loader)', 'evaluate(loader)', 'trial'                 # a pass through persistent workers cannot be taken back


SLOW = ('summary', 'show_results', 'evaluate', *PASSES)                  # for loaders whose workers take time to start


def uses(name):
    "The uses worth trying with a loader"
    return [use for use in USES if (name in LOADERS or use not in PASSES) and ('workers' not in name or use in SLOW)]


@pytest.mark.parametrize('name,use', [(name, use) for name in (*LOADERS, *PERSISTENT) for use in uses(name)])
def test_a_use_leaves_the_next_epochs_as_they_were(name, use):
    import matplotlib.pyplot as plt
    seed_all(1)
    make = {**LOADERS, **PERSISTENT}[name]
    plain, curious = (learner(make(), valid_dl=BATCHES, cls=Images) for _ in range(2))
    curious.model.load_state_dict(plain.model.state_dict())
    for learn in plain, curious: learn.model[2].eval()                  # by hand, and to stay
    def everything():
        hooks = [len(m._forward_hooks) for m in curious.model.modules()]
        modes = [m.training for m in curious.model.modules()]
        return numbers(random_state(curious.dls)), modes, hooks, curious.batch, curious.preds, curious.steps
    seed_all(5)
    before = everything()
    USES[use](curious)
    plt.close('all')
    assert everything() == before
    for learn in plain, curious:
        seed_all(6)
        learn.fit(2, **fast)
    exact(weights(plain), weights(curious))


def test_a_look_in_mid_epoch_does_not_begin_the_epoch_anew():
    for make in (*LOADERS.values(), *PERSISTENT.values()):
        seen = []
        def look(learn, seen=seen):
            if learn.training and learn.batch_idx == 2: learn.summary()
            seen.append(learn.batch_idx)
        learner(make(), cbs=[at('after_batch', look)]).fit(1, **fast)
        assert seen == list(range(13))


class Swap(Callback):
    "The model predicts 7 in the phase evaluate, as if an average of the weights were swapped in"
    def __init__(self): self.events = []
    def before_evaluate(self, learn):
        self.events.append('in')
        self.kept = copy.deepcopy(learn.model.state_dict())
        with torch.no_grad(): learn.model.weight.fill_(0), learn.model.bias.fill_(7)
    def cleanup_evaluate(self, learn):
        self.events.append('out')
        learn.model.load_state_dict(self.kept)


def test_every_use_sees_the_weights_of_the_phase_evaluate():
    swap, found = Swap(), []
    ones = [(x[:20], torch.full((20, 1), 6.))]
    def look(learn):
        found.append(learn.predict(x[:3]).flatten().tolist())
        with learn.evaluating(), learn.evaluating(): found.append(learn.model.bias.tolist())     # one inside the other: swapped in once
        found.append(learn.model.bias.item() != 7)                      # the training weights are back
    learn = Learner(nn.Linear(9, 1), (ones, ones), squares, lr=.1, cbs=[swap])
    record = learn.fit(1, cbs=[at('after_validate', look)], **fast)[0]
    assert found == [[7., 7., 7.], [7.], True] and abs(record['valid_loss'] - 1) < 1e-6 and record['train_loss'] > 1
    assert swap.events == ['in', 'out']*3 and learn.evaluate()['loss'] == record['valid_loss'] and swap.events == ['in', 'out']*4
    learn.predict(x)                                                    # no fit is running, so there are no events
    assert swap.events == ['in', 'out']*4


def test_the_phase_evaluate_is_cleaned_up_after_errors():
    swap = Swap()
    learn = Learner(nn.Linear(9, 1), (BATCHES, [(x, torch.ones(200, 1))]), lambda out, yb: out.mean(), lr=.1, cbs=[swap])
    with pytest.raises(OSError): learn.fit(1, cbs=[at('before_batch', lambda l: l.training or cancel(OSError))], **fast)
    assert swap.events == ['in', 'out'] and (learn.model.bias != 7).all() and not learn._inside


@pytest.mark.parametrize('engine', ['ours', 'torch'])
def test_a_trial_is_a_copy(engine):
    class Kept(Callback):
        needed, count = True, 0
        def after_batch(self, learn): self.count += 1
    needed, other = Kept(), Kept()
    other.needed = False
    learn = learner(engine=engine, cbs=[needed, other])
    learn.fit(1, **fast)
    before, state, steps = weights(learn), str(learn.opt.state_dict()), learn.steps
    new = learn.trial()
    assert [type(cb) for cb in new.cbs] == [Kept] and new.cbs[0] is not needed and new.opt is not learn.opt
    exact(weights(new), before)
    new.fit(1, **fast)
    assert new.steps == steps + 13 and new.cbs[0].count == 26 and needed.count == other.count == 13
    assert all(not torch.equal(p, q) for p, q in zip(weights(new), before))                      # its optimiser holds its own parameters
    exact(weights(learn), before)
    assert str(learn.opt.state_dict()) == state and learn.steps == steps and len(learn.fit(1, **fast)) == 1
    new.model[0].weight.requires_grad_(False)
    assert learn.model[0].weight.requires_grad


class Attentive(nn.Module):
    "Keeps results of its last forward pass, as models do for pictures of their attention"
    def __init__(self, engine):
        super().__init__()
        self.net, self.seen, self.note = model(engine), {}, 'text'
    def forward(self, xb):
        self.att = self.net[0](xb).softmax(1)
        self.seen = {'all': [self.att.square(), (self.att*2, None)]}
        return self.net(xb)


@pytest.mark.parametrize('engine', ['ours', 'torch'])
def test_a_trial_of_a_model_that_keeps_tensors_with_a_graph(engine):
    class Keeps(Callback):
        needed, preds = True, None
        def after_forward(self, learn): self.preds = learn.preds
    learn = Learner(Attentive(engine), (BATCHES, None), nn.CrossEntropyLoss(), torch.optim.SGD, .1, [Keeps()])
    learn.fit(1, **fast)
    net = learn.model
    assert not net.att.is_leaf
    with pytest.raises(RuntimeError): copy.deepcopy(net)
    before, new = weights(learn), learn.trial()
    exact(new.model.att, net.att.detach())
    exact(new.model.seen['all'][1][0], 2*net.att.detach())
    assert not new.model.att.requires_grad and new.model.net[0].weight.requires_grad and new.model.note == 'text'
    new.fit(1, **fast)
    exact(weights(learn), before)
    assert all(not torch.equal(p, q) for p, q in zip(weights(new), before)) and not net.att.is_leaf
    assert len(learn.fit(1, **fast)) == 1


def test_a_trial_before_the_first_fit_and_after_loading_a_position():
    learn = learner()
    learn.trial().fit(1, **fast)
    assert learn.opt is None
    learn.fit(2, cbs=[kept := CopyAt(18)], **fast)
    learn.load_state_dict(kept.state[0])
    assert len(learn.trial().fit(1, **fast)) == 1 and learn._resume is kept.state[0]


@pytest.mark.parametrize('name', PERSISTENT)
def test_an_epoch_with_persistent_workers_cannot_be_resumed(name):
    learner(PERSISTENT[name](), cbs=[kept := CopyAt(5)]).fit(1, **fast)
    late = learner(PERSISTENT[name]())
    late.load_state_dict(kept.state[0])
    before = weights(late)
    with pytest.raises(ValueError, match='persistent_workers=False'): late.fit(2, **fast)
    exact(weights(late), before)


def test_uses_move_batches_to_the_device_of_the_model():
    away = Learner(nn.Linear(9, 3, device='meta'), (BATCHES, None), squares)
    assert away.predict(x).device.type == away.predict(BATCHES).device.type == 'meta' and away.summary().rows[0][2] == '(16, 3)'


# ---- resuming

class CopyAt(Callback):
    order = 100
    def __init__(self, steps, epoch_end=False): self.at, self.epoch_end = steps, epoch_end
    def copy(self, learn):
        if learn.steps == self.at: self.state = copy.deepcopy((learn.state_dict(), learn.model.state_dict(), learn.opt.state_dict()))
    def after_batch(self, learn):
        if learn.training and not self.epoch_end: self.copy(learn)
    def after_epoch(self, learn):
        if self.epoch_end: self.copy(learn)


ONE = [(18, False)]                                                     # steps done, and: at the end of the epoch
PLACES = [(1, False), (13, False), (13, True), (14, False), *ONE, (39, False), (39, True)]
AT_ONE_PLACE = 'torch, workers', 'torch, our sampler', 'torch, global seed'


@pytest.mark.parametrize('engine', ['ours', 'torch'])
@pytest.mark.parametrize('name,place', [(name, place) for name in LOADERS for place in (ONE if name in AT_ONE_PLACE else PLACES)], ids=str)
def test_a_run_resumes_with_any_loader(name, place, engine):
    seed_all(1)
    unbroken = learner(LOADERS[name](), engine, [keep := CopyAt(*place)], BATCHES[:3])           # 13 batches an epoch
    unbroken.fit(3, **fast)
    position, state, moments = keep.state
    seed_all(99)
    late = learner(LOADERS[name](), engine, valid_dl=BATCHES[:3])
    late.fit(1, **fast)                                                 # a learner in another state in every respect
    late.model.load_state_dict(state)
    late.opt.load_state_dict(moments)
    late.load_state_dict(position)
    late.evaluate()                                                     # evaluating does not use up the position
    records = late.fit(3, **fast)
    exact(weights(late), weights(unbroken))
    assert losses(records) == losses(unbroken.records) and (late.steps, len(records), late._resume, late._replay) == (39, 3, None, None)
    assert numbers(random_state(late.dls)) == numbers(random_state(unbroken.dls))


def test_the_position_is_made_of_plain_values():
    learn = learner(cbs=[keep := CopyAt(18)])
    learn.fit(3, **fast)
    position = keep.state[0]
    assert [position[k] for k in ('epochs', 'epochs_done', 'batches_done', 'steps')] == [3, 1, 5, 18]
    assert len(position['losses']) == 5 and position['sizes'].tolist() == [16]*5 and len(position['records']) == 1
    assert [learn.state_dict()[k].tolist() for k in ('losses', 'sizes')] == [[], []]  # the fit has ended: no batch is begun
    file = io.BytesIO()
    torch.save(position, file)
    file.seek(0)
    assert learn.state_dict()['sizes'].dtype == torch.int64              # between two epochs: empty
    short = learner(BATCHES[:4])
    before = weights(short)
    short.load_state_dict(torch.load(file, weights_only=True))
    with pytest.raises(ValueError, match='the saved run used 5 batches of the epoch, but the loader has only 4'): short.fit(3, **fast)
    exact(weights(short), before)
    short.load_state_dict(position)
    assert len(short.fit(1, **fast)) == 1 and short.steps == 18         # one epoch, already done before: nothing is left to do
    assert short.fit(1, **fast)[0]['epoch'] == 1 and short.steps == 22


def test_the_mean_loss_of_a_resumed_epoch_weighs_every_batch():
    learn = learner(BATCHES[-3:], cbs=[keep := CopyAt(2)])
    learn.fit(1, **fast)
    late = learner(BATCHES[-3:])
    for part, state in zip((late, late.model, late.create_opt()), keep.state): part.load_state_dict(state)
    assert late.fit(1, **fast)[0]['train_loss'] == learn.record['train_loss'] and late.sizes == [16, 16, 8]


# ---- the same weights

@pytest.mark.parametrize('name', ['ours, own generator', 'torch, own generator', 'a list'])
@pytest.mark.parametrize('engine', ['ours', 'torch'])
def test_loop_fit_and_learner_end_in_identical_weights(engine, name):
    from miniai.training import SGD, fit
    found = []
    for way in 'loop', 'fit', 'learner':
        torch.manual_seed(4)
        net, dl, loss = model(engine), LOADERS[name](), CrossEntropyLoss() if engine == 'ours' else nn.CrossEntropyLoss()
        opt = SGD(net.parameters(), lr=.1)
        if way == 'loop':
            for xb, yb in [b for _ in range(3) for b in dl]:
                loss(net(xb), yb).backward()
                opt.step()
                opt.zero_grad()
        elif way == 'fit': fit(3, net, loss, opt, dl, BATCHES, progress=False)
        else: Learner(net, (dl, BATCHES), loss, SGD, .1).fit(3, **fast)
        found.append([p.detach() for p in net.parameters()])
    exact(found[0], found[1])
    exact(found[0], found[2])

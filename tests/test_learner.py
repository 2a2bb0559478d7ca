"The learner beyond chapter 05: other loaders, other batches, errors at every event"
import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils import data as torch_data

from miniai.learner import EVENTS, Callback, CancelFit, Learner, random_state
from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, ReLU, Sequential
from miniai.training import BatchSampler, Dataset, get_dls

gen = lambda seed: torch.Generator().manual_seed(seed)
x, y = torch.randn(200, 6, generator=gen(0)), torch.randint(3, (200,), generator=gen(1))
rows = torch_data.TensorDataset(x, y)


class Noisy(torch_data.Dataset):
    "Examples that draw from three global generators whenever they are read"
    def __len__(self): return len(x)
    def __getitem__(self, i): return x[i] + .01*torch.randn(6) + .01*random.random() + np.float32(.01*np.random.rand()), y[i]


LOADERS = {
    'ours, own generator': lambda: get_dls(Dataset(x, y), Dataset(x, y), 16, gen(3))[0],
    'ours, global seed': lambda: get_dls(Dataset(x, y), Dataset(x, y), 16)[0],
    'torch, own generator': lambda: torch_data.DataLoader(rows, 16, shuffle=True, generator=gen(3)),
    'torch, global seed': lambda: torch_data.DataLoader(rows, 16, shuffle=True),
    'torch, workers': lambda: torch_data.DataLoader(rows, 16, shuffle=True, generator=gen(3), num_workers=2),
    'torch, our sampler': lambda: torch_data.DataLoader(rows, sampler=BatchSampler(rows, 16, True, generator=gen(3)), batch_size=None),
    'examples that draw': lambda: torch_data.DataLoader(Noisy(), 16, shuffle=True),
    'a list': lambda: [rows[i:i + 16] for i in range(0, 200, 16)],
}


def model(engine='torch'):
    if engine == 'ours': return Sequential(Linear(6, 8), ReLU(), Linear(8, 3))
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(.2), nn.ReLU(), nn.Linear(8, 3))


def learner(train_dl, engine='torch', cbs=()):
    loss = CrossEntropyLoss() if engine == 'ours' else nn.CrossEntropyLoss()
    return Learner(model(engine), (train_dl, None), loss, torch.optim.AdamW, .01, cbs)


class CopyAt(Callback):
    order = 100
    def __init__(self, steps): self.at = steps
    def after_batch(self, learn):
        if learn.steps == self.at: self.state = copy.deepcopy((learn.state_dict(), learn.model.state_dict(), learn.opt.state_dict()))


@pytest.mark.parametrize('engine', ['ours', 'torch'])
@pytest.mark.parametrize('name', LOADERS)
def test_a_run_resumes_in_mid_epoch_with_any_loader(name, engine):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    unbroken = learner(LOADERS[name](), engine, [keep := CopyAt(18)])          # 13 batches an epoch
    unbroken.fit(3, progress=False)
    position, weights, moments = keep.state
    torch.manual_seed(99)
    late = learner(LOADERS[name](), engine)
    late.model.load_state_dict(weights)
    late.create_opt().load_state_dict(moments)
    late.load_state_dict(position)
    late.fit(3, progress=False)
    assert_close(list(late.model.parameters()), list(unbroken.model.parameters()), rtol=0, atol=0)
    assert [r['train_loss'] for r in late.records] == [r['train_loss'] for r in unbroken.records]


@pytest.mark.parametrize('name', LOADERS)
def test_looks_leave_the_next_epoch_as_it_was(name):
    torch.manual_seed(1)
    plain, curious = learner(LOADERS[name]()), learner(LOADERS[name]())
    curious.model.load_state_dict(plain.model.state_dict())
    state = random_state(plain.dls)
    before = str(state)
    curious.summary()
    curious.predict(x)
    assert str(random_state(curious.dls)) == before
    for learn in plain, curious:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        learn.fit(1, progress=False)
    assert_close(list(plain.model.parameters()), list(curious.model.parameters()), rtol=0, atol=0)


@pytest.mark.parametrize('engine', ['ours', 'torch'])
@pytest.mark.parametrize('event', EVENTS)
def test_an_error_at_any_event_leaves_a_learner_that_works(event, engine):
    class Fails(Callback): pass
    def fail(self, learn): raise OSError('as a test')
    setattr(Fails, event, fail)
    learn = learner(LOADERS['a list'](), engine)
    learn.dls = learn.dls[0], learn.dls[0]
    with pytest.raises(OSError, match='as a test') as e: learn.fit(1, cbs=[Fails()], progress=False)
    where = 'before the first epoch' if event == 'before_fit' else 'epoch '
    assert e.value.__notes__[0].startswith(f'in Fails.{event}, {where}') and len(e.value.__notes__) == 1
    assert not learn.training and learn.batch is None and torch.is_grad_enabled() and learn.model.training
    assert len(learn.fit(2, progress=False)) == 2


def test_batches_of_another_form():
    class Named(Learner):
        def predict(self, x=None): self.preds = self.model(self.batch['pixels'])
        def get_loss(self): self.loss = self.loss_func(self.preds, self.batch['label'])
        def rows(self): return len(self.batch['label'])
    batches = [{'pixels': x[i:i + 50], 'label': y[i:i + 50]} for i in range(0, 200, 50)]
    learn = Named(model(), (batches, batches[:1]), nn.CrossEntropyLoss(), lr=.1)
    records = learn.fit(3, progress=False)
    assert records[-1]['train_loss'] < records[0]['train_loss'] and learn.evaluate(batches)['loss'] > 0


def test_a_short_last_batch_is_weighted_by_its_size():
    sizes = []
    class Sizes(Callback):
        def after_batch(self, learn): sizes.append((learn.rows(), learn.loss.item()))
    learn = learner([rows[:150], rows[150:]], cbs=[Sizes()])
    record = learn.fit(1, progress=False)[0]
    assert abs(record['train_loss'] - sum(k*l for k, l in sizes)/200) < 1e-6 and [k for k, _ in sizes] == [150, 50]


def test_fit_records_gradients_even_if_the_caller_does_not():
    learn = learner(LOADERS['a list']())
    before = copy.deepcopy(learn.model.state_dict())
    with torch.no_grad():
        learn.fit(1, progress=False)
        assert not torch.is_grad_enabled()
    assert not torch.equal(learn.model.state_dict()['0.weight'], before['0.weight'])


def test_nothing_of_a_forward_pass_is_kept_after_a_cancelled_fit():
    class Ends(Callback):
        def after_predict(self, learn): raise CancelFit
    learn = learner(LOADERS['a list']())
    assert learn.fit(1, cbs=[Ends()], progress=False) == [] and learn.preds is None and learn.steps == 0

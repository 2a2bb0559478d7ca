"""Checkpoints with many optimisers, loaders and networks, damaged, on full and strange disks, and runs that are stopped or killed."""
import copy
import errno
import json
import os
import random
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from common import same
from safetensors.torch import load_file
from torch import nn

from miniai import checkpoints
from miniai.checkpoints import (
    CheckpointCB,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from miniai.data import mnist
from miniai.files import Damaged, lock_folder, write_checksums
from miniai.learner import Callback, CancelBatch, CancelFit, CancelStep, Learner
from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, ReLU, Sequential
from miniai.training import SGD, DataLoader, Dataset, get_dls

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
digits = mnist(sample=True)
train_ds, valid_ds = Dataset(digits.train.x[:300], digits.train.y[:300]), Dataset(digits.valid.x[:100], digits.valid.y[:100])


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    "In this process; the processes that are killed wait for it"
    monkeypatch.setattr(os, 'fsync', lambda fd: None)


class Stop(Callback):
    "Ends the fit, as an error would, after a training batch of the second epoch"
    order = 2000
    def __init__(self, batch): self.batch = batch
    def after_batch(self, learn):
        if learn.training and (learn.epoch, learn.batch_idx) == (2, self.batch): raise RuntimeError('stop')


def own_generator(seed): return get_dls(train_ds, valid_ds, 50, torch.Generator().manual_seed(seed))
def global_seed(seed): return get_dls(train_ds, valid_ds, 50)
def not_shuffled(seed): return DataLoader(train_ds, 50), None
def pytorchs(seed):
    load = torch.utils.data.DataLoader
    return load(train_ds, 50, shuffle=True), load(valid_ds, 100)
def pytorchs_own(seed):
    load = torch.utils.data.DataLoader
    return load(train_ds, 50, shuffle=True, generator=torch.Generator().manual_seed(seed)), None


class Noisy:
    "Examples with noise that is drawn in the worker processes"
    def __len__(self): return 100
    def __getitem__(self, i): return train_ds.x[i] + torch.rand(784), train_ds.y[i]
def workers(seed): return torch.utils.data.DataLoader(Noisy(), 20, shuffle=True, num_workers=2), None


def ours(): return Sequential(Linear(784, 8), ReLU(), Linear(8, 10))
def with_buffers(): return nn.Sequential(nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.3), nn.Linear(8, 10))
def tied():
    net = nn.Sequential(nn.Linear(784, 10), nn.ReLU(), nn.Linear(10, 10), nn.Linear(10, 10))
    net[3].weight = net[2].weight
    return net
def frozen():
    net = ours()
    net[0].requires_grad_(False)
    return net


def learner(net, dls, opt_func, seed, cbs=()):
    torch.manual_seed(seed)
    model = net()
    loss_func = CrossEntropyLoss() if isinstance(model, Sequential) else nn.functional.cross_entropy
    return Learner(model, dls(seed), loss_func, opt_func, .01, cbs)


def momentum(params, lr): return torch.optim.SGD(params, lr, momentum=.9, nesterov=True, weight_decay=.01)
def amsgrad(params, lr): return torch.optim.Adam(params, lr, amsgrad=True)
def last_bias_alone(params, lr):
    *rest, last = params
    return torch.optim.AdamW([{'params': rest}, {'params': [last], 'lr': lr*2}], lr)


def same_end(tmp_path, net, dls, opt_func, cbs=lambda: (), every=None, batch=3):
    "Stop, resume in a new learner from another seed: same weights and records as an uninterrupted run"
    unbroken = learner(net, dls, opt_func, 1, cbs())
    records = unbroken.fit(3, progress=False)
    with pytest.raises(RuntimeError, match='stop'):
        learner(net, dls, opt_func, 1, [*cbs(), CheckpointCB(tmp_path, every), Stop(batch)]).fit(3, progress=False)
    again = learner(net, dls, opt_func, 2, [*cbs(), CheckpointCB(tmp_path, every, resume=True)])
    got = again.fit(3, progress=False)
    for k, t in unbroken.model.state_dict().items(): assert torch.equal(again.model.state_dict()[k], t), k
    for a, b in zip(got, records, strict=True): assert {**a, 'seconds': 0} == {**b, 'seconds': 0}
    assert not list(tmp_path.glob('.checkpoint*'))
    return again


OPTIMISERS = SGD, momentum, torch.optim.Adam, amsgrad, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, last_bias_alone


@pytest.mark.parametrize('net', [ours, with_buffers])
@pytest.mark.parametrize('opt_func', OPTIMISERS)
def test_every_optimiser(tmp_path, net, opt_func): same_end(tmp_path, net, own_generator, opt_func, every=1)


@pytest.mark.parametrize('dls', [own_generator, global_seed, not_shuffled, pytorchs, pytorchs_own])
@pytest.mark.parametrize('every', [None, 2, 4])
def test_every_loader(tmp_path, dls, every): same_end(tmp_path, with_buffers, dls, momentum, every=every)


def test_noise_from_workers(tmp_path): same_end(tmp_path, with_buffers, workers, momentum, every=2)


@pytest.mark.parametrize('net', [tied, frozen])
def test_unusual_nets(tmp_path, net): same_end(tmp_path, net, own_generator, momentum, every=1)


def test_our_optimisers(tmp_path):
    optim = pytest.importorskip('miniai.optim')
    for name in 'Momentum', 'RMSprop', 'Adam', 'AdamW': same_end(tmp_path/name, ours, own_generator, getattr(optim, name), every=1)


@pytest.mark.parametrize('every', [1, 4])
def test_callbacks_with_a_state(tmp_path, every):
    callbacks, metrics, progress = (pytest.importorskip(f'miniai.{name}') for name in ('callbacks', 'metrics', 'progress'))
    make = {'accumulate': lambda: callbacks.AccumulateCB(2), 'clip': lambda: callbacks.GradClipCB(.5), 'record': progress.RecorderCB,
            'average': lambda: callbacks.EMACB(.9), 'measure': lambda: metrics.MetricsCB(metrics.Accuracy(), train=True),
            'stop': lambda: callbacks.EarlyStoppingCB(patience=1, min_delta=.2, restore_best=True)}
    for name, cb in make.items(): same_end(tmp_path/name, with_buffers, own_generator, momentum, lambda cb=cb: (cb(),), every=every)
    again = same_end(tmp_path/'all', with_buffers, own_generator, momentum, lambda: [cb() for cb in make.values()], every=every)
    assert any(isinstance(cb, progress.RecorderCB) for cb in again.cbs)


@pytest.mark.parametrize('every', [1, None])
def test_schedules(tmp_path, every):
    optim = pytest.importorskip('miniai.optim')
    makers = {'ours': lambda opt, steps: optim.OneCycleLR(opt, .1, steps),
              'theirs': lambda opt, steps: torch.optim.lr_scheduler.OneCycleLR(opt, .1, steps)}
    for name, make in makers.items():
        for opt_func in torch.optim.Adam, momentum:
            folder = tmp_path/f'{name}-{opt_func.__name__}'
            same_end(folder, ours, own_generator, opt_func, lambda make=make: (optim.SchedulerCB(make),), every=every)
    plateau = lambda opt, steps: optim.ReduceLROnPlateau(opt, patience=0, threshold=1.)
    same_end(tmp_path/'plateau', ours, own_generator, momentum, lambda: (optim.SchedulerCB(plateau, each='epoch'),), every=every)


def content(folder): return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(Path(folder).rglob('*')) if f.is_file()}


# ---- one checkpoint

@pytest.fixture
def trained(tmp_path):
    learn = learner(ours, own_generator, momentum, 1)
    learn.fit(1, progress=False)
    learn.save(tmp_path/'c')
    return learn


def test_weights_are_usable_on_their_own(tmp_path, trained):
    plain = nn.Sequential(nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10))
    plain.load_state_dict(load_weights(tmp_path/'c'))
    torch.testing.assert_close(plain(digits.test.x[:9]).detach(), trained.predict(digits.test.x[:9]))
    assert same(load_weights(str(tmp_path/'c')), load_file(tmp_path/'c'/'weights.safetensors'))
    twin = learner(lambda: nn.Sequential(nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10)), own_generator, momentum, 3)
    twin.load(tmp_path/'c')       # a checkpoint of our modules in a learner with PyTorch's
    torch.testing.assert_close(twin.predict(digits.test.x[:9]), trained.predict(digits.test.x[:9]))


def test_half_and_bfloat16(tmp_path):
    for dtype in torch.float16, torch.bfloat16, torch.float64:
        learn = learner(ours, own_generator, SGD, 1)
        learn.model = nn.Sequential(nn.Linear(3, 2)).to(dtype)
        save_checkpoint(learn, tmp_path/str(dtype))
        assert read_checkpoint(tmp_path/str(dtype)).weights['0.weight'].dtype == dtype


def test_shared_and_transposed_weights(tmp_path):
    learn = Learner(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)), (train_ds, None), nn.functional.mse_loss, lr=.1)
    learn.model[1].weight = learn.model[0].weight
    learn.model[2].weight.data = torch.arange(4.).view(2, 2).T
    assert learn.save(str(tmp_path/'c')) == tmp_path/'c'                              # before the first fit, too
    torch.testing.assert_close(read_checkpoint(tmp_path/'c').weights, dict(learn.model.state_dict()), rtol=0, atol=0)


def test_checksums_are_those_of_sha256sum(tmp_path, trained):
    import hashlib
    files = content(tmp_path/'c')
    lines = files.pop('SHA256SUMS').decode().splitlines()
    assert sorted(files) == ['manifest.json', 'state.safetensors', 'weights.safetensors']
    assert sorted(lines) == sorted(f'{hashlib.sha256(data).hexdigest()}  {name}' for name, data in files.items())


@pytest.mark.parametrize('name', ['manifest.json', 'state.safetensors', 'weights.safetensors', 'SHA256SUMS'])
def test_every_damage_is_found(tmp_path, trained, name):
    path, dice = tmp_path/'c'/name, random.Random(0)
    data = path.read_bytes()
    flips = [(dice.randrange(len(data)), 1 << dice.randrange(8)) for _ in range(40)]
    flipped = [data[:i] + bytes([data[i] ^ k]) + data[i + 1:] for i, k in flips]
    for hurt in (b'', data[:-1], data[:len(data)//2], data + b'x', b'\xff'*9, *flipped):
        path.write_bytes(hurt)
        if name == 'SHA256SUMS' and hurt == data + b'x': continue                     # one line more does no harm
        with pytest.raises(Damaged, match=f'^{tmp_path}'): read_checkpoint(tmp_path/'c')
    path.unlink()
    with pytest.raises(Damaged, match=name): read_checkpoint(tmp_path/'c')


def seal(folder): write_checksums(folder, ['weights.safetensors', 'state.safetensors', 'manifest.json'])


@pytest.mark.parametrize('change', [{'format': 'another tool'}, {'version': 1}, {'version': 3}])
def test_a_foreign_format_is_not_called_damaged(tmp_path, trained, change):
    path = tmp_path/'c/manifest.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    seal(tmp_path/'c')
    with pytest.raises(ValueError, match='format and version are') as e: read_checkpoint(tmp_path/'c')
    assert e.type is ValueError
    for path in tmp_path/'nothing', tmp_path/'c/manifest.json':
        with pytest.raises(FileNotFoundError, match='no such folder'): read_checkpoint(path)


class Surprise:
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


@pytest.mark.parametrize('name', ['manifest.json', 'state.safetensors', 'weights.safetensors'])
def test_a_pickle_with_right_checksums_does_not_run(tmp_path, trained, name):
    torch.save(Surprise(tmp_path/'ran'), tmp_path/'c'/name)
    seal(tmp_path/'c')
    with pytest.raises(Exception): read_checkpoint(tmp_path/'c')                      # noqa: B017
    assert not (tmp_path/'ran').exists()


def test_an_existing_folder_is_replaced_only_on_demand(tmp_path, trained):
    old = content(tmp_path/'c')
    with pytest.raises(FileExistsError, match='c already exists; choose another folder, or overwrite=True'): trained.save(tmp_path/'c')
    trained.fit(1, progress=False)
    trained.save(tmp_path/'c', overwrite=True)
    assert content(tmp_path/'c') != old and [p.name for p in tmp_path.iterdir()] == ['c']
    assert same(read_checkpoint(tmp_path/'c').weights, dict(trained.model.state_dict()))
    trained.save(tmp_path/'new', overwrite=True)
    (tmp_path/'c/thesis.txt').touch()
    with pytest.raises(FileExistsError): trained.save(tmp_path/'c', overwrite=True)
    (tmp_path/'file').touch()
    with pytest.raises(OSError): trained.save(tmp_path/'file', overwrite=True)


def test_the_manifest_does_not_grow_with_the_steps(tmp_path):
    sizes = []
    class Save(Callback):
        def after_batch(self, learn):
            if not learn.training: return
            learn.save(tmp_path/'c', overwrite=True)
            sizes.append((tmp_path/'c/manifest.json').stat().st_size)
    Learner(nn.Linear(784, 10), get_dls(train_ds, valid_ds, 3), nn.functional.cross_entropy, lr=.1, cbs=[Save()]).fit(1, progress=False)
    assert len(sizes) == 100 and max(sizes) - min(sizes) < 30, (sizes[0], sizes[-1])


def test_saving_takes_no_memory(tmp_path):
    "A state of 276 MB: less than 30 MB on top"
    code = '''
import resource, sys, torch
from torch import nn
from miniai.learner import Learner
import miniai.checkpoints, safetensors.torch
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024
x = torch.randn(4, 4800)
net = nn.Sequential(nn.Linear(4800, 4800, bias=False))
learn = Learner(net, ([(x, x)], None), nn.functional.mse_loss, lambda p, lr: torch.optim.Adam(p, lr=lr), lr=1e-4)
learn.fit(1, progress=False)
before = peak()
learn.save(sys.argv[1])
print(peak() - before)'''
    done = subprocess.run([sys.executable, '-c', code, tmp_path/'c'], env=ENV, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30


# ---- learners that do not fit

def everything(learn):
    own = [cb.state_dict() for cb in learn.cbs]
    return copy.deepcopy([dict(learn.model.state_dict()), learn.opt.state_dict(), learn.state_dict(), own, learn.steps])


def does_not_fit(learn, path, message, resume=False):
    "The error, and a learner that is as before"
    learn.create_opt()
    learn.epochs = 9
    before = everything(learn)
    with pytest.raises(ValueError, match=re.escape(f'{path} does not fit: {message}')): load_checkpoint(learn, path, resume)
    assert same(everything(learn), before)


def test_another_model(tmp_path, trained):
    def with_model(net):
        learn = learner(ours, own_generator, momentum, 1)
        learn.model = net
        return learn
    net = ours()
    does_not_fit(with_model(Sequential(Linear(784, 9), ReLU(), Linear(9, 10))), tmp_path/'c',
                 '0.weight is torch.float32 (8, 784), here it is torch.float32 (9, 784); 0.bias is torch.float32 (8,), here')
    does_not_fit(with_model(Sequential(Linear(784, 8).double(), *net[1:])), tmp_path/'c',
                 '0.weight is torch.float32 (8, 784), here it is torch.float64 (8, 784); 0.bias')
    does_not_fit(with_model(nn.Sequential(*net[:2])), tmp_path/'c', '2.weight is torch.float32 (10, 8), here it is absent')
    wider = nn.Sequential(*net, nn.Linear(10, 2))
    does_not_fit(with_model(wider), tmp_path/'c', 'the optimiser is SGD with groups of [4] parameters, here it is SGD with groups '
                 'of [6] parameters; 3.weight is absent, here it is torch.float32 (2, 10)')
    learn = with_model(nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)]))
    with pytest.raises(ValueError, match='; and [0-9]+ more$'): learn.load(tmp_path/'c')


def test_another_optimiser_and_other_loaders(tmp_path, trained):
    does_not_fit(learner(ours, own_generator, torch.optim.Adam, 1), tmp_path/'c',
                 'the optimiser is SGD with groups of [4] parameters, here it is Adam with groups of [4] parameters')
    split = lambda params, lr: torch.optim.SGD([{'params': [p]} for p in params], lr=lr, momentum=.9)
    does_not_fit(learner(ours, own_generator, split, 1), tmp_path/'c',
                 'the optimiser is SGD with groups of [4] parameters, here it is SGD with groups of [1, 1, 1, 1] parameters')
    training, validation = 'the training loader is 6 batches of 300 examples', 'the validation loader is 1 batches of 100 examples'
    for dls, message in (((train_ds, valid_ds, 100), f'{training}, here it is 3 batches of 300'),
                         ((Dataset(*train_ds[:299]), valid_ds, 50), f'{training}, here it is 6 batches of 299'),
                         ((train_ds, Dataset(*valid_ds[:99]), 50), f'{validation}, here it is 1 batches of 99')):
        make = lambda seed, dls=dls: get_dls(*dls)
        does_not_fit(learner(ours, make, momentum, 1), tmp_path/'c', message, resume=True)
        learner(ours, make, momentum, 1).load(tmp_path/'c')                            # a new fit may use other loaders


def test_loaders_without_a_length(tmp_path):
    batches = [train_ds[:5]]
    learn = Learner(nn.Linear(784, 10), ((b for b in batches), None), nn.functional.cross_entropy, lr=.1)
    learn.save(tmp_path/'c')
    assert read_checkpoint(tmp_path/'c').state['run']['the training loader'] == '-1 batches of -1 examples'
    learn.load(tmp_path/'c')


class Count(Callback):
    "A callback with a state; a learner may have several"
    def __init__(self, n): self.n = n
    def state_dict(self): return {'n': self.n}
    def load_state_dict(self, state_dict): self.n = state_dict['n']


class Load(Callback):
    order = 100
    def __init__(self, path): self.path = path
    def before_fit(self, learn): load_checkpoint(learn, self.path, resume=True)


def test_several_callbacks_of_one_class(tmp_path):
    class Save(Callback):
        order = 100
        def after_epoch(self, learn): learn.save(tmp_path/'c')
    learner(ours, own_generator, momentum, 1, [Count(5), Count(6), Save()]).fit(1, cbs=[Count(7)], progress=False)
    saved = read_checkpoint(tmp_path/'c').state['callbacks']
    assert saved == {'Count': {'n': 5}, 'Count 2': {'n': 6}, 'Count 3': {'n': 7}, 'Save': {}}
    cbs = [Count(0) for _ in range(4)]
    learner(ours, own_generator, momentum, 9).fit(1, cbs=[Load(tmp_path/'c'), *cbs], progress=False)
    assert [cb.n for cb in cbs] == [5, 6, 7, 0]                                       # the fourth one is new and keeps its state
    less = learner(ours, own_generator, momentum, 9)
    with pytest.raises(ValueError, match='the state of Count 3 would be lost; add the callback'):
        less.fit(1, cbs=[Load(tmp_path/'c'), *cbs[:2]], progress=False)
    does_not_fit(learner(ours, own_generator, momentum, 9), tmp_path/'c', 'the state of Count, Count 2, Count 3 would be lost', resume=True)


def test_loading_starts_a_new_fit_with_the_old_momentum(tmp_path, trained):
    other, third = (learner(ours, own_generator, momentum, 9) for _ in range(2))
    other.load(tmp_path/'c')
    assert other.steps == 6 and other.records == [] and same(other.opt.state_dict(), trained.opt.state_dict())
    third.model.load_state_dict(load_weights(tmp_path/'c'))
    for learn in trained, other, third:
        torch.manual_seed(4)
        learn.train_dl.batch_sampler.generator.manual_seed(5)
        assert len(learn.fit(2, progress=False)) == 2
    assert same(other.model.state_dict(), trained.model.state_dict()) and not same(third.model.state_dict(), trained.model.state_dict())


def test_load_needs_no_fit_and_keeps_the_generators(tmp_path, trained):
    before = torch.get_rng_state()
    load_checkpoint(trained, tmp_path/'c')
    load_checkpoint(trained, read_checkpoint(tmp_path/'c'))
    assert torch.equal(torch.get_rng_state(), before)


# ---- the checkpoints of a run

def newest(folder):
    "The newest one, and the warnings"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        return newest_checkpoint(folder), [str(w.message) for w in warned]


def test_the_newest_intact_one(tmp_path, trained):
    run = tmp_path/'run'
    assert (list_checkpoints(run), newest_checkpoint(run)) == ([], None)
    for name in 'checkpoint-9', 'checkpoint-000010', 'checkpoint-8', 'checkpoint-x', 'other', '.checkpoint-11.77.part':
        trained.save(run/name)
    (run/'checkpoint-12').touch()                                                     # a file is no checkpoint
    assert [p.name for p in list_checkpoints(str(run))] == ['checkpoint-8', 'checkpoint-9', 'checkpoint-000010']
    assert newest(run) == (run/'checkpoint-000010', [])
    (run/'checkpoint-000010/state.safetensors').write_bytes(b'')
    path, warned = newest(str(run))
    assert path == run/'checkpoint-9' and len(warned) == 1
    assert f'using {run}/checkpoint-9; newer' in warned[0] and 'checkpoint-000010: state.safetensors is damaged' in warned[0]
    for name in '8', '9': (run/f'checkpoint-{name}/weights.safetensors').unlink()
    with pytest.raises(ValueError, match=f'all checkpoints in {run} are damaged: .*10: state.*8: .*weights'): newest_checkpoint(run)
    trained.save(run/'checkpoint-13')
    path = run/'checkpoint-13/manifest.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'version': 7}))
    seal(path.parent)
    with pytest.raises(ValueError, match='version are .* 7'): newest_checkpoint(run)   # too new is not damaged: no older one is used


def test_checkpoints_are_read_once(tmp_path, monkeypatch):
    start(tmp_path, epochs=1)
    read, real = [], checkpoints.verify_files
    monkeypatch.setattr(checkpoints, 'verify_files', lambda *args: (read.append(args[0].name), real(*args)))
    start(tmp_path, epochs=2)
    assert read == ['checkpoint-000001']


# ---- resuming

def start(folder, seed=1, epochs=2, cbs=(), net=with_buffers, resume=True, **kwargs):
    "The work of a script, started or restarted"
    learn = learner(net, own_generator, momentum, seed, [*cbs, CheckpointCB(folder, resume=resume, **kwargs)])
    return learn, without_seconds(learn.fit(epochs, progress=False))


def without_seconds(records): return [{k: v for k, v in r.items() if k != 'seconds'} for r in records]


def unbroken(epochs=2, net=with_buffers, cbs=()):
    learn = learner(net, own_generator, momentum, 1, cbs)
    return learn, without_seconds(learn.fit(epochs, progress=False))


def same_run(a, b):
    (learn, records), (other, others) = a, b
    assert same(dict(learn.model.state_dict()), dict(other.model.state_dict())) and records == others


def kept(folder): return [int(p.name.split('-')[1]) for p in list_checkpoints(folder)]


def positions(folder):
    found = [read_checkpoint(p).manifest for p in list_checkpoints(folder)]
    return [(m['epochs_done'], m['batches_done']) for m in found]


@pytest.mark.parametrize('net', [ours, with_buffers])
@pytest.mark.parametrize('kwargs, numbers', [(dict(), [1, 2]), (dict(every=4), [2, 3, 4]), (dict(every=np.int64(4), keep=1), [4]),
                                             (dict(every=1, keep=100), [*range(1, 14)])])
def test_saving_does_not_change_the_run(tmp_path, kwargs, numbers, net):
    handler = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = start(tmp_path, net=net, **kwargs)
    same_run(run, unbroken(net=net))
    assert kept(tmp_path) == numbers and (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handler
    assert same(load_weights(list_checkpoints(tmp_path)[-1]), dict(run[0].model.state_dict()))


def test_every_checkpoint_can_be_resumed(tmp_path):
    start(tmp_path/'run', every=1, keep=100)
    right = unbroken()
    for path in list_checkpoints(tmp_path/'run'):
        number, at = int(path.name.split('-')[1]), tmp_path/f'from-{path.name}'
        path.rename(tmp_path/'c')
        at.mkdir(parents=True)
        (tmp_path/'c').rename(at/path.name)
        run = start(at, 9, every=1000)
        same_run(run, right)
        assert kept(at) == ([13] if number == 13 else [number, number + 1]) and run[0].cbs[0].batches == 12


def test_arguments():
    for kwargs in dict(every=0), dict(every=2.5), dict(keep=0), dict(keep=None), dict(every='3'):
        (name, value), = kwargs.items()
        with pytest.raises(ValueError, match=f'CheckpointCB: {name} is {value!r}, must be an integer'): CheckpointCB('x', **kwargs)
    for kwargs in dict(keep_best='f1'), dict(keep_best='valid_loss', mode='smallest'):
        with pytest.raises(ValueError, match="CheckpointCB: mode is .*, must be 'min' if a smaller"): CheckpointCB('x', **kwargs)
    assert [CheckpointCB('x', keep_best=k, mode=m).mode for k, m in
            (('valid_loss', None), ('valid_accuracy', None), ('f1', 'max'), ('valid_loss', 'max'))] == ['min', 'max', 'max', 'max']
    assert CheckpointCB('x', every=1, keep=1).folder == Path('x')


def test_a_folder_with_checkpoints(tmp_path):
    start(tmp_path)
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match='already has checkpoints; set resume=True'): start(tmp_path, resume=False)
    with pytest.raises(ValueError, match='002 does not fit: it is from epoch 2, but this fit ends with epoch 1'): start(tmp_path, epochs=1)
    with lock_folder(tmp_path), pytest.raises(BlockingIOError, match='in use by another run'): start(tmp_path)
    (tmp_path/'.checkpoint-000003.99.part').mkdir()
    (tmp_path/'.checkpoint-000003.99.part/weights.safetensors').touch()               # temporary files of a killed process
    same_run(start(tmp_path, 9), unbroken())                                          # nothing is left to do
    assert content(tmp_path) == before
    same_run(start(tmp_path, 9, epochs=3), unbroken(3))                               # one epoch more


def test_resume_by_hand(tmp_path):
    learn = learner(ours, own_generator, momentum, 1)
    assert learn.resume(tmp_path/'nothing') is None
    with pytest.raises(RuntimeError): start(tmp_path, net=ours, every=4, cbs=[Crash(1, 2, 3)])
    for cbs in [], [CheckpointCB(tmp_path)]:                                          # with CheckpointCB and without
        learn = learner(ours, own_generator, momentum, 9, cbs)
        path = learn.resume(tmp_path)
        assert path == list_checkpoints(tmp_path)[-1] and same(load_weights(path), dict(learn.model.state_dict()))
        learn.evaluate()                                                              # evaluating in between changes nothing
        run = learn, without_seconds(learn.fit(2, progress=False))
        same_run(run, unbroken(net=ours))
        assert len(learn.cbs) == len(cbs)
        if not cbs: assert len(learn.fit(1, progress=False)) == 1                     # the fit after that is a new one
    learn = learner(ours, own_generator, momentum, 9)
    learn.resume(tmp_path)
    with pytest.raises(ValueError, match='is from epoch 2, but this fit ends with epoch 1; fit more epochs'): learn.fit(1, progress=False)


class Crash(Callback):
    "Raises an error in a chosen batch"
    fits = 0
    def __init__(self, fit, epoch, batch): self.at = fit, epoch, batch
    def before_fit(self, learn): self.fits += 1
    def before_backward(self, learn):
        if (self.fits, learn.epoch, learn.batch_idx) == self.at: raise RuntimeError('crash')


def two_fits(learn): return [without_seconds(learn.fit(2, progress=False)), without_seconds(learn.fit(2, lr=.005, progress=False))]


@pytest.mark.parametrize('at', [(1, 1, 5), (1, 2, 5), (2, 1, 0), (2, 2, 2)])
def test_a_script_with_two_fits(tmp_path, at):
    right = learner(with_buffers, own_generator, momentum, 1)
    records = two_fits(right)
    with pytest.raises(RuntimeError): two_fits(learner(with_buffers, own_generator, momentum, 1, [CheckpointCB(tmp_path, 4), Crash(*at)]))
    again = learner(with_buffers, own_generator, momentum, 9, [CheckpointCB(tmp_path, 4, resume=True)])
    same_run((again, two_fits(again)), (right, records))
    assert [len(r) for r in again.cbs[0].fits] == [2, 2]


@pytest.mark.parametrize('resume', [True, False])
def test_the_same_learner_after_an_error(tmp_path, resume):
    class Once(Callback):
        def before_step(self, learn):
            if learn.steps == 8:
                learn.cbs.remove(self)
                raise RuntimeError('once')
    learn = learner(with_buffers, own_generator, momentum, 1, [CheckpointCB(tmp_path, 4, resume=resume), Once()])
    with pytest.raises(RuntimeError): learn.fit(2, progress=False)
    records = without_seconds(learn.fit(2, progress=False))
    assert len(records) == 2 and len(learn.cbs[0].fits) == 1
    if resume: same_run((learn, records), unbroken())
    else: assert records != unbroken()[1]                                             # a new fit


@pytest.mark.parametrize('pixels', [True, False])
def test_nothing_that_is_not_finite_is_saved(tmp_path, pixels):
    class Poison(Callback):
        def before_batch(self, learn):
            if learn.training and learn.steps == 4 and pixels: learn.batch = learn.xb*torch.nan, learn.yb
        def after_backward(self, learn):
            if learn.steps == 4 and not pixels: learn.loss = learn.loss*torch.nan
    with pytest.raises(FloatingPointError, match='not finite, so nothing was saved; earlier'): start(tmp_path, every=3, cbs=[Poison()])
    assert all(t.isfinite().all() for path in list_checkpoints(tmp_path) for t in load_weights(path).values())
    same_run(start(tmp_path, 9), unbroken())


def test_validating_writes_nothing(tmp_path):
    learn = learner(ours, own_generator, momentum, 1, [CheckpointCB(tmp_path/'run')])
    assert len(learn.fit(1, train=False, progress=False)) == 1 and list(learn.evaluate()) == ['loss'] and not (tmp_path/'run').exists()


@pytest.mark.parametrize('cancel', [CancelBatch, CancelStep])
def test_batches_without_a_step(tmp_path, cancel):
    class Skip(Callback):
        def before_step(self, learn):
            if learn.batch_idx == 3: raise cancel
    same_run(start(tmp_path, every=1, cbs=[Skip()]), unbroken(cbs=[Skip()]))
    assert read_checkpoint(newest_checkpoint(tmp_path)).manifest['steps'] == 10


# ---- how a fit ends, and what is kept

class EndAt(Callback):
    "Ends the fit early, at an event of the second epoch"
    def __init__(self, event, batch=0):
        def end(learn):
            if learn.epoch == 2 and learn.batch_idx == batch and (learn.training or 'batch' not in event): raise CancelFit
        setattr(self, event, end)


@pytest.mark.parametrize('event, batch, position', [('after_epoch', 0, (2, 0)), ('after_batch', 2, (1, 3)), ('before_epoch', 0, (1, 0))])
@pytest.mark.parametrize('every', [None, 5])
def test_the_newest_checkpoint_holds_the_final_weights(tmp_path, event, batch, position, every):
    learn, _ = start(tmp_path, epochs=5, every=every, cbs=[EndAt(event, batch)])
    assert positions(tmp_path)[-1] == position and len(learn.cbs[1].fits) == 1
    assert same(load_weights(newest_checkpoint(tmp_path)), dict(learn.model.state_dict()))


@pytest.mark.parametrize('event', ['before_step', 'before_validate'])
def test_the_middle_of_a_batch_or_pass_is_not_saved(tmp_path, event):
    "No run could be resumed there: the checkpoint from before stays"
    start(tmp_path, epochs=3, cbs=[EndAt(event)])
    assert positions(tmp_path) == [(1, 0)]
    same_run(start(tmp_path, 9, epochs=3), unbroken(3))


def test_early_end_and_extension(tmp_path):
    learn, records = start(tmp_path, epochs=5, cbs=[EndAt('after_epoch')])
    assert len(records) == 2
    again, records = start(tmp_path, 2, epochs=3)
    assert [r['epoch'] for r in records] == [1, 2, 3]
    with pytest.raises(ValueError, match='is from epoch 3, but this fit ends with epoch 2'): start(tmp_path, 2, epochs=2)


def test_early_stopping(tmp_path):
    callbacks = pytest.importorskip('miniai.callbacks')
    def run(seed): return start(tmp_path, seed, 5, [callbacks.EarlyStoppingCB(patience=1, min_delta=10., restore_best=True)])
    learn, records = run(1)
    assert len(records) == 2 and positions(tmp_path)[-1] == (2, 0)
    best = unbroken(1)[0].model.state_dict()                                          # nothing was better than the first epoch
    assert same(load_weights(newest_checkpoint(tmp_path)), dict(best)) and same(dict(learn.model.state_dict()), dict(best))
    files = content(tmp_path)
    again, others = run(2)                                                            # nothing is left to do
    assert others == records and again.steps > 0 and same(dict(again.model.state_dict()), dict(best)) and content(tmp_path) == files


@pytest.mark.parametrize('net', [ours, with_buffers])
def test_the_average_is_what_is_saved(tmp_path, net):
    callbacks = pytest.importorskip('miniai.callbacks')
    cbs = lambda: [callbacks.EMACB(.9)]
    class Scores(Callback):
        order = 100
        found = None
        def after_batch(self, learn):
            if learn.training and learn.epoch == 2 and learn.batch_idx == 1: self.found = learn.predict(digits.test.x[:9])
    right = unbroken(3, net, cbs())
    start(tmp_path/'early', net=net, cbs=cbs())
    same_run(start(tmp_path/'early', 9, 3, cbs(), net), right)                        # an epoch more: continues from the training weights
    with pytest.raises(RuntimeError): start(tmp_path/'run', epochs=3, every=1, cbs=[*cbs(), scores := Scores(), Crash(1, 2, 2)], net=net)
    model = net()
    model.load_state_dict(load_weights(newest_checkpoint(tmp_path/'run')))
    torch.testing.assert_close(model.eval()(digits.test.x[:9]).detach(), scores.found)
    same_run(start(tmp_path/'run', 9, 3, cbs(), net), right)


class Made(Callback):
    "Made-up entries of the record"
    def __init__(self, name, values): self.name, self.values = name, values
    def after_validate(self, learn): learn.record[self.name] = self.values[learn.epoch - 1]


NAN = float('nan')
@pytest.mark.parametrize('values, mode, best', [((.9, .5, .6, .5, .7), 'min', 2), ((.9, .5, .6, .9, .7), 'max', 1), ((NAN,)*5, 'min', None),
                                                ((.1, .2, .3, .4, .5), 'max', 5), ((NAN, .5, NAN, .6, .7), 'min', 2)])
@pytest.mark.parametrize('every', [None, 4])
def test_the_best_one_is_kept(tmp_path, values, mode, best, every):
    kwargs = dict(keep_best='f1', mode=mode, keep=1, every=every)
    with pytest.raises(RuntimeError): start(tmp_path, epochs=5, cbs=[Made('f1', values), Crash(1, 4, 0)], **kwargs)
    learn, _ = start(tmp_path, 9, 5, [Made('f1', values)], **kwargs)
    path = newest_checkpoint(tmp_path, best=True)
    if best is None:
        assert path is None and len(kept(tmp_path)) == 1
        return
    assert (learn.cbs[1].best, learn.cbs[1].best_value) == (path.name, values[best - 1])
    assert read_checkpoint(path).manifest['epochs_done'] == best
    assert 1 <= len(kept(tmp_path)) <= 2 and newest_checkpoint(tmp_path) == list_checkpoints(tmp_path)[-1]


def test_two_folders_for_one_run(tmp_path):
    class MyOwn(CheckpointCB): "A subclass"
    def make(seed, values, epochs):
        few = MyOwn(tmp_path/'few', 9, 1, resume=True, keep_best='f1', mode='max')
        cbs = [Made('f1', values), CheckpointCB(tmp_path/'all', keep=9, resume=True), few]
        return learner(with_buffers, own_generator, momentum, seed, cbs).fit(epochs, progress=False)
    make(1, (2, 3, 1), 3)
    make(9, (2, 3, 1, 0), 4)
    assert newest_checkpoint(tmp_path/'all', best=True) is None and kept(tmp_path/'all') == [1, 2, 3, 4]
    assert read_checkpoint(newest_checkpoint(tmp_path/'few', best=True)).manifest['epochs_done'] == 2


def test_a_best_one_that_is_gone_and_an_entry_that_is_missing(tmp_path):
    start(tmp_path, 1, 3, [Made('f1', (3, 2, 1))], keep_best='f1', mode='max', keep=1)
    for path in list_checkpoints(tmp_path)[:-1]: path.rename(tmp_path/'moved')
    learn, _ = start(tmp_path, 9, 4, [Made('f1', (3, 2, 1, 0))], keep_best='f1', mode='max', keep=1)
    assert learn.cbs[1].best_value == 0
    with pytest.raises(KeyError, match='f1'): start(tmp_path/'new', keep_best='f1', mode='max')
    start(tmp_path/'plain')
    assert newest_checkpoint(tmp_path/'plain', best=True) is None and newest_checkpoint(tmp_path/'none', best=True) is None


def test_persistent_workers_are_not_resumed(tmp_path):
    dl = torch.utils.data.DataLoader(train_ds, 50, shuffle=True, num_workers=1, persistent_workers=True)
    learn = Learner(nn.Linear(784, 10), (dl, None), nn.functional.cross_entropy, lr=.1, cbs=[CheckpointCB(tmp_path/'run')])
    with pytest.raises(ValueError, match='use persistent_workers=False'): learn.fit(1, progress=False)
    assert learn.steps == 0 and not (tmp_path/'run').exists()


# ---- signals

class Press(Callback):
    "A signal, once or twice, at an event of the second epoch"
    def __init__(self, event, batch=None, times=1, number=signal.SIGINT):
        def press(learn):
            if learn.epoch == 2 and batch in (None, learn.batch_idx):
                for _ in range(times): signal.raise_signal(number)
        setattr(self, event, press)


IN_BATCH, IN_VALIDATION = 'epoch 2, training batch 2 (counted from 0)', 'epoch 2, validation batch 0 (counted from 0)'


@pytest.mark.parametrize('event, batch, kwargs, said, numbers', [
    ('after_get_loss', 2, {}, f'stopped after {IN_BATCH}, saved in AT/checkpoint-000002', [1, 2]),
    ('after_get_loss', 2, {'every': 9}, f'stopped after {IN_BATCH}, saved in AT/checkpoint-000001', [1]),
    ('before_validate', None, {}, f'stopped after {IN_VALIDATION}, saved in AT/checkpoint-000002', [1, 2]),
    ('before_validate', None, {'every': 5}, f'stopped after {IN_VALIDATION}, saved in AT/checkpoint-000003', [1, 2, 3]),
    ('after_fit', None, {}, 'stopped at the end of the fit', [1, 2])])
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_and_saves(tmp_path, event, batch, kwargs, said, numbers, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises((KeyboardInterrupt, SystemExit)) as e: start(tmp_path, cbs=[Press(event, batch, number=number)], **kwargs)
    if number == signal.SIGINT: assert e.type is KeyboardInterrupt and str(e.value).replace(str(tmp_path), 'AT') == said
    else: assert e.type is SystemExit and e.value.code == 143
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers and kept(tmp_path) == numbers
    same_run(start(tmp_path, 9), unbroken())


def test_a_second_ctrl_c_acts_at_once_a_second_sigterm_does_not(tmp_path):
    with pytest.raises(KeyboardInterrupt) as e: start(tmp_path/'int', cbs=[Press('after_forward', 2, times=2)])
    assert not str(e.value) and kept(tmp_path/'int') == [1]
    with pytest.raises(SystemExit): start(tmp_path/'term', cbs=[Press('after_forward', 2, times=2, number=signal.SIGTERM)])
    assert positions(tmp_path/'term') == [(1, 0), (1, 3)]
    for at in 'int', 'term': same_run(start(tmp_path/at, 9), unbroken())


def test_after_fit_runs_after_ctrl_c(tmp_path):
    ended = []
    class End(Callback):
        def after_fit(self, learn): ended.append(learn.epochs_done)
    with pytest.raises(KeyboardInterrupt): start(tmp_path, cbs=[Press('after_get_loss', 2), End()])
    assert ended == [1]
    with pytest.raises(KeyboardInterrupt): start(tmp_path/'new', cbs=[Press('after_get_loss', 2)])
    learn = learner(with_buffers, own_generator, momentum, 1, [CheckpointCB(tmp_path/'same', resume=True)])
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[Press('after_get_loss', 2)], progress=False)
    same_run((learn, without_seconds(learn.fit(2, progress=False))), unbroken())      # the same learner, as in a notebook


def test_the_programs_own_handler_is_called(tmp_path):
    class Told(Exception): pass
    def tell(number, frame): raise Told(number)
    before = signal.signal(signal.SIGTERM, tell)
    try:
        with pytest.raises(Told): start(tmp_path, cbs=[Press('after_get_loss', 2, number=signal.SIGTERM)])
        assert positions(tmp_path)[-1] == (1, 3) and signal.getsignal(signal.SIGTERM) is tell
    finally: signal.signal(signal.SIGTERM, before)


def test_threads_and_ignored_signals(tmp_path):
    done, before = [], signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: done.append(start(tmp_path/'thread')))
    thread.start()
    thread.join()
    assert len(done) == 1 and kept(tmp_path/'thread') == [1, 2]                       # saves, but handles no signals
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)                                  # a background job that ignores Ctrl-C
        assert len(start(tmp_path/'deaf', cbs=[Press('after_batch', 2)])[1]) == 2 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally: signal.signal(signal.SIGINT, before)


def test_errors_of_workers_without_a_signal_stay_errors(tmp_path):
    class Lost(Callback):
        def before_batch(self, learn): raise RuntimeError('DataLoader worker (pid 1) exited unexpectedly')
    with pytest.raises(RuntimeError, match='DataLoader worker'): start(tmp_path, cbs=[Lost()])


WORKERS = '''
import sys, time, torch
from torch import nn
from torch.utils.data import DataLoader
from miniai.checkpoints import CheckpointCB
from miniai.learner import Callback, Learner
class Slow:
    def __len__(self): return 400
    def __getitem__(self, i): time.sleep(.02); return torch.ones(3)*i/400, torch.ones(1)*i
class Say(Callback):
    def after_batch(self, learn): print('batch', flush=True)
if __name__ == '__main__':
    dl = DataLoader(Slow(), 10, num_workers=1, multiprocessing_context='spawn')
    Learner(nn.Linear(3, 1), (dl, None), nn.functional.mse_loss, lr=.01, cbs=[Say(), CheckpointCB('run')]).fit(20, progress=False)
'''


@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='no process groups')
@pytest.mark.parametrize('number, status', [(signal.SIGINT, (-signal.SIGINT, 130)), (signal.SIGTERM, (143,))])
def test_spawned_workers_die_of_the_signal(tmp_path, number, status):
    "A terminal or a cluster sends the signal to all processes of a run"
    (tmp_path/'script.py').write_text(WORKERS)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p = subprocess.Popen([sys.executable, 'script.py'], cwd=tmp_path, env=ENV, process_group=0, **pipes)
    for _ in range(3): p.stdout.readline()
    os.killpg(p.pid, number)
    out, err = p.communicate(timeout=60)
    assert p.returncode in status, err
    (epochs, batches), = positions(tmp_path/'run')
    assert epochs == 0 and 3 <= batches <= 8


# ---- strange disks

@contextmanager
def disk(folder, options):
    "A small disk in memory, if mounting is allowed"
    folder.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder], capture_output=True)
    if mounted.returncode: pytest.skip('may not mount a disk')
    try: yield folder
    finally: subprocess.run(['umount', folder], check=True)


def test_full_disk(tmp_path):
    with disk(tmp_path/'disk', 'size=256k') as folder:
        learn = learner(ours, own_generator, torch.optim.Adam, 1, [CheckpointCB(folder/'run', every=1)])
        message = 'could not save in .*No space left.*the last good checkpoint is .*checkpoint-00000'
        with pytest.raises(OSError, match=message) as e: learn.fit(2, progress=False)
        last = list_checkpoints(folder/'run')[-1]
        assert str(last) in str(e.value) and newest_checkpoint(folder/'run') == last and not list((folder/'run').glob('.checkpoint*'))
        subprocess.run(['mount', '-o', 'remount,size=4m', folder], check=True)
        again = learner(ours, own_generator, torch.optim.Adam, 2, [CheckpointCB(folder/'run', every=1, resume=True)])
        again.fit(2, progress=False)
    right = learner(ours, own_generator, torch.optim.Adam, 1)
    right.fit(2, progress=False)
    torch.testing.assert_close(again.model.state_dict(), right.model.state_dict(), rtol=0, atol=0)


def test_files_of_limited_size(tmp_path):
    learn = learner(ours, own_generator, torch.optim.Adam, 1, [CheckpointCB(tmp_path/'run', every=5)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(OSError, match='there is no checkpoint yet'): learn.fit(1, progress=False)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path/'run').iterdir()] == ['.lock']


@pytest.mark.parametrize('good', [0, 2, 3, 7])
def test_a_disk_that_fails_at_some_file(tmp_path, monkeypatch, good):
    "Four files and two folders are synced per checkpoint: the error comes after `good` of them, and the last good checkpoint stays"
    calls, fsync = [], os.fsync
    def failing(fd):
        calls.append(fd)
        if len(calls) > good: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)
    monkeypatch.setattr(os, 'fsync', failing)
    with pytest.raises(OSError, match='could not save in .*No space left') as e: start(tmp_path, keep=1)
    monkeypatch.undo()
    number = good//6
    assert ('there is no checkpoint yet' in str(e.value)) == (number == 0) and kept(tmp_path) == [1][:number]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock', 'checkpoint-000001'][:1 + number]
    same_run(start(tmp_path, 9 if number else 1), unbroken())


def test_read_only_disk(tmp_path):
    with disk(tmp_path/'disk', 'size=4m') as folder:
        learn = learner(ours, own_generator, SGD, 1, [CheckpointCB(folder/'run')])
        learn.fit(1, progress=False)
        subprocess.run(['mount', '-o', 'remount,ro', folder], check=True)
        again = learner(ours, own_generator, SGD, 1, [CheckpointCB(folder/'run', resume=True)])
        with pytest.raises(OSError, match='Read-only file system: .*run'): again.fit(2, progress=False)
        again.load(folder/'run'/'checkpoint-000001')      # reading works
        with pytest.raises(OSError, match='Read-only file system'): again.save(folder/'other')


def test_no_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip('fcntl')
    def fail(*args): raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, 'flock', fail)
    with pytest.warns(UserWarning, match='this disk has no locks'): same_run(start(tmp_path), unbroken())
    def denied(*args): raise PermissionError(errno.EPERM, 'no')
    monkeypatch.setattr(fcntl, 'flock', denied)
    with pytest.raises(PermissionError): start(tmp_path/'other')


def test_folders_that_cannot_be_synced(tmp_path, monkeypatch):
    fsync, code = os.fsync, errno.EINVAL
    def fail(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode): raise OSError(code, os.strerror(code))
        fsync(fd)
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.warns(UserWarning, match='cannot fsync a folder'): same_run(start(tmp_path), unbroken())
    code = errno.EIO
    with pytest.raises(OSError, match='could not save'): start(tmp_path/'other')
    monkeypatch.setattr(os, 'fsync', lambda fd: fail(os.open(tmp_path, os.O_RDONLY)))  # a file that cannot be synced is no checkpoint
    code = errno.EINVAL
    with pytest.raises(OSError, match='could not save'): start(tmp_path/'third')


def test_an_old_checkpoint_that_cannot_be_removed(tmp_path):
    start(tmp_path/'run')
    (tmp_path/'run/checkpoint-000001').rename(tmp_path/'moved')
    (tmp_path/'run/checkpoint-000001').symlink_to(tmp_path/'moved')                   # moved to another disk by hand
    (tmp_path/'run/.checkpoint-000009.part').symlink_to(tmp_path/'moved')
    with pytest.warns(UserWarning, match='could not remove .*(000001|000009)') as warned: run = start(tmp_path/'run', 9, 5, keep=2)
    same_run(run, unbroken(5))
    assert all('the run goes on' in str(w.message) for w in warned)
    assert kept(tmp_path/'run') == [1, 4, 5] and read_checkpoint(tmp_path/'moved').manifest['epochs_done'] == 1


def test_a_rename_across_devices(tmp_path, monkeypatch):
    "On an overlay, old folders cannot be renamed; they can be removed"
    start(tmp_path)
    old, rename = {str(p) for p in list_checkpoints(tmp_path)}, os.rename
    def fail(a, b):
        if str(a) in old: raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(a, b)
    monkeypatch.setattr(os, 'rename', fail)
    same_run(start(tmp_path, 9, 5, keep=1), unbroken(5))
    assert kept(tmp_path) == [5]


def test_state_of_a_failing_callback_is_named(tmp_path):
    class Odd(Callback):
        def before_fit(self, learn): pass
        def state_dict(self): return {'rule': {'func': print}}
    learn = learner(ours, own_generator, SGD, 1, [Odd(), CheckpointCB(tmp_path/'run')])
    with pytest.raises(TypeError, match=r'callbacks\.Odd\.rule\.func is a builtin_function_or_method'): learn.fit(1, progress=False)
    assert [p.name for p in (tmp_path/'run').iterdir()] == ['.lock']


SCRIPT = '''
import sys, time, torch
from torch import nn
from miniai.checkpoints import CheckpointCB
from miniai.learner import Callback, Learner
from miniai.training import Dataset, get_dls
class Slow(Callback):
    def after_forward(self, learn):
        print('batch', learn.epoch, flush=True)
        time.sleep(.05)
torch.manual_seed(1)
ds = Dataset(torch.randn(500, 4), torch.randint(3, (500,)))
learn = Learner(nn.Linear(4, 3), get_dls(ds, ds, 5), nn.functional.cross_entropy, lr=.1, cbs=[Slow(), CheckpointCB('run', resume=True)])
learn.fit(2, progress=False)
'''


def test_ctrl_c_in_a_process(tmp_path):
    p = subprocess.Popen([sys.executable, '-c', SCRIPT], cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(5): p.stdout.readline()
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode in (-signal.SIGINT, 130) and re.search(r'KeyboardInterrupt: stopped after epoch 1, training batch \d', err), err
    done = read_checkpoint(newest_checkpoint(tmp_path/'run')).manifest
    assert done['epochs_done'] == 0 and 3 <= done['batches_done'] <= 8
    p = subprocess.Popen([sys.executable, '-c', SCRIPT], cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.readline()
    second = subprocess.run([sys.executable, '-c', SCRIPT], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert 'BlockingIOError: run is in use by another run; use another folder' in second.stderr
    for _ in range(2):
        p.send_signal(signal.SIGINT)
        time.sleep(.01)
    p.communicate(timeout=60)
    assert len(list_checkpoints(tmp_path/'run')) in (1, 2)


def test_import_changes_nothing():
    code = '''
import random, signal, sys, numpy, torch
before = torch.get_rng_state(), random.getstate(), signal.getsignal(signal.SIGINT), torch.get_num_threads()
import miniai.checkpoints
after = torch.get_rng_state(), random.getstate(), signal.getsignal(signal.SIGINT), torch.get_num_threads()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
print([m for m in ('matplotlib', 'safetensors', 'filelock') if m in sys.modules])
'''
    done = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True)
    assert done.stdout == '[]\n', done.stderr


@pytest.mark.skipif(not (ROOT/'scripts'/'kill_runs.py').exists(), reason='an installed package has no scripts')
def test_killed_runs_end_identically():
    "The small version of scripts/kill_runs.py: 5 random moments with our modules and with torch.nn"
    command = [sys.executable, ROOT/'scripts'/'kill_runs.py', '--moments', '5']
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    summary = re.findall(r'^(ours|torch): 5 kills, (\d) of them .*; (\d) of 5 ended with identical weights$', done.stdout, re.M)
    assert [(engine, same) for engine, _, same in summary] == [('ours', '5'), ('torch', '5')], done.stdout + done.stderr
    assert any(int(k) for _, k, _ in summary), done.stdout # with 30 moments the script itself requires a quarter of them


def test_only_the_callback_that_saves_is_marked(tmp_path):
    cb = checkpoints.CheckpointCB(tmp_path)
    cb.load_state_dict({**cb.state_dict(), 'saves': True})  # as a checkpoint holds it; the mark is of that moment
    assert cb.state_dict()['saves'] is False

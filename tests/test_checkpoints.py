"""Checkpoints with many optimisers, loaders and networks, full and read-only disks, and runs that are killed."""
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from miniai.checkpoints import CheckpointCB, list_checkpoints, load_checkpoint, newest_checkpoint, read_checkpoint, save_checkpoint
from miniai.data import mnist
from miniai.learner import Callback, CancelFit, Learner
from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, ReLU, Sequential
from miniai.training import SGD, DataLoader, Dataset, get_dls

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
digits = mnist(sample=True)
train_ds, valid_ds = Dataset(digits.train.x[:300], digits.train.y[:300]), Dataset(digits.valid.x[:100], digits.valid.y[:100])


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


@pytest.mark.parametrize('net', [tied, frozen])
def test_unusual_nets(tmp_path, net): same_end(tmp_path, net, own_generator, momentum, every=1)


def test_our_optimisers(tmp_path):
    optim = pytest.importorskip('miniai.optim')
    for name in 'Momentum', 'RMSprop', 'Adam', 'AdamW': same_end(tmp_path/name, ours, own_generator, getattr(optim, name), every=1)


@pytest.mark.parametrize('every', [1, 4])
def test_callbacks_with_a_state(tmp_path, every):
    callbacks = pytest.importorskip('miniai.callbacks')
    make = {'accumulate': lambda: callbacks.AccumulateCB(2), 'clip': lambda: callbacks.GradClipCB(.5), 'record': callbacks.RecorderCB,
            'average': lambda: callbacks.EMACB(.9), 'measure': lambda: callbacks.MetricsCB(callbacks.Accuracy(), train=True),
            'stop': lambda: callbacks.EarlyStoppingCB(patience=1, min_delta=.2, restore_best=True)}
    for name, cb in make.items(): same_end(tmp_path/name, with_buffers, own_generator, momentum, lambda cb=cb: (cb(),), every=every)
    again = same_end(tmp_path/'all', with_buffers, own_generator, momentum, lambda: [cb() for cb in make.values()], every=every)
    assert any(isinstance(cb, callbacks.RecorderCB) for cb in again.cbs)


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


def test_weights_file_is_usable_on_its_own(tmp_path):
    learn = learner(ours, own_generator, SGD, 1)
    learn.fit(1, progress=False)
    learn.save(tmp_path/'c')
    plain = nn.Sequential(nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10))
    plain.load_state_dict(load_file(tmp_path/'c'/'weights.safetensors'))
    torch.testing.assert_close(plain(digits.test.x[:9]).detach(), learn.predict(digits.test.x[:9]))
    twin = learner(lambda: nn.Sequential(nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10)), own_generator, torch.optim.SGD, 3)
    twin.load(tmp_path/'c')       # a checkpoint of our modules in a learner with PyTorch's
    torch.testing.assert_close(twin.predict(digits.test.x[:9]), learn.predict(digits.test.x[:9]))


def test_half_and_bfloat16(tmp_path):
    for dtype in torch.float16, torch.bfloat16, torch.float64:
        learn = learner(ours, own_generator, SGD, 1)
        learn.model = nn.Sequential(nn.Linear(3, 2)).to(dtype)
        save_checkpoint(learn, tmp_path/str(dtype))
        assert read_checkpoint(tmp_path/str(dtype))[0]['0.weight'].dtype == dtype


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
    unbroken = learner(ours, own_generator, torch.optim.Adam, 1)
    unbroken.fit(2, progress=False)
    torch.testing.assert_close(again.model.state_dict(), unbroken.model.state_dict(), rtol=0, atol=0)


def test_files_of_limited_size(tmp_path):
    learn = learner(ours, own_generator, torch.optim.Adam, 1, [CheckpointCB(tmp_path/'run', every=5)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(OSError, match='there is no checkpoint yet'): learn.fit(1, progress=False)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path/'run').iterdir()] == ['.lock']


def test_read_only_disk(tmp_path):
    with disk(tmp_path/'disk', 'size=4m') as folder:
        learn = learner(ours, own_generator, SGD, 1, [CheckpointCB(folder/'run')])
        learn.fit(1, progress=False)
        subprocess.run(['mount', '-o', 'remount,ro', folder], check=True)
        again = learner(ours, own_generator, SGD, 1, [CheckpointCB(folder/'run', resume=True)])
        with pytest.raises(OSError, match='Read-only file system: .*run'): again.fit(2, progress=False)
        again.load(folder/'run'/'checkpoint-000001')      # reading works
        with pytest.raises(OSError, match='Read-only file system'): again.save(folder/'other')


def test_state_of_a_failing_callback_is_named(tmp_path):
    class Odd(Callback):
        def before_fit(self, learn): pass
        def state_dict(self): return {'rule': {'func': print}}
    learn = learner(ours, own_generator, SGD, 1, [Odd(), CheckpointCB(tmp_path/'run')])
    with pytest.raises(TypeError, match=r'callbacks\.Odd\.rule\.func is a builtin_function_or_method'): learn.fit(1, progress=False)
    assert [p.name for p in (tmp_path/'run').iterdir()] == ['.lock']


def test_early_end_and_extension(tmp_path):
    class Enough(Callback):
        def after_epoch(self, learn):
            if learn.epoch == 2: raise CancelFit
    learn = learner(ours, own_generator, SGD, 1, [CheckpointCB(tmp_path/'run'), Enough()])
    assert len(learn.fit(5, progress=False)) == 2
    again = learner(ours, own_generator, SGD, 2, [CheckpointCB(tmp_path/'run', resume=True)])
    assert [r['epoch'] for r in again.fit(3, progress=False)] == [1, 2, 3]
    with pytest.raises(ValueError, match='is from epoch 3, but this fit ends with epoch 2'):
        learner(ours, own_generator, SGD, 2, [CheckpointCB(tmp_path/'run', resume=True)]).fit(2, progress=False)


def test_the_epoch_that_stops_a_run_early_is_saved(tmp_path):
    callbacks = pytest.importorskip('miniai.callbacks')
    make = lambda seed: learner(ours, own_generator, SGD, seed, [callbacks.EarlyStoppingCB(patience=1, min_delta=10.),
                                                                 CheckpointCB(tmp_path/'run', resume=True)])
    records = make(1).fit(5, progress=False)
    assert len(records) == 2 and read_checkpoint(newest_checkpoint(tmp_path/'run'))[2]['epochs_done'] == 2
    again = make(2)
    assert again.fit(5, progress=False) == records and again.steps > 0   # nothing is left to do


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    from miniai.checkpoints import _lock
    read, write = os.pipe()
    with _lock(tmp_path) as lock:
        child = os.fork()   # like a loader's worker, which may outlive a killed process
        if not child:
            os.write(write, b'closed' if lock.closed else b'open')
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 9) == b'closed' and not lock.closed
        with pytest.raises(BlockingIOError, match='in use by another run'): _lock(tmp_path)
    for end in read, write: os.close(end)
    _lock(tmp_path).close()


def test_load_needs_no_fit_and_keeps_the_generators(tmp_path):
    learn = learner(ours, own_generator, SGD, 1)
    learn.fit(1, progress=False)
    learn.save(tmp_path/'c')
    before = torch.get_rng_state()
    load_checkpoint(learn, tmp_path/'c')
    assert torch.equal(torch.get_rng_state(), before)


SCRIPT = '''
import sys, time, torch
from torch import nn
from miniai.checkpoints import CheckpointCB
from miniai.learner import Callback, Learner
from miniai.training import Dataset, get_dls
class Slow(Callback):
    def after_predict(self, learn):
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
    done = read_checkpoint(newest_checkpoint(tmp_path/'run'))[2]
    assert done['epochs_done'] == 0 and 3 <= done['batches_done'] <= 8
    p = subprocess.Popen([sys.executable, '-c', SCRIPT], cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.readline()
    second = subprocess.run([sys.executable, '-c', SCRIPT], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert f'BlockingIOError: CheckpointCB: run is in use by another run, process {p.pid}' in second.stderr
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
print([m for m in ('matplotlib', 'safetensors') if m in sys.modules])
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

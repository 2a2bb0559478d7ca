"Callbacks: edge cases that do not belong in a chapter. Processes, signals, terminals, files, torchmetrics and tensorboard are real."
import contextlib
import fcntl
import io
import itertools
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from miniai import callbacks
from miniai.callbacks import (
    EMACB,
    AccumulateCB,
    Accuracy,
    ConfusionMatrix,
    DeviceCB,
    EarlyStoppingCB,
    GradClipCB,
    LRFinderCB,
    MetricsCB,
    MixedPrecisionCB,
    NaNGuardCB,
    OverfitBatchCB,
    ProgressCB,
    RecorderCB,
    SingleBatchCB,
    TopK,
    lr_find,
    rehearse,
)
from miniai.learner import EVENTS, Callback, Learner
from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, ReLU, Sequential
from miniai.training import SGD, DataLoader, Dataset

ROOT = Path(__file__).resolve().parents[1]


def learner(engine='torch', cbs=(), opt_func=SGD, lr=.1, seed=0, rows=90):
    torch.manual_seed(seed)
    y = torch.randint(3, (rows,))
    ds = Dataset(torch.randn(rows, 5) + 2*F.one_hot(y, 5), y)
    dls = DataLoader(ds, 8, shuffle=True, generator=torch.Generator().manual_seed(seed)), DataLoader(ds, 32)
    if engine == 'ours': return Learner(Sequential(Linear(5, 6), ReLU(), Linear(6, 3)), dls, CrossEntropyLoss(), opt_func, lr, cbs)
    return Learner(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), dls, nn.CrossEntropyLoss(), opt_func, lr, cbs)


def weights(learn): return [t.detach().clone() for t in learn.model.state_dict().values()]
def same(a, b): assert_close(a, b, rtol=0, atol=0)
def numbers(records): return [{k: v for k, v in r.items() if k != 'seconds'} for r in records]


class Stop(Exception): pass


class Save(Callback):
    order = 1000
    def __init__(self, at): self.at = at
    def after_batch(self, learn):
        if learn.training and (learn.epoch, learn.batch_idx) == self.at:
            torch.save([o.state_dict() for o in (learn.model, learn.opt, learn, *learn.cbs)], file := io.BytesIO())
            self.saved = file.getvalue()
            raise Stop


def resumed(make, at=(2, 4), epochs=3):
    "A run, and one that was killed and resumed"
    straight, save, other = make(), Save(at), make()
    straight.fit(epochs, progress=False)
    with contextlib.suppress(Stop): make().fit(epochs, cbs=[save], progress=False)
    parts = torch.load(io.BytesIO(save.saved), weights_only=True)
    for o, state in zip((other.model, other.create_opt(), other, *other.cbs), parts, strict=True): o.load_state_dict(state)
    other.fit(epochs, progress=False)
    same(weights(other), weights(straight))
    assert numbers(other.records) == numbers(straight.records)
    return straight, other


# ---- no error leaves anything behind

ALL = {
    'metrics': lambda: MetricsCB(Accuracy(), ConfusionMatrix(), train=True), 'device': lambda: DeviceCB('cpu'), 'recorder': RecorderCB,
    'lines': lambda: ProgressCB(style='lines'), 'terminal': lambda: ProgressCB(style='terminal', every=0), 'finder': LRFinderCB,
    'overfit': lambda: OverfitBatchCB(5), 'single': SingleBatchCB, 'clip': lambda: GradClipCB(1.), 'accumulate': lambda: AccumulateCB(3),
    'stopping': lambda: EarlyStoppingCB(), 'bfloat16': lambda: MixedPrecisionCB(torch.bfloat16),
    'float16': lambda: MixedPrecisionCB(torch.float16), 'ema': lambda: EMACB(.9), 'guard': NaNGuardCB,
}


def failing(event, at, error):
    "A callback that raises at the `at`th call of an event"
    calls = itertools.count(1)
    def fail(self, learn):
        if next(calls) == at: raise error
    return type('Failing', (Callback,), {event: fail, 'order': 500})()


def where(learn):
    "Everything that a callback may have changed"
    hooks = [[*m._forward_hooks] for m in learn.model.modules()] + [[*(p._backward_hooks or ())] for p in learn.model.parameters()]
    modes = [m.training for m in learn.model.modules()]
    return [hooks, modes, learn.dls, learn.opt, learn.loss_func, learn.model, learn.cbs, learn._calls, torch.is_grad_enabled(),
            torch.is_autocast_enabled('cpu'), {k for k in vars(learn) if callable(getattr(learn, k))}]


@pytest.mark.parametrize('engine', ['ours', 'torch'])
@pytest.mark.parametrize('name', ALL)
def test_an_error_at_any_event_leaves_nothing_behind(name, engine):
    at, error = {'ours': (1, Stop), 'torch': (2, KeyboardInterrupt)}[engine]
    for event in EVENTS:
        learn = learner(engine, [ALL[name](), seen := Weights()], opt_func=torch.optim.Adam, lr=.01, rows=24)
        learn.create_opt()
        before, output = where(learn), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()) as bar:
            with contextlib.suppress(Stop, KeyboardInterrupt): learn.fit(2, cbs=[failing(event, at, error)])
        assert where(learn) == before, event
        assert bar.getvalue() == '' or re.search(r'\r *\r$', bar.getvalue()), f'{event}: the bar is still there'
        if name in ('finder', 'overfit'): same(weights(learn), seen.first or weights(learn))
        elif seen.latest is not None and event not in ('after_step', 'cleanup_step'): same(weights(learn), seen.latest)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output): learn.fit(1)


class Weights(Callback):
    "The weights before the first step and after the latest one"
    order, first, latest = 400, None, None
    def before_train(self, learn): self.first = self.first or weights(learn)
    def cleanup_step(self, learn): self.latest = weights(learn)


# ---- optimisers and schedules of torch

OPTIMISERS = {
    'nesterov': lambda p, lr: torch.optim.SGD(p, lr, momentum=.9, nesterov=True, weight_decay=.01), 'adam': torch.optim.Adam,
    'adamw': lambda p, lr: torch.optim.AdamW(p, lr, amsgrad=True),
    'rmsprop': lambda p, lr: torch.optim.RMSprop(p, lr, momentum=.5, centered=True),
    'adagrad': torch.optim.Adagrad, 'fused': lambda p, lr: torch.optim.Adam(p, lr, fused=True),
    'groups': lambda p, lr: torch.optim.SGD([{'params': [q], 'lr': lr*i} for i, q in enumerate(p)], lr, momentum=.9),
}


@pytest.mark.parametrize('engine', ['ours', 'torch'])
@pytest.mark.parametrize('name', OPTIMISERS)
def test_every_optimiser_of_torch(name, engine):
    opt_func = OPTIMISERS[name]
    def make():
        cbs = AccumulateCB(3), GradClipCB(.5), EMACB(.8), RecorderCB(), MetricsCB(Accuracy(), train=True), NaNGuardCB()
        return learner(engine, cbs, opt_func, lr=.01)
    straight, other = resumed(make)
    assert straight.cbs[3].batches == other.cbs[3].batches and straight.cbs[3].losses == other.cbs[3].losses
    same(straight.cbs[2].averages, other.cbs[2].averages)
    learn, plain = (learner(engine, opt_func=opt_func, lr=.01) for _ in range(2))
    for l in learn, plain: l.fit(1, progress=False)
    lr_find(learn, num=10)
    with contextlib.redirect_stdout(io.StringIO()): rehearse(learn, OverfitBatchCB(3))
    for l in learn, plain: l.fit(1, progress=False)
    same(weights(learn), weights(plain))


def test_a_schedule_of_torch_is_recorded_and_left_alone_by_the_finder():
    class Schedule(Callback):
        def before_fit(self, learn): self.it = torch.optim.lr_scheduler.ExponentialLR(learn.opt, .9)
        def after_step(self, learn): self.it.step()
    learn = learner(cbs=[rec := RecorderCB(), schedule := Schedule()], opt_func=torch.optim.SGD)
    learn.fit(1, progress=False)
    assert_close(rec.lrs, [.1*.9**i for i in range(12)])
    lr_find(learn, num=5)
    assert schedule.it.last_epoch == 12 and learn.opt.param_groups[0]['lr'] == schedule.it.get_last_lr()[0]


# ---- the libraries

def test_metrics_of_torchmetrics_and_tables_of_them():
    tm = pytest.importorskip('torchmetrics')
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
    def make():
        collection = tm.MetricCollection({'f1': MulticlassF1Score(3), 'matrix': tm.ConfusionMatrix('multiclass', num_classes=3)})
        metrics = Accuracy(), MulticlassAccuracy(3, average='micro'), collection, F.cross_entropy
        return learner(cbs=[MetricsCB(*metrics, train=True, best=TopK(2))])
    straight, _ = resumed(make)
    r = straight.records[-1]
    assert_close(r['valid_multiclass_accuracy'], r['valid_accuracy'])
    assert_close(r['train_multiclass_accuracy'], r['train_accuracy'])
    assert_close(r['train_cross_entropy'], r['train_loss'])
    assert 0 < r['valid_f1'] <= 1 and 'valid_matrix' not in r
    ours, theirs = MetricsCB(Accuracy()), MetricsCB(accuracy=MulticlassAccuracy(3, average='micro'))
    a, b = (learner(cbs=[cb]).fit(2, progress=False) for cb in (ours, theirs))
    assert_close([r['valid_accuracy'] for r in a], [r['valid_accuracy'] for r in b])


def test_tensorboard_reads_what_was_written_also_after_a_power_cut(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    def scalars(folder):
        events = EventAccumulator(str(folder)).Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()['scalars'] if not tag.endswith('seconds')}
    rec = RecorderCB()
    learner(cbs=[callbacks.TensorBoardCB(tmp_path/'a'), rec]).fit(3, progress=False)
    straight = scalars(tmp_path/'a')
    assert [s for s, _ in straight['batch/loss']] == list(range(36))
    assert_close([v for _, v in straight['batch/loss']], rec.losses)
    assert [s for s, _ in straight['epoch/valid_loss']] == [11, 23, 35]
    folder, save, other = tmp_path/'b', Save((2, 4)), learner(cbs=[callbacks.TensorBoardCB(tmp_path/'b')])
    with contextlib.suppress(Stop): learner(cbs=[callbacks.TensorBoardCB(folder)]).fit(3, cbs=[save], progress=False)
    time.sleep(1.1)                                        # TensorBoard names files by the second
    for o, state in zip((other.model, other.create_opt(), other, *other.cbs), torch.load(io.BytesIO(save.saved), weights_only=True)):
        o.load_state_dict(state)
    other.fit(3, progress=False)
    assert scalars(folder) == straight


def test_importing_the_module_imports_nothing_that_draws():
    heavy = 'matplotlib', 'IPython', 'tensorboard', 'torchmetrics', 'pandas'
    assert run(f'import sys, miniai.callbacks; print([m for m in {heavy} if m in sys.modules])').stdout == '[]\n'


# ---- processes, pipes and terminals

SCRIPT = '''
import os, sys, time, torch
sys.path.insert(0, {tests!r})
from test_callbacks import *
class Slow(Callback):
    def after_batch(self, learn): time.sleep(.02)
'''.format(tests=str(ROOT/'tests'))


def run(code, **kwargs):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'CI': ''} | kwargs.pop('env', {})
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, env=env, **kwargs)


def test_a_pipe_gets_a_table_and_nothing_else():
    got = run(SCRIPT + 'learner(cbs=[ProgressCB(), MetricsCB(Accuracy())]).fit(2)')
    assert got.stderr == '' and got.returncode == 0
    lines = got.stdout.splitlines()
    assert len(lines) == 4 and lines[1].split() == ['epoch', 'loss', 'loss', 'accuracy', 'seconds'] and lines[3].split()[0] == '2'
    assert all(len(line) <= 80 and line.isprintable() for line in lines)


def in_terminal(code, signal_after=None, columns=80, env=()):
    "The output of a program in a terminal of 80 columns, and its exit status; Ctrl-C when `signal_after` has appeared"
    pid, fd = pty.fork()
    if pid == 0:
        env = os.environ | {'PYTHONPATH': str(ROOT), 'CI': '', 'TERM': 'xterm', 'PYTHONIOENCODING': 'utf-8'} | dict(env)
        try: os.execve(sys.executable, [sys.executable, '-c', code], env)
        finally: os._exit(127)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    said, end = b'', time.time() + 60
    while time.time() < end:
        if not select.select([fd], [], [], .1)[0]: continue
        try: part = os.read(fd, 65536)
        except OSError: break
        if not part: break
        said += part
        if signal_after and signal_after in said.decode(errors='ignore'):
            os.kill(pid, signal.SIGINT)
            signal_after = None
    status = os.waitpid(pid, 0)[1]
    os.close(fd)
    return said.decode(), os.waitstatus_to_exitcode(status)


def screen(said, columns=80):
    "The lines on the screen at the end; a carriage return overwrites a line"
    lines = []
    for line in said.replace('\r\n', '\n').split('\n'):
        cells = []
        for part in line.split('\r'):
            part = re.sub(r'\x1b\[[0-9;]*[A-Za-z]', '', part)
            assert len(part) <= columns, f'{len(part)} columns: {part!r}'
            cells[:len(part)] = part
        lines.append(''.join(cells).rstrip())
    return lines


def test_a_terminal_gets_a_bar_that_goes_away():
    said, status = in_terminal(SCRIPT + 'learner(cbs=[ProgressCB(every=.05), Slow(), MetricsCB(Accuracy())]).fit(2)')
    assert status == 0, said
    lines = [line for line in screen(said) if line]
    assert len(lines) == 4 and lines[3].split()[0] == '2', lines
    bars = re.findall(r'epoch 1/2 +\d+%\|.*?\| \d+/15 \d\d:\d\d, loss \d\.\d{4} lr 0\.1 [▁-█]+', said)
    assert bars and {len(bar) for bar in bars} <= {79, 80}, said                  # as wide as the terminal


def test_a_redraw_comes_at_most_twice_a_second():
    said, _ = in_terminal(SCRIPT + 'start = time.time(); learner(cbs=[ProgressCB(), Slow()]).fit(3); print(time.time() - start)')
    seconds = float(said.split()[-1])
    assert len(re.findall('lr 0.1', said)) <= 2*seconds + 2, said


def test_ctrl_c_leaves_a_clean_line():
    said, status = in_terminal(SCRIPT + 'learner(cbs=[ProgressCB(every=0), Slow()]).fit(50)', signal_after='epoch 2/50')
    assert status != 0
    before = said.split('Traceback')[0]
    assert [line for line in screen(before) if 'epoch 2/50' in line or '%|' in line] == [], before


def test_an_ascii_terminal_is_sent_ascii():
    said, status = in_terminal(SCRIPT + 'learner(cbs=[ProgressCB(every=0)]).fit(1)', env={'PYTHONIOENCODING': 'ascii'})
    assert status == 0 and said.isascii() and 'lr 0.1' in said


KILLED = SCRIPT + '''
folder, state = sys.argv[1] if len(sys.argv) > 1 else os.environ['FOLDER'], os.environ['FOLDER'] + '/state'
class Checkpoint(Callback):
    order = 900
    def after_batch(self, learn):
        if not learn.training or learn.batch_idx % 5: return
        torch.save([o.state_dict() for o in (learn.model, learn.opt, learn, *learn.cbs)], state + '.new')
        os.replace(state + '.new', state)
learn = learner(cbs=[RecorderCB(folder + '/log.jsonl'), EMACB(.9)])
if os.path.exists(state):
    for o, s in zip((learn.model, learn.create_opt(), learn, *learn.cbs), torch.load(state, weights_only=True)): o.load_state_dict(s)
learn.fit(6, cbs=[Checkpoint(), Slow()], progress=False)
'''


def test_a_log_after_kill_9_holds_every_batch_once(tmp_path):
    env, log = {**os.environ, 'PYTHONPATH': str(ROOT), 'FOLDER': str(tmp_path)}, tmp_path/'log.jsonl'
    for lines in 14, 40:                                   # killed in epoch 2, and again in epoch 4
        process = subprocess.Popen([sys.executable, '-c', KILLED], env=env)
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b'\n') >= lines): time.sleep(.01)
        time.sleep(.1)
        process.kill()
        process.wait()
    got = run(KILLED, env={'FOLDER': str(tmp_path)})
    assert got.returncode == 0, got.stderr
    found = [json.loads(line) for line in log.read_text().splitlines()]
    rec = RecorderCB(tmp_path/'straight.jsonl')
    learner(cbs=[rec, EMACB(.9)]).fit(6, progress=False)
    assert numbers(found) == numbers([json.loads(line) for line in (tmp_path/'straight.jsonl').read_text().splitlines()])
    assert [line['step'] for line in found if 'step' in line] == list(range(72))


def test_a_log_that_cannot_be_written_raises_before_the_first_step(tmp_path):
    learn = learner(cbs=[RecorderCB(tmp_path)])            # a folder
    with pytest.raises(OSError): learn.fit(1, progress=False)
    assert learn.steps == 0

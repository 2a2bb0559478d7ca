"Watching a run: edge cases that do not belong in chapter 07. Processes, terminals, files, notebooks and tensorboard are real."
import base64
import contextlib
import fcntl
import io
import itertools
import json
import math
import os
import pickle
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import types
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from miniai import progress
from miniai.learner import EVENTS, Callback, CancelEpoch, CancelFit, Learner
from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, ReLU, Sequential
from miniai.progress import ProgressCB, RecorderCB, TensorBoardCB, chunk_means, smooth
from miniai.training import SGD, DataLoader, Dataset

ROOT = Path(__file__).resolve().parents[1]


def learner(engine='torch', cbs=(), opt_func=SGD, lr=.1, seed=0, examples=90):
    "12 training batches of 90 examples, and 3 for validation"
    torch.manual_seed(seed)
    y = torch.randint(3, (examples,))
    ds = Dataset(torch.randn(examples, 5) + 2*F.one_hot(y, 5), y)
    dls = DataLoader(ds, 8, shuffle=True, generator=torch.Generator().manual_seed(seed)), DataLoader(ds, 32)
    if engine == 'ours': return Learner(Sequential(Linear(5, 6), ReLU(), Linear(6, 3)), dls, CrossEntropyLoss(), opt_func, lr, cbs)
    return Learner(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), dls, nn.CrossEntropyLoss(), opt_func, lr, cbs)


def weights(learn): return [t.detach().clone() for t in learn.model.state_dict().values()]
def same(a, b): assert_close(a, b, rtol=0, atol=0)
def numbers(records): return [{k: v for k, v in r.items() if k != 'seconds'} for r in records]
def lines_of(path): return [json.loads(line) for line in Path(path).read_text().splitlines()]


class Stop(Exception): pass


class Save(Callback):
    "Ends the run with an error after a batch, with what a checkpoint holds"
    order = 1000
    def __init__(self, at): self.at = at
    def after_batch(self, learn):
        if learn.training and (learn.epoch, learn.batch_idx) == self.at:
            torch.save([o.state_dict() for o in (learn.model, learn.opt, learn, *learn.cbs)], file := io.BytesIO())
            self.saved = file.getvalue()
            raise Stop


def killed(learn, at=(2, 4), epochs=3):
    save = Save(at)
    with pytest.raises(Stop): learn.fit(epochs, cbs=[save], progress=False)
    return save.saved


def load(learn, saved):
    parts = torch.load(io.BytesIO(saved), weights_only=True)
    for o, state in zip((learn.model, learn.create_opt(), learn, *learn.cbs), parts, strict=True): o.load_state_dict(state)
    return learn


class Reads(TorchFunctionMode):
    "Counts how often numbers are read from a tensor"
    count = 0
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, '__name__', '') in ('item', 'tolist', '__float__', '__format__', '__bool__', 'numpy', '__int__')
        return func(*args, **(kwargs or {}))


# ---- small parts

def test_the_module_is_short():
    lines = (ROOT/'miniai/progress.py').read_text().splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 100


def test_records_become_lines():
    table = progress._Table()
    record = {'epoch': 1, 'train_loss': .25, 'valid_loss': 12345.678, 'valid_top3': 0., 'lr': 1e-5, 'seconds': 1.26}
    first = table.add(record)
    assert first == ['           train    valid    valid                  ',
                     '  epoch     loss     loss     top3       lr  seconds',
                     '      1   0.2500  1.23e+04   0.0000  1.00e-05      1.3']
    assert table.add({**record, 'epoch': 2, 'valid_loss': -.001}) == ['      2   0.2500  -0.0010   0.0000  1.00e-05      1.3']
    assert len(table.add({'epoch': 3, 'why': 'so'})) == 3
    assert len(table.lines) == 7 and table.lines[:3] == first
    assert [progress._cell('x', v) for v in (1e4, 9999., 1e-3, 9e-4, True)] == ['1.00e+04', '9999.0000', '0.0010', '9.00e-04', 'True']


@pytest.mark.parametrize('values,most,means', [
    ([], 5, []), ([3.], 5, [(1, 3.)]), ([1., 3., 5., 7.], 4, [(1, 1.), (2, 3.), (3, 5.), (4, 7.)]),
    ([1, 3, 5, float('inf'), 7, 6], 2, [(3, 3.), (6, 6.5)]), ([1., 2., 3., 4., 5.], 2, [(3, 2.), (5, 4.5)]),
    ([float('nan')]*2 + [1., 2.], 2, [(4, 1.5)])])
def test_means_of_chunks(values, most, means): assert chunk_means(values, most) == means


def test_at_most_so_many_chunks():
    for n, most in itertools.product((1, 299, 300, 301, 999), (1, 7, 300)):
        ends = [end for end, _ in chunk_means([1.]*n, most)]
        assert len(ends) <= most and ends[-1] == n


def test_smooth():
    nan = float('nan')
    assert_close(smooth([2., 4., nan, 4.], .5), [2., (.25*2 + .5*4)/.75, (.25*2 + .5*4)/.75, (.125*2 + .25*4 + .5*4)/.875])
    assert_close(smooth([nan, 2.], .9), [nan, 2.], equal_nan=True)
    assert smooth([3., 1.], 0) == [3., 1.] and smooth([], .5) == []


class Tty(io.StringIO):
    "A terminal that stores its input"
    encoding = 'utf-8'
    def isatty(self): return True


kernel = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=1))
no_kernel = types.SimpleNamespace(get_ipython=lambda: None)


@pytest.mark.parametrize('ci,shell,err,style', [
    ('true', kernel, Tty(), 'lines'), ('1', no_kernel, Tty(), 'lines'), ('', kernel, Tty(), 'page'), ('', None, Tty(), 'terminal'),
    ('false', no_kernel, Tty(), 'terminal'), ('0', no_kernel, io.StringIO(), 'lines'), ('', no_kernel, None, 'lines')])
def test_the_style_suits_the_place(ci, shell, err, style, monkeypatch):
    monkeypatch.setenv('CI', ci)
    monkeypatch.setattr(sys, 'stderr', err)
    if shell is None: monkeypatch.delitem(sys.modules, 'IPython', raising=False)
    else: monkeypatch.setitem(sys.modules, 'IPython', shell)
    assert progress._style() == style


def test_wrong_style_raises():
    with pytest.raises(ValueError, match="style is 'loud'; use 'page', 'terminal' or 'lines'"): ProgressCB(style='loud')


@pytest.mark.parametrize('losses,valid,scale', [
    ([float(i) for i in range(1, 1201)], [(600, 3.)], 'log'), ([2., 1.], [], 'log'), ([2., -1.], [], 'linear'), ([0., 1.], [], 'linear'),
    ([float('nan')]*2, [], 'linear')])
def test_the_live_curve(losses, valid, scale):
    import matplotlib.pyplot as plt
    drawn, figures = [], plt.get_fignums()
    with patch('matplotlib.figure.Figure.savefig', lambda fig, file, format: drawn.append((fig, format))): progress._curve(losses, valid)
    (fig, kind), = drawn
    ax, = fig.axes
    points = [list(zip(*line.get_data())) for line in ax.lines]
    finite = [[p for p in line if math.isfinite(p[1])] for line in points]
    assert [p for p in finite if p] == [p for p in (chunk_means(losses, 300), valid) if p] and ax.get_yscale() == scale and kind == 'png'
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('batches', 'loss')
    assert progress._curve(losses, valid).startswith(b'\x89PNG') and plt.get_fignums() == figures


# ---- ProgressCB

def shown(style, epochs=2, dls=None, cbs=(), tty=Tty, examples=90, **kwargs):
    "A fit, and its standard output and standard error"
    learn = learner(cbs=[ProgressCB(style=style, **kwargs), *cbs], examples=examples)
    if dls is not None: learn.dls = dls
    out, err = io.StringIO(), tty()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(Stop, KeyboardInterrupt):
        learn.fit(epochs)
    return learn, out.getvalue(), err.getvalue()


def frames(err): return [f for f in err.split('\r') if f.strip()]
def table(records): return [line for t in [progress._Table()] for r in records for line in t.add(r)]


class Fail(Callback):
    "Ends the run in the middle of an epoch"
    order = 99
    def __init__(self, epoch=2, error=Stop): self.epoch, self.error = epoch, error
    def after_batch(self, learn):
        if (learn.epoch, learn.batch_idx) == (self.epoch, 7): raise self.error


def test_lines():
    learn, out, err = shown('lines')
    assert out.splitlines() == table(learn.records) and len(table(learn.records)) == 4 and err == ''


def test_terminal():
    learn, out, err = shown('terminal', every=0)
    assert out.splitlines() == table(learn.records)
    first, last = frames(err)[0], frames(err)[-1]
    assert re.match(r'epoch 1/2: +7%\|\S* *\| 1/15 \[.*batch/s, loss \d\.\d{4}, lr 0\.1\]', first), first
    assert last.startswith('epoch 2/2: 100%') and ' 15/15 ' in last and len(frames(err)) >= 30 and err.endswith(' \r')
    assert '█' in last
    few = shown('terminal', every=1e9)[2]
    assert len({frame.split(' [')[0] for frame in frames(few)}) <= 3 and few.endswith(' \r')


def test_the_bar_shows_the_mean_since_the_last_redraw():
    clock = itertools.count()
    with patch.object(progress.time, 'perf_counter', lambda: next(clock)): _, _, err = shown('terminal', epochs=1, every=4)
    learn = learner(cbs=[rec := RecorderCB()])
    learn.fit(1, progress=False)
    bars = [f for f in frames(err) if 'loss' in f]
    done = [int(re.search(r'(\d+)/15', b)[1]) for b in bars]
    for begin, end, bar in zip([0, *done], done, bars):
        if end <= 12: assert f'loss {sum(rec.losses[begin:end])/(end - begin):.4f}' in bar
    assert len(done) > 2


def test_ascii_and_unsized_loaders():
    class Ascii(Tty): encoding = 'ascii'
    assert shown('terminal', every=0, tty=Ascii)[2].isascii()
    unsized = map(lambda batch: batch, learner().dls[0]), None
    _, out, err = shown('terminal', every=0, dls=unsized, epochs=1)
    assert '12batch [' in frames(err)[-1] and len(out.splitlines()) == 3


@pytest.mark.parametrize('error', [Stop, KeyboardInterrupt, CancelFit, CancelEpoch])
@pytest.mark.parametrize('epoch', [1, 2])
def test_no_half_bar_stays(error, epoch):
    _, out, err = shown('terminal', every=0, epochs=2, cbs=[Fail(epoch, error)])
    assert err.endswith(' \r') and any(' 8/15' in f for f in frames(err))
    finished = {CancelEpoch: 1}.get(error, epoch - 1)
    assert len(out.splitlines()) == (2 + finished if finished else 0)


@pytest.mark.parametrize('event', EVENTS)
def test_an_error_at_any_event_leaves_no_bar(event):
    calls = itertools.count(1)
    def fail(self, learn):
        if next(calls) == 2: raise Stop
    failing = type('Failing', (Callback,), {event: fail, 'order': 500})()
    learn, out, err = shown('terminal', every=0, cbs=[failing], epochs=3)
    assert err == '' or err.endswith(' \r') and learn.cbs[0]._bar is None
    learn.cbs = learn.cbs[:1]
    with contextlib.redirect_stdout(out := io.StringIO()), contextlib.redirect_stderr(Tty()): learn.fit(1)
    assert len(out.getvalue().splitlines()) == 3


class Shown:
    "Stands in for `IPython.display.display`: records the outputs and their updates"
    def __init__(self): self.outputs = []
    def __call__(self, content, display_id):
        assert display_id is True
        self.outputs.append(found := [content])
        return types.SimpleNamespace(update=found.append)


def on_page(**kwargs):
    "A fit; the states of its text, and its pictures"
    with patch('IPython.display.display', Shown()) as page: learn, out, err = shown('page', **kwargs)
    assert out == err == ''
    texts, pictures = [*page.outputs, [], []][:2]
    return learn, [t.data for t in texts], [p.data for p in pictures]


def test_a_notebook_gets_one_text_and_one_picture():
    learn, texts, pictures = on_page(every=0)
    assert re.fullmatch(r'epoch 1/2: +7%\|.*\| 1/15 \[.*, loss \d\.\d{4}, lr 0\.1\]', texts[0])
    assert texts[20].splitlines()[:3] == table(learn.records)[:3] and texts[20].splitlines()[3].startswith('epoch 2/2')
    assert texts[-1].splitlines() == table(learn.records) and len(texts) >= 2*15 + 2
    assert len(pictures) >= 2 and all(p.startswith(b'\x89PNG') for p in pictures)
    assert max(len(line) for text in texts for line in text.splitlines()) <= 90


def test_a_notebook_with_few_updates_no_curve_no_epochs():
    learn, texts, pictures = on_page(every=1e9)
    assert len(pictures) == 1 and texts[-1].splitlines() == table(learn.records) and len(texts) <= 5
    _, texts, pictures = on_page(plot=False)
    assert texts and not pictures
    assert on_page(epochs=0)[1:] == ([], [])
    _, texts, pictures = on_page(every=0, cbs=[Fail()])
    assert len(texts[-1].splitlines()) == 3
    assert on_page(every=0, cbs=[Fail(1)])[1][-1] == ''
    one = iter([next(iter(learn.dls[0]))]), None
    _, texts, pictures = on_page(every=0, dls=one, epochs=1)
    assert texts and not pictures                                   # one batch makes no curve


def test_the_last_curve_has_every_loss():
    drawn = []
    with patch.object(progress, '_curve', lambda losses, valid: drawn.append(([*losses], [*valid])) or b'\x89PNG'):
        learn, _, _ = on_page(every=1e9, cbs=[rec := RecorderCB()])
    assert drawn[-1] == (rec.losses, rec.valid)


def test_the_curve_waits_20_times_as_long_as_it_took_but_not_for_the_import(monkeypatch):
    clock, took, drawn = [0.], [5., .11, .22, .11, .11], []
    def draw(losses, valid):
        drawn.append((clock[0], took[len(drawn)]))
        clock[0] += drawn[-1][1]
        return b'\x89PNG'
    monkeypatch.setattr(progress, '_curve', draw)
    monkeypatch.setattr(progress, 'time', types.SimpleNamespace(perf_counter=lambda: clock[0]))
    with patch('IPython.display.display', Shown()):
        page = progress._Page()
        for n in range(1, 18):
            clock[0] += .5
            page.show([], [1.]*n, [])
        page.show([], [1.]*n, [], last=True)
    pauses = [start - took - before for (before, took), (start, _) in itertools.pairwise(drawn)]
    assert drawn[0][0] == 1. and len(drawn) == 5
    for pause, wanted in zip(pauses, (0, 2.2, 4.4)): assert wanted - 1e-6 <= pause <= wanted + .5
    assert pauses[3] <= 1                                           # the last one is always drawn


def test_a_curve_that_takes_no_time_is_drawn_each_time(monkeypatch):
    drawn = []
    monkeypatch.setattr(progress, '_curve', lambda losses, valid: drawn.append(len(losses)) or b'\x89PNG')
    monkeypatch.setattr(progress, 'time', types.SimpleNamespace(perf_counter=lambda: 1.))
    with patch('IPython.display.display', Shown()):
        page = progress._Page()
        for n in range(5): page.show([], [1.]*n)
    assert drawn == [2, 3, 4]


@pytest.mark.parametrize('style', ['lines', 'terminal', 'page'])
def test_nothing_is_shown_for_evaluations_and_nothing_changes(style):
    plain = learner()
    plain.fit(2, progress=False)
    with patch('IPython.display.display', Shown()) as page:
        learn = shown(style)[0]
        same(weights(learn), weights(plain))
        before = len(page.outputs)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            learn.evaluate()
            learn.fit(1, progress=False)
        assert out.getvalue() == '' and len(page.outputs) == before
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(Tty()): learn.fit(1, train=False)
        assert 'train' not in out.getvalue() + ''.join(o[-1].data for o in page.outputs[before:] if isinstance(o[-1].data, str))


def test_the_bar_of_a_resumed_run_starts_in_the_middle():
    make = lambda: learner(cbs=[ProgressCB(style='terminal', every=0)])
    other = load(make(), killed(make(), (2, 4)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(Tty()) as err: other.fit(2)
    assert '| 6/15 ' in frames(err.getvalue())[0] and '| 15/15 ' in frames(err.getvalue())[-1]


@pytest.mark.parametrize('cbs,more', [
    ([], 0), ([lambda: ProgressCB(style='lines', every=0)], 0), ([lambda: ProgressCB(style='terminal', every=1e9)], 3),
    ([RecorderCB], 2), ([lambda: ProgressCB(style='terminal', every=1e9), RecorderCB], 5)])
def test_reads_per_epoch_do_not_depend_on_the_batches(cbs, more):
    counts = []
    for examples in 90, 400:
        learn = learner(cbs=[make() for make in cbs], examples=examples)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(Tty()), Reads() as found: learn.fit(2)
        counts.append(found.count)
    assert counts == [4 + more]*2   # the learner reads four times; the bar at its first redraw, and at the end of each epoch


def test_callbacks_can_be_pickled():
    learn = learner(cbs=[ProgressCB(style='lines'), RecorderCB()])
    with contextlib.redirect_stdout(io.StringIO()): learn.fit(1)
    again = pickle.loads(pickle.dumps(learn.cbs))
    assert again[1].losses == learn.cbs[1].losses


# ---- RecorderCB

momentum = lambda params, lr: torch.optim.SGD(params, lr, momentum=.9)
def two_groups(kind, **kwargs): return lambda params, lr: kind([{'params': [p], 'lr': lr} for p in list(params)[:2]], **kwargs)


class Lower(Callback):
    "Halves the first group's learning rate, a tensor that is changed in place, and changes momentum"
    def before_batch(self, learn):
        if not learn.training: return
        g = learn.opt.param_groups[0]
        if not torch.is_tensor(g['lr']): g['lr'] = torch.tensor(.1, dtype=torch.float64)
        g['lr'].fill_(.1*.5**learn.batch_idx)
        if 'betas' in g: g['betas'] = .9 - learn.batch_idx/100, .99
        elif 'momentum' in g: g['momentum'] = learn.batch_idx/100


@pytest.mark.parametrize('engine', ['ours', 'torch'])
@pytest.mark.parametrize('opt_func,moment', [
    (momentum, lambda i: i/100), (two_groups(torch.optim.AdamW), lambda i: .9 - i/100), (torch.optim.Adagrad, lambda i: 0.)])
def test_every_batch_is_recorded(engine, opt_func, moment):
    learn = learner(engine, [rec := RecorderCB(), Lower()], opt_func, lr=.01)
    records = learn.fit(2, progress=False)
    assert [b[:2] for b in rec.batches] == [(epoch, i) for epoch in (1, 2) for i in range(12)]
    assert_close(rec.lrs, [.1*.5**i for i in range(12)]*2)
    assert_close(rec.momenta, [moment(i) for i in range(12)]*2)
    groups = len(learn.opt.param_groups)
    assert {(len(b[2]), len(b[3])) for b in rec.batches} == {(groups, groups)}
    assert rec.batches[5][2][1:] == [.01]*(groups - 1)
    assert {type(v) for b in rec.batches for vs in b[2:] for v in vs} == {float}
    sizes = [8]*11 + [2]
    assert_close(sum(l*k for l, k in zip(rec.losses[12:], sizes))/90, records[1]['train_loss'])
    assert rec.valid == [(12, records[0]['valid_loss']), (24, records[1]['valid_loss'])]
    learn.evaluate()
    learn.fit(1, train=False, progress=False)
    assert (len(rec.losses), len(rec.batches), len(rec.valid)) == (24, 24, 2)     # evaluations are not recorded
    learn.fit(1, progress=False)
    assert (len(rec.losses), len(rec.batches), len(rec.valid)) == (36, 36, 3)


@pytest.mark.parametrize('engine', ['ours', 'torch'])
@pytest.mark.parametrize('at', [(1, 0), (2, 4), (2, 11), (3, 1)])
def test_a_resumed_recorder(engine, at):
    make = lambda: learner(engine, [RecorderCB()], two_groups(torch.optim.AdamW), .01)
    straight, other = make(), load(make(), killed(make(), at))
    for learn in straight, other: learn.fit(3, progress=False)
    a, b = straight.cbs[0], other.cbs[0]
    assert (a.losses, a.batches, a.valid) == (b.losses, b.batches, b.valid) and len(a.losses) == 36
    same(weights(straight), weights(other))
    bare = learner(engine, opt_func=two_groups(torch.optim.AdamW), lr=.01)
    bare.fit(3, progress=False)
    same(weights(straight), weights(bare))


def test_the_state_is_small_and_a_copy_also_when_a_group_was_added():
    learn = learner(cbs=[rec := RecorderCB()], opt_func=torch.optim.SGD)
    learn.fit(1, progress=False)
    learn.opt.add_param_group({'params': [torch.zeros(1, requires_grad=True)], 'lr': .5})
    learn.fit(1, progress=False)
    state = rec.state_dict()
    assert {k: type(v) for k, v in state.items()} == {'log': torch.Tensor, 'size': int}   # no list that grows in a manifest
    (other := RecorderCB()).load_state_dict(state)
    assert other.batches == rec.batches and [len(b[2]) for b in rec.batches] == [1]*12 + [2]*12
    assert (other.losses, other.valid) == (rec.losses, rec.valid) and all(type(b) is tuple for b in other.batches + other.valid)
    held = state['log'].clone()
    learn.fit(1, progress=False)
    same(state['log'], held)


@pytest.mark.parametrize('event', EVENTS)
def test_after_an_error_losses_and_batches_belong_together(event):
    calls = itertools.count(1)
    def fail(self, learn):
        if next(calls) == 3: raise Stop
    failing = type('Failing', (Callback,), {event: fail, 'order': 500})()
    learn = learner(cbs=[rec := RecorderCB()])
    learn.fit(1, progress=False)
    first = [*rec.losses]
    with contextlib.suppress(Stop): learn.fit(3, cbs=[failing], progress=False)
    assert len(rec.losses) == len(rec.batches) and rec.losses[:12] == first
    learn.fit(1, progress=False)
    records = learn.records
    assert len(rec.losses) == len(rec.batches) and rec.batches[-12:] == [(1, i, [.1], [0.]) for i in range(12)]
    assert_close(sum(l*k for l, k in zip(rec.losses[-12:], [8]*11 + [2]))/90, records[0]['train_loss'])


def test_the_plot():
    import matplotlib.pyplot as plt
    for opt_func in momentum, SGD:
        learn = learner(cbs=[rec := RecorderCB(), Lower()], opt_func=opt_func)
        learn.fit(2, progress=False)
        before = plt.get_fignums()
        assert rec.plot() is None and len(plt.get_fignums()) == len(before) + 1
        losses, rates, *more = plt.gcf().axes
        assert [*losses.lines[0].get_ydata()] == rec.losses
        assert_close([*losses.lines[1].get_ydata()], smooth(rec.losses, .95))
        assert [*zip(*losses.lines[2].get_data())] == rec.valid and losses.get_yscale() == 'log'
        low = min(smooth(rec.losses, .95) + [loss for _, loss in rec.valid])
        assert_close(losses.get_ylim()[0], low/3)
        assert [*rates.lines[0].get_ydata()] == rec.lrs
        assert [[*ax.lines[0].get_ydata()] for ax in more] == [rec.momenta]*any(rec.momenta)
        plt.close()
    for values in [], [-1., 2.], [0.]*3:
        rec = RecorderCB()
        rec.losses = values
        rec.plot()
        assert plt.gcf().axes[0].get_yscale() == 'linear'
        plt.close()


# ---- its file

def test_the_file_of_a_killed_run_has_each_line_once(tmp_path):
    make = lambda path: learner(cbs=[RecorderCB(path)])
    there, cut = tmp_path/'straight.jsonl', tmp_path/'cut.jsonl'
    records = make(there).fit(3, progress=False)
    straight = lines_of(there)
    keys = [{'step', 'epoch', 'batch', 'loss', 'lr', 'momentum'}]*12 + [{'epoch', 'train_loss', 'valid_loss', 'seconds'}]
    assert [set(line) for line in straight] == keys*3
    assert [straight[12], straight[25], straight[38]] == records
    assert [line['step'] for line in straight if 'step' in line] == list(range(36))
    assert [straight[20][k] for k in ('step', 'epoch', 'batch', 'lr', 'momentum')] == [19, 2, 7, .1, 0]

    saved = killed(make(cut))
    load(make(cut), saved).fit(2, progress=False)                       # stops after epoch 2, past the checkpoint
    with open(cut, 'a') as file: file.write('{"step": 24, "epo')       # cut off in the middle of a line
    load(make(cut), saved).fit(3, progress=False)
    assert numbers(lines_of(cut)) == numbers(straight)

    other = make(cut)
    other.fit(1, progress=False)
    assert numbers(lines_of(cut)) == numbers(straight[:13])             # without a loaded state, a new file
    other.fit(1, progress=False)
    assert [line['step'] for line in lines_of(cut) if 'step' in line] == list(range(24))
    before = cut.read_bytes()
    other.evaluate()
    make(cut).evaluate()
    assert cut.read_bytes() == before
    cut.write_text('')                                                  # emptied from outside
    other.fit(1, progress=False)
    assert [line['step'] for line in lines_of(cut) if 'step' in line] == list(range(24, 36))


def test_a_failed_run_is_in_the_file(tmp_path):
    learn = learner(cbs=[RecorderCB(path := tmp_path/'run.jsonl')])
    learn.fit(1, progress=False)
    with pytest.raises(FloatingPointError): learn.fit(1, lr=1e30, progress=False)
    assert lines_of(path)[-1]['loss'] is None and len(lines_of(path)) == 13 + 12


def test_values_that_json_does_not_have(tmp_path):
    file = progress._JsonLines(str(tmp_path/'x'))
    file.write([{'a': float('inf'), 'b': float('nan'), 'n': 3, 'f': .5, 'd': torch.device('cpu')}])
    assert (tmp_path/'x').read_text() == '{"a": null, "b": null, "n": 3, "f": 0.5, "d": "cpu"}\n' and file.size == 53


@pytest.mark.parametrize('path', ['', 'none/x.jsonl'])
def test_a_file_that_cannot_be_written_raises_before_the_first_step(tmp_path, path):
    learn = learner(cbs=[RecorderCB(tmp_path/path)])                    # a folder, or in a folder that does not exist
    learn.evaluate()
    with pytest.raises(OSError): learn.fit(1, progress=False)
    assert learn.steps == 0


# ---- TensorBoard

def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()['scalars'] if not tag.endswith('seconds')}


def test_tensorboard_reads_what_was_written_also_after_a_power_cut(tmp_path):
    pytest.importorskip('tensorboard')
    board = TensorBoardCB(tmp_path/'a')
    records = learner(cbs=[board, rec := RecorderCB()]).fit(3, progress=False)
    straight = scalars(tmp_path/'a')
    assert [s for s, _ in straight['batch/loss']] == [s for s, _ in straight['batch/lr']] == list(range(36))
    assert_close([v for _, v in straight['batch/loss']], rec.losses)
    assert_close([v for _, v in straight['batch/lr']], rec.lrs)
    assert_close(straight['epoch/valid_loss'], [(11 + 12*i, r['valid_loss']) for i, r in enumerate(records)])
    assert set(straight) == {'batch/loss', 'batch/lr', 'epoch/train_loss', 'epoch/valid_loss'} and board.losses == rec.losses
    make = lambda: learner(cbs=[TensorBoardCB(tmp_path/'b')])
    saved = killed(make())
    time.sleep(1.1)                                        # TensorBoard names files by the second
    load(make(), saved).fit(3, progress=False)
    assert scalars(tmp_path/'b') == straight
    time.sleep(1.1)
    make().fit(1, progress=False)                          # a new run in the same folder
    again = scalars(tmp_path/'b')
    assert again == {tag: [p for p in points if p[0] < 12] for tag, points in straight.items()}


def test_calls_of_the_writer():
    made = []
    class Writer:
        def __init__(self, log_dir, purge_step):
            self.log_dir, self.purge, self.calls, self.closed = log_dir, purge_step, [], False
            made.append(self)
        def add_scalar(self, name, value, step): self.calls.append((name, value, step))
        def close(self): self.closed = True
    with patch.dict(sys.modules, {'torch.utils.tensorboard': types.SimpleNamespace(SummaryWriter=Writer)}):
        learn = learner(cbs=[TensorBoardCB(Path('runs/a'))])
    class Odd(Callback):
        def after_validate(self, learn): learn.record |= {'valid_name': 'x', 'valid_n': 3}
    learn.fit(1, cbs=[Odd()], progress=False)
    names = {name for name, _, _ in made[0].calls}
    assert names == {'batch/loss', 'batch/lr', 'epoch/train_loss', 'epoch/valid_loss', 'epoch/valid_n', 'epoch/seconds'}
    learn.evaluate()
    learn.fit(1, train=False, progress=False)
    assert len(made) == 1
    with pytest.raises(Stop): learn.fit(1, cbs=[Fail(1)], progress=False)
    assert [(w.log_dir, w.purge, w.closed) for w in made] == [('runs/a', 0, True), ('runs/a', 12, True)]
    assert [step for name, _, step in made[1].calls if name == 'batch/loss'] == list(range(12, 20))
    assert [w.calls[-1][2] for w in made] == [11, 19]


def test_without_tensorboard_the_message_says_what_to_do():
    with patch.dict(sys.modules, {'torch.utils.tensorboard': None}):
        with pytest.raises(ImportError, match=r'pip install "miniai\[tensorboard\]"'): TensorBoardCB('runs')


# ---- processes, pipes, terminals and notebooks

SCRIPT = '''
import os, sys, time, torch
sys.path.insert(0, {tests!r})
from test_progress import *
class Slow(Callback):
    def after_batch(self, learn): time.sleep(.02)
'''.format(tests=str(ROOT/'tests'))


def run(code, **kwargs):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'CI': ''} | kwargs.pop('env', {})
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, env=env, **kwargs)


def test_importing_the_module_imports_nothing_that_draws():
    heavy = 'matplotlib', 'IPython', 'tensorboard', 'tqdm'
    got = run(f'import torch, sys; b = set(sys.modules); import miniai.progress; print([m for m in {heavy} if m in set(sys.modules) - b])')
    assert got.stdout == '[]\n', got.stderr


def test_a_pipe_gets_a_table_and_nothing_else():
    got = run(SCRIPT + 'learner(cbs=[ProgressCB()]).fit(2)')
    assert got.stderr == '' and got.returncode == 0
    lines = got.stdout.splitlines()
    assert len(lines) == 4 and lines[1].split() == ['epoch', 'loss', 'loss', 'seconds'] and lines[3].split()[0] == '2'
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
    said, status = in_terminal(SCRIPT + 'learner(cbs=[ProgressCB(every=.05), Slow()]).fit(2)')
    assert status == 0, said
    lines = [line for line in screen(said) if line]
    assert len(lines) == 4 and lines[3].split()[0] == '2', lines
    assert re.search(r'epoch 1/2: +\d+%\|.*?\| \d+/15 \[\d\d:\d\d<\d\d:\d\d, .*?batch/s, loss \d\.\d{4}, lr 0\.1\]', said), said


def test_a_redraw_comes_at_most_twice_a_second():
    said, _ = in_terminal(SCRIPT + 'start = time.time(); learner(cbs=[ProgressCB(), Slow()]).fit(3); print(time.time() - start)')
    seconds = float(said.split()[-1])
    assert len(re.findall('lr 0.1', said)) <= 2*seconds + 2 + 3, said   # and a last one per epoch, before it is erased


def test_ctrl_c_leaves_a_clean_line():
    said, status = in_terminal(SCRIPT + 'learner(cbs=[ProgressCB(every=0), Slow()]).fit(50)', signal_after='epoch 2/50')
    assert status != 0
    before = said.split('Traceback')[0]
    assert [line for line in screen(before) if 'epoch 2/50' in line or '%|' in line] == [], before


def test_an_ascii_terminal_is_sent_ascii():
    said, status = in_terminal(SCRIPT + 'learner(cbs=[ProgressCB(every=0)]).fit(1)', env={'PYTHONIOENCODING': 'ascii'})
    assert status == 0 and said.isascii() and 'lr 0.1' in said


def test_a_notebook_stores_a_table_and_a_picture_and_a_plot_once(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('CI', '')
    monkeypatch.delenv('MPLBACKEND', raising=False)
    cells = [SCRIPT + 'rec = RecorderCB()\nlearner(cbs=[ProgressCB(), rec]).fit(2);', 'rec.plot()', 'rec.plot();', 'rec.plot(); x = 1']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(nb, kernel_name='python3', timeout=60).execute()
    text, curve = nb.cells[0].outputs
    assert [*text.data] == ['text/plain'] and len(text.data['text/plain'].splitlines()) == 4
    assert base64.b64decode(curve.data['image/png']).startswith(b'\x89PNG') and set(curve.data) == {'image/png', 'text/plain'}
    assert 'widgets' not in nb.metadata and '0x' not in curve.data['text/plain']
    for cell in nb.cells[1:]: assert ['image/png' in o.data for o in cell.outputs] == [True]


KILLED = '''
import os, sys, time, torch
sys.path.insert(0, {tests!r})
from test_progress import *
folder = os.environ['FOLDER']
state = folder + '/state'
class Slow(Callback):
    def after_batch(self, learn): time.sleep(.02)
class Checkpoint(Callback):
    order = 900
    def after_batch(self, learn):
        if not learn.training or learn.batch_idx % 5: return
        torch.save([o.state_dict() for o in (learn.model, learn.opt, learn, *learn.cbs)], state + '.new')
        os.replace(state + '.new', state)
learn = learner(cbs=[RecorderCB(folder + '/log.jsonl')])
if os.path.exists(state):
    for o, s in zip((learn.model, learn.create_opt(), learn, *learn.cbs), torch.load(state, weights_only=True)): o.load_state_dict(s)
learn.fit(6, cbs=[Checkpoint(), Slow()], progress=False)
'''.format(tests=str(ROOT/'tests'))


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
    learner(cbs=[RecorderCB(tmp_path/'straight.jsonl')]).fit(6, progress=False)
    assert numbers(lines_of(log)) == numbers(lines_of(tmp_path/'straight.jsonl'))
    assert [line['step'] for line in lines_of(log) if 'step' in line] == list(range(72))

"""The commands `miniai_train` and `miniai_predict`, as a user runs them (in a process of their own) and as functions."""
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import miniai.cli as cli
from miniai import __version__
from miniai.data import mnist
from miniai.learner import Callback

ROOT = Path(__file__).resolve().parent.parent
ENV = {k: v for k, v in os.environ.items() if k not in ('MINIAI_SAMPLE', 'MINIAI_DATA')} | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
QUICK = '--sample', '--epochs', '2', '--hidden', '30'


def command(name, *args):
    "The command line that starts one of the two commands, like the installed script"
    return [sys.executable, '-c', f'import sys; from miniai.cli import {name}; sys.exit({name}())', *map(str, args)]


def run(name, *args, cwd, env=(), **kw):
    return subprocess.run(command(name, *args), cwd=cwd, env=ENV | dict(env), capture_output=True, text=True, timeout=120, **kw)


def call(*args, command='miniai_train', draw=False):
    "Call a command as a function, without its picture; exit status, stdout and stderr"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv('CI', '1')
        if not draw: patch.setattr(cli, 'draw_run', lambda *args: Figure())
        try: status = getattr(cli, command)([*map(str, args)])
        except SystemExit as e: status = e.code
    return status, out.getvalue(), err.getvalue()


def rows(text):
    "The epochs in the table that a run prints"
    return [int(n) for n in re.findall(r'^ +(\d+) +\d+\.\d+ ', text, re.M)]


def train(*args, **kw): return run('miniai_train', *args, **kw)
def predict(*args, **kw): return run('miniai_predict', *args, **kw)


def one_line(done, status, *parts):
    "The command ended with this status and one line on stderr that contains all the parts"
    assert done.returncode == status, done.stderr
    assert done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr, done.stderr
    for part in parts: assert part in done.stderr


@pytest.fixture(scope='module')
def net(tmp_path_factory):
    "A folder with a network trained on the sample"
    folder = tmp_path_factory.mktemp('net')
    done = train('--sample', '--out', 'run', cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder/'run'


def bytes_of(x): return (x.view(28, 28)*256).byte().numpy()


def test_leaves_three_files_that_agree(net):
    assert sorted(f.name for f in net.iterdir()) == ['metrics.json', 'report.png', 'weights.safetensors']
    metrics = json.loads((net/'metrics.json').read_text())
    assert metrics['used'] == 'sample' and metrics['version'] == __version__
    assert len(metrics['epochs']) == metrics['arguments']['epochs'] == 10
    plain = torch.nn.Sequential(torch.nn.Linear(784, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10))
    plain.load_state_dict(load_file(net/'weights.safetensors'))
    x, y = mnist(sample=True).test
    assert (plain(x).argmax(1) == y).float().mean().item() == pytest.approx(metrics['test_accuracy'], abs=1e-5)
    assert metrics['test_accuracy'] > .88
    with Image.open(net/'report.png') as img: assert min(img.size) > 500 and np.asarray(img.convert('L')).std() > 20
    with safe_open(net/'weights.safetensors', 'pt') as f: about = json.loads(f.metadata()['miniai'])
    assert about['arguments'] == metrics['arguments'] and about['epoch'] == 10 and about['data'] == 'mnist'


def test_same_arguments_same_bytes_and_two_engines(tmp_path):
    first, second = (train(*QUICK, cwd=tmp_path) for _ in range(2))
    twin = train(*QUICK, '--engine', 'torch', '--out', 'twin', cwd=tmp_path)
    other = train(*QUICK, '--seed', '1', '--out', 'other', cwd=tmp_path)
    for done in first, second, twin, other:
        assert done.returncode == 0 and done.stderr == '' and rows(done.stdout) == [1, 2]
        assert re.search(r'^test accuracy 0\.\d{4} .*sample$', done.stdout, re.M)
    a, b, t, o = (tmp_path/f/'weights.safetensors' for f in ('runs/mnist-1', 'runs/mnist-2', 'twin', 'other'))
    assert a.read_bytes() == b.read_bytes() != o.read_bytes()
    torch.testing.assert_close(load_file(a), load_file(t), rtol=0, atol=.01)
    accuracy = [json.loads((f.parent/'metrics.json').read_text())['test_accuracy'] for f in (a, t)]
    assert abs(accuracy[0] - accuracy[1]) <= .01
    assert (a.parent/'report.png').read_bytes() == (b.parent/'report.png').read_bytes()


@pytest.mark.parametrize('args, message', [
    ('--epochs 0', '--epochs is 0, must be from 1 to 10,000'), ('--epochs 10001', '--epochs is 10001'), ('--epochs two', "'two'"),
    ('--epochs 1.5', "--epochs.*'1.5'"), ('--bs 0', '--bs'), ('--bs -3', '--bs'), ('--bs 1000001', '--bs'),
    ('--lr 0', '--lr'), ('--lr=-0.1', '--lr'), ('--lr nan', '--lr is nan'), ('--lr inf', '--lr'), ('--lr 2e6', '--lr'),
    ('--hidden 0', '--hidden'), ('--hidden 10001', '--hidden'), ('--seed -1', '--seed'), ('--seed 9223372036854775808', '--seed'),
    ('--threads 0', '--threads'), ('--threads 1025', '--threads'),
    ('--data cifar', "'cifar'"), ('--engine jax', "'jax'"), ('--epoch 3', '--epoch'), ('digits', 'digits'), ('--out', '--out'),
    ('--data fashion_mnist --sample', 'only a sample of mnist'),
    ('--resume --overwrite', 'use one of them'), ('--out old', 'not empty'), ('--out old/file', 'is a file'),
    ('--out old/file --overwrite', 'is a file')])
def test_wrong_arguments(tmp_path, monkeypatch, args, message):
    (tmp_path/'old').mkdir()
    (tmp_path/'old/file').write_text('mine')
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*args.split())
    assert (status, err.count('\n'), out) == (2, 1, '') and re.search(message, err), err
    assert [str(f.relative_to(tmp_path)) for f in sorted(tmp_path.rglob('*'))] == ['old', 'old/file']
    assert (tmp_path/'old/file').read_text() == 'mine'


def test_help_and_version(tmp_path):
    for name in 'miniai_train', 'miniai_predict':
        done = run(name, '--version', cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, f'miniai {__version__}\n')
        done = run(name, '--help', cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith(f'usage: {name}')
    help = ' '.join(train('-h', cwd=tmp_path).stdout.split())
    for option in 'data sample epochs bs lr hidden engine seed threads out overwrite resume version'.split(): assert f'--{option}' in help
    assert help.count('(default: ') == 10
    code = 'import sys, miniai.cli; print([m for m in ("torch", "numpy", "matplotlib", "PIL", "safetensors") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code],
                          env=ENV, capture_output=True, text=True)
    assert done.stdout == '[]\n'


def test_arguments_in_their_ranges():
    line = ('--data fashion_mnist --epochs 3 --bs 7 --lr .25 --hidden 9 --engine torch --seed 0 --threads 2 --out here --overwrite')
    assert cli._parse_train(line.split()) == dict(data='fashion_mnist', epochs=3, bs=7, lr=.25, hidden=9, engine='torch', seed=0,
                                                  threads=2, out='here', overwrite=True)
    for line in ('--epochs 1|--epochs 10000|--bs 1|--bs 1000000|--hidden 1|--hidden 10000|--threads 1|--threads 1024|'
                 '--seed 9223372036854775807|--lr 1e-9|--lr 1e6').split('|'):
        (name, value), = cli._parse_train(line.split()).items()
        assert value == (float if name == 'lr' else int)(line.split()[1])
    assert cli._parse_train([]) == {} and cli._parse_train(['--sample', '--resume']) == {'sample': True, 'resume': True}
    assert cli._RECIPE == dict(epochs=10, bs=128, lr=.5, hidden=200, engine='ours', seed=42)


def test_overwrite_replaces_only_its_own_files(tmp_path):
    (tmp_path/'run').mkdir()
    for name in 'weights.safetensors', 'report.png', 'notes.txt': (tmp_path/'run'/name).write_text('mine')
    done = train(*QUICK, '--out', 'run', '--overwrite', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(f.name for f in (tmp_path/'run').iterdir()) == ['metrics.json', 'notes.txt', 'report.png', 'weights.safetensors']
    assert (tmp_path/'run/notes.txt').read_text() == 'mine'
    load_file(tmp_path/'run/weights.safetensors')


def test_no_data(tmp_path):
    one = train('--data', 'fashion_mnist', cwd=tmp_path, env={'MINIAI_DATA': str(tmp_path/'none')})
    assert one.returncode == 1 and 'Fashion-MNIST' in one.stderr and 'MINIAI_DATA' in one.stderr and 'Traceback' not in one.stderr
    one_line(train('--data', 'fashion_mnist', cwd=tmp_path, env={'MINIAI_SAMPLE': '1'}), 1, 'sample')
    one_line(train(cwd=tmp_path, env={'MINIAI_SAMPLE': 'perhaps'}), 1, "'perhaps'")
    assert list(tmp_path.rglob('*')) in ([], [tmp_path/'runs'])


def test_sample_by_environment(tmp_path):
    done = train('--epochs', '1', cwd=tmp_path, env={'MINIAI_SAMPLE': '1'})
    assert done.returncode == 0 and 'sample' in done.stdout and done.stderr == ''


def test_divergence(tmp_path):
    done = train('--sample', '--lr', '1e6', cwd=tmp_path)
    one_line(done, 1, 'the loss became', 'learning rate', 'nothing was saved')
    assert list(tmp_path.rglob('*')) == [tmp_path/'runs']


def small_files():
    "Allow only files of at most 20 KB, to simulate a full disk"
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_full_disk_and_folders_that_cannot_be(tmp_path):
    (tmp_path/'file').touch()
    one_line(train(*QUICK, '--out', 'file/run', cwd=tmp_path), 1, 'file/run')
    if Path('/proc/self').exists(): one_line(train(*QUICK, '--out', '/proc/run', cwd=tmp_path), 1)
    one_line(train(*QUICK, '--out', 'run', cwd=tmp_path, preexec_fn=small_files), 1, 'nothing was saved')
    (tmp_path/'empty').mkdir()
    one_line(train(*QUICK, '--out', 'empty', cwd=tmp_path, preexec_fn=small_files), 1, 'nothing was saved')
    assert sorted(f.name for f in tmp_path.rglob('*')) == ['empty', 'file']
    assert train(*QUICK, '--out', 'old', cwd=tmp_path).returncode == 0
    before = {f.name: f.read_bytes() for f in (tmp_path/'old').iterdir() if f.suffix != '.png'}
    one_line(train(*QUICK, '--out', 'old', '--overwrite', '--seed', '5', cwd=tmp_path, preexec_fn=small_files), 1)
    assert {f.name: f.read_bytes() for f in (tmp_path/'old').iterdir() if f.suffix != '.png'} == before


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_read_only_folder(tmp_path):
    (tmp_path/'run').mkdir(mode=0o555)
    one_line(train(*QUICK, '--out', 'run', cwd=tmp_path), 1, 'Permission denied')


def start(folder, *args, **kw):
    "A very long run"
    return subprocess.Popen(command('miniai_train', '--sample', '--epochs', 9999, *args), cwd=folder, env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


def wait_for(path, process):
    until = time.monotonic() + 90
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(.01)


@pytest.mark.parametrize('number, status, word, ignored', [(signal.SIGINT, 130, 'interrupted', False),
                                                           (signal.SIGINT, 130, 'interrupted', True),
                                                           (signal.SIGTERM, 143, 'terminated', False)])
def test_stopped_by_a_signal(tmp_path, number, status, word, ignored):
    "Also when the caller had set the signal to be ignored, as a shell does for background jobs"
    process = start(tmp_path, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL))
    run = tmp_path/'runs/mnist-1'
    wait_for(run/'metrics.json', process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    done = len(json.loads((run/'metrics.json').read_text())['epochs'])
    resume = 'miniai_train --resume --out runs/mnist-1'
    assert err == f'miniai_train: {word}: epoch {done} is saved in runs/mnist-1; to continue: {resume}\n' and process.returncode == status
    assert sorted(f.name for f in run.iterdir()) == ['checkpoints', 'metrics.json', 'weights.safetensors']
    assert predict(run/'weights.safetensors', 'none.png', cwd=tmp_path).stderr.endswith('no such file\n')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('delay', [.1, .8, 1.5])
def test_stopped_early(tmp_path, delay, number):
    "From the moment at which the command itself runs, also while PyTorch is being imported"
    code = 'import sys, miniai.cli; print("here", flush=True); sys.exit(miniai.cli.miniai_train())'
    process = subprocess.Popen([sys.executable, '-c', code, '--sample', '--epochs', '9999'], cwd=tmp_path, env=ENV, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == 'here\n'
    time.sleep(delay)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    word, status = {signal.SIGINT: ('interrupted', 130), signal.SIGTERM: ('terminated', 143)}[number]
    assert process.returncode == status and err.count('\n') == 1 and word in err, err
    assert list(tmp_path.rglob('*')) in ([], [tmp_path/'runs']) or 'to continue: miniai_train --resume' in err


def test_kill_leaves_complete_files(tmp_path):
    for k in range(4):
        process = start(tmp_path, '--out', f'run{k}')
        wait_for(tmp_path/f'run{k}/metrics.json', process)
        time.sleep(.03*k)
        process.kill()
        process.communicate()
        state, metrics = load_file(tmp_path/f'run{k}/weights.safetensors'), json.loads((tmp_path/f'run{k}/metrics.json').read_text())
        assert state['0.weight'].shape == (200, 784) and len(metrics['epochs']) >= 1
    done = train(*QUICK, '--out', 'run0', '--overwrite', cwd=tmp_path)
    assert done.returncode == 0


def without_seconds(folder):
    metrics = json.loads((folder/'metrics.json').read_text())
    for record in metrics['epochs']: del record['seconds']
    return metrics


@pytest.mark.parametrize('engine', ['ours', 'torch'])
def test_killed_and_resumed(tmp_path, engine):
    "Killed twice and interrupted once, a run ends with the bytes of an uninterrupted one"
    args = '--sample', '--epochs', 30, '--hidden', 20, '--bs', 100, '--engine', engine
    unbroken = train(*args, '--out', 'unbroken', cwd=tmp_path)
    assert unbroken.returncode == 0
    run = tmp_path/'runs/mnist-1'
    lives = (args, signal.SIGKILL), (('--resume',), signal.SIGINT), (('--resume', '--seed', 42), signal.SIGTERM)
    for k, (first, sig) in enumerate(lives):
        process = subprocess.Popen(command('miniai_train', *first), cwd=tmp_path, env=ENV, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        for line in process.stdout:
            if rows(line): break
        time.sleep(.01*k)
        process.send_signal(sig)
        out, err = process.communicate(timeout=60)
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(sig, -sig), err
        if first != args: assert 'resuming' not in err
    assert (run/'checkpoints').exists()
    one_line(train('--resume', '--lr', .3, cwd=tmp_path), 2, '--lr is 0.3', 'was started with 0.5')
    done = train('--resume', cwd=tmp_path)
    assert done.returncode == 0 and '\nresuming the run in runs/mnist-1\n' in done.stdout and rows(done.stdout)[-1] == 30, done.stderr
    for name in 'weights.safetensors', 'report.png': assert (run/name).read_bytes() == (tmp_path/'unbroken'/name).read_bytes()
    assert without_seconds(run) == without_seconds(tmp_path/'unbroken')
    assert sorted(f.name for f in run.iterdir()) == ['metrics.json', 'report.png', 'weights.safetensors']
    done = train('--resume', '--out', run, cwd=tmp_path)
    assert done.returncode == 0 and 'is finished: test accuracy 0.' in done.stdout


def test_nothing_to_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = call('--resume')
    assert status == 1 and 'no unfinished run in runs/' in err and list(tmp_path.iterdir()) == []
    (tmp_path/'other').mkdir()
    (tmp_path/'other/notes.txt').touch()
    status, _, err = call('--resume', '--out', 'other')
    assert status == 1 and 'other contains no run to resume' in err
    for text in '[]', '{', '7', '{"epochs": []}':
        (tmp_path/'other/metrics.json').write_text(text)
        assert call('--resume', '--out', 'other')[0] == 1


TINY = '--sample', '--epochs', 3, '--hidden', 5, '--bs', 500, '--lr', .1, '--seed', 1


@pytest.mark.parametrize('before', ['absent', 'empty', 'litter'])
def test_one_line_for_a_restart_loop(tmp_path, monkeypatch, before):
    "`--resume --out DIR` starts a run where there is none, continues it, and says when it is finished"
    monkeypatch.chdir(tmp_path)
    if before != 'absent': Path('run').mkdir()
    if before == 'litter': Path('run/.lock').touch()  # of a process that was killed at once
    class Stop(Callback):
        order = 4000
        def after_epoch(self, learn):
            if learn.epoch == 2: raise SystemExit(143)
    def stopped(*args, cbs=(), **kw): return train_net(*args, cbs=[*cbs, Stop()], **kw)
    train_net = cli.train_net
    line = *TINY, '--resume', '--out', 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, 'train_net', stopped)
        status, out, err = call(*line)
    assert status == 143 and err == 'miniai_train: terminated: epoch 2 is saved in run; to continue: miniai_train --resume --out run\n'
    assert 'resuming' not in out and rows(out)[:1] == [1]
    status, out, err = call(*line)
    assert (status, err, rows(out)[-1]) == (0, '', 3) and 'resuming the run in run\n' in out
    assert call(*line) == (0, f'the run in run is finished: test accuracy {metrics_of("run")["test_accuracy"]:.4f}\n', '')
    assert sorted(f.name for f in Path('run').iterdir()) == ['metrics.json', 'report.png', 'weights.safetensors']
    assert call(*TINY, '--out', 'unbroken')[0] == 0
    assert Path('run/weights.safetensors').read_bytes() == Path('unbroken/weights.safetensors').read_bytes()
    for typed in ('--lr', .2), ('--epochs', 4), ('--hidden', 6), ('--bs', 501), ('--seed', 2), ('--engine', 'torch'), ('--threads', 2), \
            ('--data', 'fashion_mnist'):
        status, out, err = call('--resume', '--out', 'run', *typed)
        assert status == 2 and f'{typed[0]} is {typed[1]}, but the run in run was started with' in err and out == ''
    metrics = metrics_of('run') | {'used': 'whole'}
    Path('run/metrics.json').write_text(json.dumps(metrics))
    assert call('--resume', '--out', 'run', '--sample')[0] == 2


def metrics_of(folder): return json.loads((Path(folder)/'metrics.json').read_text())


def stopped_run(folder, epochs, **changes):
    "The folder of a run of 3 epochs that was stopped after some, or before the first"
    from miniai.checkpoints import CheckpointCB
    recipe = dict(epochs=3, bs=500, lr=.1, hidden=5, engine='ours', seed=1)
    class Stop(Callback):
        order = 4000
        def before_batch(self, learn):
            if learn.epochs_done == epochs: raise KeyboardInterrupt
    saves = Path(folder)/'checkpoints'
    shutil.rmtree(folder, ignore_errors=True)
    saves.mkdir(parents=True)
    (saves/'arguments.json').write_text(json.dumps(recipe | dict(data='mnist', sample=True, threads=1) | changes))
    try: cli.train_net(mnist(sample=True), **recipe, progress=False, cbs=[CheckpointCB(saves), Stop()])
    except KeyboardInterrupt: pass
    return saves


@pytest.mark.parametrize('epochs', [0, 1, 2, 3])
def test_resumed_after_any_epoch(tmp_path, monkeypatch, epochs):
    monkeypatch.chdir(tmp_path)
    unbroken, _ = cli.train_net(mnist(sample=True), epochs=3, bs=500, lr=.1, hidden=5, seed=1, progress=False)
    stopped_run('run', epochs)
    Path('run/.metrics.json.99.part').touch()  # left by a process that was killed while writing
    status, out, err = call('--resume', '--out', 'run')
    assert (status, err, rows(out)) == (0, '', [*range(epochs + 1, 4)])
    assert sorted(f.name for f in Path('run').iterdir()) == ['metrics.json', 'report.png', 'weights.safetensors']
    net, about = cli.load_net('run/weights.safetensors')
    torch.testing.assert_close(net.state_dict(), unbroken.state_dict(), rtol=0, atol=0)
    assert about['epoch'] == 3 and [e['epoch'] for e in metrics_of('run')['epochs']] == [1, 2, 3]


def test_resumed_from_the_older_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saves = stopped_run('run', 2)
    (saves/'checkpoint-000002/state.safetensors').write_bytes(b'')
    status, out, err = call('--resume', '--out', 'run')
    assert (status, rows(out)) == (0, [2, 3]) and err.count('miniai_train: ') == 1 and 'checkpoint-000002' in err
    saves = stopped_run('run', 1)
    (saves/'checkpoint-000001/manifest.json').unlink()
    status, out, err = call('--resume', '--out', 'run')
    assert status == 1 and 'damaged' in err and (saves/'arguments.json').exists()


def test_unfinished_runs(tmp_path, monkeypatch):
    "The one started last is the default; a contradiction is named; only the sample is there; the run diverges"
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(('runs/b', 'runs/a', 'elsewhere')):
        saves = stopped_run(name, 0)
        os.utime(saves/'arguments.json', ns=(0, k))
    assert cli._last_run() == Path('runs/a')
    status, out, err = call('--resume', '--lr', .3)
    assert status == 2 and '--lr is 0.3, but the run in runs/a was started with 0.1' in err
    assert call('--resume', '--lr', .1, '--sample')[0] == 0 and not Path('runs/a/checkpoints').exists()
    stopped_run('full', 1, sample=False)
    monkeypatch.setenv('MINIAI_DATA', str(tmp_path/'none'))
    assert call('--resume', '--out', 'full')[0] == 1 and Path('full/checkpoints/arguments.json').exists()
    saves = stopped_run('run', 1)
    def diverges(*args, **kw): raise FloatingPointError('the loss became nan')
    monkeypatch.setattr(cli, 'train_net', diverges)
    status, out, err = call('--resume', '--out', 'run')
    assert status == 1 and 'the loss became nan' in err and 'to continue' not in err and not saves.exists()


def test_new_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [str(cli._run_folder(out, 'x')) for out in (None, None, 'new/deep', 'new/deep')]
    assert found == ['runs/x-1', 'runs/x-2', 'new/deep', 'new/deep'] and all(Path(f).is_dir() for f in found)
    for out in 'yours', 'its':
        if out == 'yours': Path(out).mkdir()  # an existing empty folder stays, one that the command made is removed
        assert call('--sample', '--lr', 1e6, '--out', out)[0] == 1 and Path(out).exists() == (out == 'yours')


def test_two_at_once(tmp_path):
    first = start(tmp_path, '--out', 'run')
    wait_for(tmp_path/'run/checkpoints/checkpoint-000001', first)
    for line in ('--resume',), (*QUICK, '--overwrite'), ('--sample',):
        one_line(train(*line, '--out', 'run', cwd=tmp_path), 1, 'in use by another run')
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert first.returncode == 130


@pytest.mark.parametrize('moment, second', [('_train_into', '--overwrite'), ('save_run', '--overwrite'), ('draw_run', '--overwrite'),
                                            ('draw_run', '--resume')])
def test_a_second_run_is_locked_out_until_the_first_has_ended(tmp_path, monkeypatch, moment, second):
    "At every stage: while it reads the data, trains, evaluates, draws and saves"
    monkeypatch.chdir(tmp_path)
    said, first = [], getattr(cli, moment)
    def interfere(*args, **kw):
        if not said: said.append(run('miniai_train', '--sample', '--epochs', 1, '--out', 'run', second, cwd=tmp_path))
        return first(*args, **kw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, moment, interfere)
        status, out, err = call(*TINY, '--out', 'run', draw=True)
    assert (status, err, said[0].returncode) == (0, '', 1) and 'in use by another run' in said[0].stderr
    assert metrics_of('run')['arguments']['seed'] == 1
    assert sorted(f.name for f in Path('run').iterdir()) == ['metrics.json', 'report.png', 'weights.safetensors']


def test_full_disk_at_bad_moments(tmp_path, monkeypatch):
    import miniai.files as files_of
    monkeypatch.chdir(tmp_path)
    sync = files_of._sync
    ends = set()
    for files in range(0, 30, 3):
        left = files
        def full(path):
            nonlocal left
            left -= 1
            if left < 0: raise OSError(28, 'No space left on device')
            sync(path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files_of, '_sync', full)
            status, out, err = call(*TINY, '--out', 'a folder', '--overwrite')
        if status == 0: break
        assert status == 1 and err.count('\n') == 1 and 'No space left on device' in err
        resumable = "to continue: miniai_train --resume --out 'a folder'" in err
        ends.add((resumable, 'is saved in a folder' in err, 'nothing was saved' in err))
        if resumable:
            status, out, err = call('--resume', '--out', 'a folder')
            assert status == 0 and len(metrics_of('a folder')['epochs']) == 3
        shutil.rmtree('a folder', ignore_errors=True)
    assert (False, False, True) in ends and (True, True, False) in ends


def test_signal_handlers_are_put_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    threads = torch.get_num_threads()
    assert call(*TINY, '--threads', 2, '--out', 'run')[0] == 0
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before and torch.get_num_threads() == threads
    found = []
    thread = threading.Thread(target=lambda: found.append(cli._command('me', lambda: 3)))  # where signals cannot be handled
    thread.start()
    thread.join()
    assert found == [3]


def test_expected_errors_become_lines(capsys):
    def fails(e):
        def work(): raise e
        return work
    for e, status, line in ((cli._Stop('too bad'), 1, 'too bad'), (cli._Stop('wrong', 2), 2, 'wrong'),
                            (KeyboardInterrupt(), 130, 'interrupted'), (SystemExit(143), 143, 'terminated'),
                            (OSError(28, 'full', 'w'), 1, "[Errno 28] full: 'w'")):
        assert cli._command('me', fails(e)) == status and capsys.readouterr().err == f'me: {line}\n'
    assert cli._command('me', lambda: None) == 0
    with pytest.raises(RuntimeError, match='ours'): cli._command('me', fails(RuntimeError('ours')))


def test_warnings_are_errors(tmp_path):
    "What NumPy and matplotlib will not do in the next version is not done, neither in the report nor in predictions"
    Image.fromarray(bytes_of(mnist(sample=True).test.x[0])).save(tmp_path/'d.png')
    code = 'import sys; from miniai.cli import {0}; sys.exit({0}())'
    for line in 'miniai_train --sample --epochs 1 --out run', 'miniai_predict run/weights.safetensors d.png':
        name, *args = line.split()
        done = subprocess.run([sys.executable, '-W', 'error', '-c', code.format(name), *args], cwd=tmp_path, env=ENV,
                              capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, '')


def test_no_home(tmp_path, monkeypatch):
    "A user of a container without HOME and without an entry in passwd: the sample is used, with a warning"
    import platformdirs

    import miniai.data
    def homeless(*args, **kw): raise RuntimeError('Could not determine home directory.')
    monkeypatch.setattr(platformdirs, 'user_cache_path', homeless)
    monkeypatch.setattr(miniai.data, '_told', set())
    for name in 'MINIAI_DATA', 'MINIAI_SAMPLE': monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    status, out, err = call('--epochs', 1, '--out', 'run')
    assert status == 0 and 'of the sample' in out and err.startswith('miniai_train: Using the sample of 5,000 digits')


def test_output_cut_off(tmp_path):
    line = ' '.join(f"'{part}'" for part in command('miniai_train', *QUICK)) + ' | head -1'
    done = subprocess.run(['bash', '-c', line], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=60)
    assert 'Traceback' not in done.stderr and 'Exception' not in done.stderr, done.stderr


def test_threads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick, many = ('--sample', '--epochs', '1', '--bs', '1000', '--overwrite', '--out', 'run'), min(4, torch.get_num_threads())
    for args, n in (('--hidden', 5), 1), (('--hidden', 999), 1), (('--hidden', 1000), many), (('--hidden', 5, '--threads', 2), 2):
        status, out, err = call(*quick, *args)
        assert status == 0 and f'threads {n}\n' in out and metrics_of('run')['arguments']['threads'] == n


def test_predicts_in_a_process(tmp_path, net):
    x, y = mnist(sample=True).test
    names = [f'{k}.png' for k in range(10)]
    for image, name in zip(x, names): Image.fromarray(bytes_of(image)).save(tmp_path/name)
    done = predict(net/'weights.safetensors', *names, cwd=tmp_path)
    lines = [re.fullmatch(r'(\d+\.\w+): (\d) \(([01]\.\d\d)\)', line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [m[1] for m in lines] == names
    probs = cli.probabilities(cli.load_net(net/'weights.safetensors')[0], x[:10])
    assert [m[2] for m in lines] == [str(k) for k in probs.argmax(1).tolist()]
    assert [m[3] for m in lines] == [f'{p:.2f}' for p in probs.amax(1)]


def test_report():
    "Mistakes in order, curves, counts, names of clothes"
    probs = torch.tensor([[.7, .2, .1], [.6, .3, .1], [.1, .8, .1], [.8, .1, .1], [0., 1., 0.]])
    labels = torch.tensor([0, 1, 1, 2, 0])
    assert cli.worst_mistakes(probs, labels).tolist() == [4, 3, 1] and cli.worst_mistakes(probs, labels, 2).tolist() == [4, 3]
    assert cli.worst_mistakes(probs, probs.argmax(1)).tolist() == []
    digits = mnist(sample=True)
    net, records = cli.train_net(digits, epochs=2, hidden=50, seed=3, progress=False)
    probs, (x, y) = cli.probabilities(net, digits.valid.x), digits.valid
    for classes, n in (tuple('0123456789'), 500), (cli._CLASSES['fashion_mnist'], 40), (tuple('0123456789'), 3):
        fig = cli.draw_run(records, x[:n], y[:n], probs[:n], classes, 'a title')
        worst = cli.worst_mistakes(probs[:n], y[:n]).tolist()
        mistakes = [ax for ax in fig.axes if ax.get_title()]
        assert [ax.get_title() for ax in mistakes] == [f'{classes[y[i]]}\nnot {classes[probs[i].argmax()]}' for i in worst]
        for ax, i in zip(mistakes, worst):
            np.testing.assert_array_equal(ax.images[0].get_array(), x[i].view(28, 28).numpy())
        lines = {line.get_label(): list(line.get_ydata()) for ax in fig.axes for line in ax.lines if len(line.get_xdata()) == 2}
        for name in 'train_loss', 'valid_loss', 'valid_accuracy':
            assert lines[name.replace('_', ' ')] == [getattr(r, name) for r in records]
        fig.savefig(io.BytesIO())


def test_training_as_a_function():
    "The recipe by hand; random state; a loss that is not finite"
    digits = mnist(sample=True)
    def by_hand(seed, lr, bs, hidden):
        torch.manual_seed(seed)
        net = cli.make_net(hidden, 'torch')
        for idx in torch.randperm(len(digits.train.x), generator=torch.Generator().manual_seed(seed)).split(bs):
            torch.nn.functional.cross_entropy(net(digits.train.x[idx]), digits.train.y[idx]).backward()
            for p in net.parameters(): p.data -= lr*p.grad; p.grad = None
        return dict(net.state_dict())
    for kw in dict(seed=3, lr=.1, bs=64, hidden=20), dict(seed=42, lr=.5, bs=128, hidden=200):
        given = kw if kw['seed'] == 3 else {}  # the second time with the defaults
        before = torch.get_rng_state()
        net, _ = cli.train_net(digits, 1, progress=False, **given)
        torch.testing.assert_close(torch.get_rng_state(), before)
        torch.testing.assert_close(dict(net.state_dict()), by_hand(**kw), rtol=1e-3, atol=1e-4)
    for bs in 128, 4000:  # with one step per epoch only the validation loss is not finite
        with pytest.raises(FloatingPointError, match='the loss became'): cli.train_net(digits, 1, bs, lr=1e30, progress=False)
    with pytest.raises(KeyError, match='jax'): cli.make_net(7, 'jax')
    net, _ = cli.train_net(digits, 1, 500, hidden=5, progress=False, engine='torch')
    assert type(net[0]) is torch.nn.Linear


def test_saved_and_loaded(tmp_path):
    net = cli.make_net(7)
    info = {'data': 'mnist', 'used': 'sample', 'arguments': {'hidden': 7}, 'version': '0', 'epochs': [{'epoch': 1}]}
    cli.save_run(tmp_path, net, info, b'a picture')
    assert metrics_of(tmp_path) == info and (tmp_path/'report.png').read_bytes() == b'a picture'
    before = torch.get_rng_state()
    loaded, about = cli.load_net(tmp_path/'weights.safetensors')
    torch.testing.assert_close(torch.get_rng_state(), before)
    torch.testing.assert_close(loaded.state_dict(), net.state_dict(), rtol=0, atol=0)
    assert about == {k: info[k] for k in ('data', 'used', 'arguments', 'version')} | {'epoch': 1} and loaded[0].weight.requires_grad
    assert type(cli.load_net(tmp_path/'weights.safetensors', 'torch')[0][0]) is torch.nn.Linear
    cli.save_run(tmp_path, net, info)  # the picture shows other weights
    assert sorted(f.name for f in tmp_path.iterdir()) == ['metrics.json', 'weights.safetensors']
    for remark, about in ((None, {}), ('{', {}), ('[1]', {}), ('['*100_000, {}), ('{"epoch": 2}', {'epoch': 2})):
        save_file(net.state_dict(), tmp_path/'w', remark and {'miniai': remark})
        assert cli.load_net(tmp_path/'w')[1] == about
    state = net.state_dict()
    for wrong, what in ((state | {'4.bias': torch.zeros(3)}, '4.bias'), (state | {'0.weight': torch.zeros(7, 9)}, r'\[7, 9\]'),
                        ({k: v for k, v in state.items() if k != '2.bias'}, '2.bias'), ({'k': torch.zeros(1)}, '0.bias'),
                        *((state | {'0.bias': torch.zeros(shape)}, '0.bias') for shape in ((), (0,), (7, 1)))):
        save_file(wrong, tmp_path/'w')
        with pytest.raises(ValueError, match=f'not weights of miniai_train: .*{what}'): cli.load_net(tmp_path/'w')
    for junk in b'', b'hello', (tmp_path/'weights.safetensors').read_bytes()[:-1]:
        (tmp_path/'w').write_bytes(junk)
        with pytest.raises(ValueError, match='not a safetensors file'): cli.load_net(tmp_path/'w')
    for absent in tmp_path/'nothing', tmp_path:
        with pytest.raises(FileNotFoundError, match='no such file'): cli.load_net(absent)


@pytest.mark.parametrize('data, side', [('mnist', 20), ('fashion_mnist', 28), ('runes', 20)])
def test_clothes_fill_the_picture_and_digits_do_not(tmp_path, monkeypatch, data, side):
    "A large picture is scaled as the data set of the weights is"
    import miniai.photos
    net, sides, prepare = cli.make_net(3), [], miniai.photos.prepare_image
    def noted(img, side):
        sides.append((img.size, side))
        return prepare(img, side)
    monkeypatch.setattr(miniai.photos, 'prepare_image', noted)
    monkeypatch.chdir(tmp_path)
    cli.save_run(tmp_path, net, {'data': data, 'epochs': []})
    Image.fromarray(255 - bytes_of(mnist(sample=True).test.x[0])).resize((280, 200)).save('large.png')
    status, out, err = call('weights.safetensors', 'large.png', command='miniai_predict')
    assert (status, err, sides) == (0, '', [((280, 200), side)]) and out.startswith('large.png: ')


def test_bad_pictures_are_named_and_skipped(tmp_path, net):
    Image.fromarray(bytes_of(mnist(sample=True).test.x[0])).save(tmp_path/'good one.png')
    (tmp_path/'text.png').write_text('not a picture')
    (tmp_path/'empty.png').touch()
    (tmp_path/'cut.png').write_bytes((tmp_path/'good one.png').read_bytes()[:150])
    Image.new('L', (300, 300), 200).save(tmp_path/'blank.jpg')
    Image.new('1', (9000, 9000)).save(tmp_path/'huge.png')
    bad = ['text.png', 'empty.png', 'cut.png', 'blank.jpg', 'huge.png', 'absent.png', '.']
    done = predict(net/'weights.safetensors', *bad, 'good one.png', cwd=tmp_path)
    assert done.returncode == 1 and re.fullmatch(r'good one\.png: \d \([01]\.\d\d\)\n', done.stdout)
    lines = done.stderr.splitlines()
    assert len(lines) == len(bad) and all(line.startswith(f'miniai_predict: {name}: ') for line, name in zip(lines, bad))


def test_strange_weights(tmp_path, monkeypatch, net):
    Image.fromarray(bytes_of(mnist(sample=True).test.x[0])).save(tmp_path/'d.png')
    save_file({'conv.weight': torch.zeros(3, 3)}, tmp_path/'other')
    state = load_file(net/'weights.safetensors')
    save_file(state | {'2.weight': torch.zeros(7, 200)}, tmp_path/'shape')
    torch.save(state, tmp_path/'pickle')
    (tmp_path/'cut').write_bytes((net/'weights.safetensors').read_bytes()[:-9])
    (tmp_path/'none').touch()
    monkeypatch.chdir(tmp_path)
    for data in '["x"]', '{}', 'null', '3', '"runes"': save_file(state, tmp_path/f'forged {data}', {'miniai': '{"data": %s}' % data})
    for name, status, *parts in (('other', 1, '0.weight'), ('shape', 1, '2.weight', '[7, 200]'), ('absent', 1, 'absent: no such file'),
                                 ('.', 1, 'no such file'),
                                 *((name, 1, name, 'not a safetensors file') for name in ('pickle', 'cut', 'none'))):
        found, out, err = call(name, 'd.png', command='miniai_predict')
        assert (found, out, err.count('\n')) == (status, '', 1) and all(part in err for part in parts), err
    for path in tmp_path.glob('forged *'): assert re.fullmatch(r'd\.png: \d .*\n', call(path, 'd.png', command='miniai_predict')[1])
    for args, name in ((net/'weights.safetensors',), 'IMAGE'), ((), 'WEIGHTS'):
        found, out, err = call(*args, command='miniai_predict')
        assert (found, err.count('\n')) == (2, 1) and name in err
    with torch.no_grad():
        sure = cli.make_net(3)
        for p in sure.parameters(): p.zero_()
        sure[2].bias[8] = 9
    (tmp_path/'f').mkdir()
    for data, name in ('fashion_mnist', 'bag'), ('runes', '8'):
        cli.save_run(tmp_path/'f', sure, {'data': data, 'epochs': []})
        assert call('f/weights.safetensors', 'd.png', command='miniai_predict')[:2] == (0, f'd.png: {name} (1.00)\n')


@pytest.mark.skipif('MINIAI_DATA' not in os.environ, reason='needs Fashion-MNIST: set MINIAI_DATA')
def test_clothes(tmp_path):
    from miniai.data import fashion_mnist
    env = {'MINIAI_DATA': os.environ['MINIAI_DATA']}
    done = train('--data', 'fashion_mnist', '--epochs', '1', '--hidden', '50', cwd=tmp_path, env=env)
    assert done.returncode == 0 and 'test accuracy 0.' in done.stdout, done.stderr
    x, y = fashion_mnist().test
    for k in range(20): Image.fromarray(bytes_of(x[k])).save(tmp_path/f'{k}.png')
    done = predict('runs/fashion_mnist-1/weights.safetensors', *[f'{k}.png' for k in range(20)], cwd=tmp_path)
    names = 'T-shirt trouser pullover dress coat sandal shirt sneaker bag boot'.split()
    assert sum(line.split()[1] == names[k] for line, k in zip(done.stdout.splitlines(), y[:20].tolist(), strict=True)) >= 12


@pytest.mark.skipif(not (ROOT/'settings.ini').exists(), reason='an installed package has no settings.ini')
def test_entry_points_exist():
    import miniai.cli
    found = re.findall(r'(miniai_\w+)=miniai\.cli:(\w+)', (ROOT/'settings.ini').read_text())
    assert len(found) == 2 and all(name == function and callable(getattr(miniai.cli, name)) for name, function in found)

"""The commands `miniai_train` and `miniai_predict`, run as a user runs them: in separate processes."""
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from miniai import __version__
from miniai.data import mnist

ROOT = Path(__file__).resolve().parent.parent
ENV = {k: v for k, v in os.environ.items() if k not in ('MINIAI_SAMPLE', 'MINIAI_DATA')} | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
QUICK = '--sample', '--epochs', '2', '--hidden', '30'


def command(name, *args):
    "The command line that starts one of the two commands, like the installed script"
    return [sys.executable, '-c', f'import sys; from miniai.cli import {name}; sys.exit({name}())', *map(str, args)]


def run(name, *args, cwd, env=(), **kw):
    return subprocess.run(command(name, *args), cwd=cwd, env=ENV | dict(env), capture_output=True, text=True, timeout=120, **kw)


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
        assert done.returncode == 0 and done.stderr == '' and len(re.findall('^epoch ', done.stdout, re.M)) == 2
        assert re.search(r'^test accuracy 0\.\d{4} .*sample$', done.stdout, re.M)
    a, b, t, o = (tmp_path/f/'weights.safetensors' for f in ('runs/mnist-1', 'runs/mnist-2', 'twin', 'other'))
    assert a.read_bytes() == b.read_bytes() != o.read_bytes()
    torch.testing.assert_close(load_file(a), load_file(t), rtol=0, atol=.01)
    accuracy = [json.loads((f.parent/'metrics.json').read_text())['test_accuracy'] for f in (a, t)]
    assert abs(accuracy[0] - accuracy[1]) <= .01
    assert (a.parent/'report.png').read_bytes() == (b.parent/'report.png').read_bytes()


@pytest.mark.parametrize('args, message', [
    ('--epochs 0', "--epochs: '0'"), ('--epochs two', "--epochs: 'two'"), ('--epochs 1.5', "'1.5' is not an integer"),
    ('--bs 0', '--bs'), ('--bs -3', '--bs'),
    ('--lr 0', '--lr'), ('--lr=-0.1', '--lr'), ('--lr nan', '--lr'), ('--lr inf', '--lr'), ('--hidden 0', '--hidden'),
    ('--hidden 99999999', '--hidden'), ('--seed -1', '--seed'), ('--seed 99999999999999999999', '--seed'), ('--threads 0', '--threads'),
    ('--data cifar', "'cifar'"), ('--engine jax', "'jax'"), ('--epoch 3', '--epoch'), ('digits', 'digits'), ('--out', '--out'),
    ('--data fashion_mnist --sample', 'only a sample of mnist'),
    ('--resume --overwrite', 'use one of them'), ('--out old', 'not empty'), ('--out old/file', 'is a file'),
    ('--out old/file --overwrite', 'is a file')])
def test_wrong_arguments(tmp_path, args, message):
    (tmp_path/'old').mkdir()
    (tmp_path/'old/file').write_text('mine')
    start = time.monotonic()
    done = train(*args.split(), cwd=tmp_path)
    one_line(done, 2)
    assert re.search(message, done.stderr) and done.stdout == ''
    assert time.monotonic() - start < 20
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
    assert help.count('(default: ') == 9
    done = subprocess.run([sys.executable, '-c', 'import sys, miniai.cli; print("torch" in sys.modules, "matplotlib" in sys.modules)'],
                          env=ENV, capture_output=True, text=True)
    assert done.stdout == 'False False\n'


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


@pytest.mark.parametrize('ignored', [False, True])
def test_ctrl_c(tmp_path, ignored):
    "Also when the caller had set the signal to be ignored, as a shell does for background jobs"
    process = start(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL))
    run = tmp_path/'runs/mnist-1'
    wait_for(run/'metrics.json', process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    done = len(json.loads((run/'metrics.json').read_text())['epochs'])
    resume = 'miniai_train --resume --out runs/mnist-1'
    assert process.returncode == 130 and err == f'miniai_train: interrupted: epoch {done} is saved in runs/mnist-1; to continue: {resume}\n'
    assert sorted(f.name for f in run.iterdir()) == ['checkpoints', 'metrics.json', 'weights.safetensors']
    assert predict(run/'weights.safetensors', 'none.png', cwd=tmp_path).stderr.endswith('no such file\n')


@pytest.mark.parametrize('delay', [.3, .8, 1.5])
def test_ctrl_c_early(tmp_path, delay):
    process = start(tmp_path)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.count('\n') == 1 and 'interrupted' in err, err
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
    lives = (args, signal.SIGKILL), (('--resume',), signal.SIGINT), (('--resume', '--seed', 42), signal.SIGKILL)
    for k, (first, sig) in enumerate(lives):
        process = subprocess.Popen(command('miniai_train', *first), cwd=tmp_path, env=ENV, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        for line in process.stdout:
            if line.startswith('epoch'): break
        time.sleep(.01*k)
        process.send_signal(sig)
        out, err = process.communicate(timeout=60)
        assert process.returncode == (130 if sig == signal.SIGINT else -sig), err
        if first != args: assert 'resuming' not in err
    assert (run/'checkpoints').exists()
    one_line(train('--resume', '--lr', .3, cwd=tmp_path), 2, '--lr is 0.3', 'was started with 0.5')
    done = train('--resume', cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith('resuming the run in runs/mnist-1; epochs done: '), done.stderr
    for name in 'weights.safetensors', 'report.png': assert (run/name).read_bytes() == (tmp_path/'unbroken'/name).read_bytes()
    assert without_seconds(run) == without_seconds(tmp_path/'unbroken')
    assert sorted(f.name for f in run.iterdir()) == ['metrics.json', 'report.png', 'weights.safetensors']
    done = train('--resume', '--out', run, cwd=tmp_path)
    assert done.returncode == 0 and 'is finished: test accuracy 0.' in done.stdout


def test_nothing_to_resume(tmp_path):
    one_line(train('--resume', cwd=tmp_path), 1, 'no unfinished run in runs/')
    one_line(train('--resume', '--out', 'none', cwd=tmp_path), 1, 'none contains no run')
    assert list(tmp_path.iterdir()) == []


def test_two_at_once(tmp_path):
    first = start(tmp_path, '--out', 'run')
    wait_for(tmp_path/'run/checkpoints/checkpoint-000001', first)
    one_line(train('--resume', '--out', 'run', cwd=tmp_path), 1, 'in use by another run', f'process {first.pid}')
    one_line(train(*QUICK, '--out', 'run', '--overwrite', cwd=tmp_path), 1, 'in use by another run')
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert first.returncode == 130


def test_output_cut_off(tmp_path):
    line = ' '.join(f"'{part}'" for part in command('miniai_train', *QUICK)) + ' | head -1'
    done = subprocess.run(['bash', '-c', line], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=60)
    assert 'Traceback' not in done.stderr and 'Exception' not in done.stderr, done.stderr


def test_threads_are_printed(tmp_path):
    quick = '--sample', '--epochs', '1', '--hidden', '5', '--bs', '1000'
    assert 'threads 1 (chosen for 5 hidden units' in train(*quick, cwd=tmp_path).stdout
    done = train(*quick, '--threads', '2', cwd=tmp_path)
    assert 'threads 2\n' in done.stdout and json.loads((tmp_path/'runs/mnist-2/metrics.json').read_text())['arguments']['threads'] == 2


def as_photo(x, rng, scale=10, noise=8):
    "Black on white, larger, off centre, on paper that is brighter on one side"
    size = 28*scale + 40
    ink = np.zeros((size, size))
    top, left = rng.integers(0, 41, 2)
    large = Image.fromarray(bytes_of(x)).resize((28*scale,)*2, Image.Resampling.BICUBIC)
    ink[top:top + 28*scale, left:left + 28*scale] = np.asarray(large)/255
    y, x = np.mgrid[-1:1:size*1j, -1:1:size*1j]
    paper = 185 + rng.uniform(-25, 25)*x + rng.uniform(-25, 25)*y - 12*(x*x + y*y)
    return Image.fromarray((paper*(1 - .75*ink) + rng.normal(0, noise, ink.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize('kind', ['as_is', 'inverted', 'large', 'photo.png', 'photo.jpg', 'noisy'])
def test_predicts_digits(tmp_path, net, kind):
    x, y = mnist(sample=True).test
    rng = np.random.default_rng(0)
    make = {'as_is': lambda r: Image.fromarray(bytes_of(r)), 'inverted': lambda r: Image.fromarray(255 - bytes_of(r)),
            'large': lambda r: Image.fromarray(255 - bytes_of(r)).resize((280, 280)).convert('RGB'),
            'noisy': lambda r: as_photo(r, rng, noise=25)}.get(kind, lambda r: as_photo(r, rng))
    names = [f'{k}.{"jpg" if "jpg" in kind else "png"}' for k in range(40)]
    for image, name in zip(x, names): make(image).save(tmp_path/name)
    done = predict(net/'weights.safetensors', *names, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [re.fullmatch(r'(\d+\.\w+): (\d) \(([01]\.\d\d)\)', line) for line in done.stdout.splitlines()]
    assert [m[1] for m in lines] == names
    assert np.mean([int(m[2]) == label for m, label in zip(lines, y.tolist())]) >= .9


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


def test_strange_weights(tmp_path, net):
    from safetensors.torch import save_file
    Image.fromarray(bytes_of(mnist(sample=True).test.x[0])).save(tmp_path/'d.png')
    save_file({'conv.weight': torch.zeros(3, 3)}, tmp_path/'other')
    state = load_file(net/'weights.safetensors')
    save_file(state | {'2.weight': torch.zeros(7, 200)}, tmp_path/'shape')
    torch.save(state, tmp_path/'pickle')
    (tmp_path/'cut').write_bytes((net/'weights.safetensors').read_bytes()[:-9])
    (tmp_path/'none').touch()
    one_line(predict('other', 'd.png', cwd=tmp_path), 1, '0.weight is absent')
    one_line(predict('shape', 'd.png', cwd=tmp_path), 1, '2.weight is F32 (7, 200), must be F32 (10, 200)')
    for name in 'pickle', 'cut', 'none': one_line(predict(name, 'd.png', cwd=tmp_path), 1, name, 'not a safetensors file')
    one_line(predict('absent', 'd.png', cwd=tmp_path), 1, 'absent: no such file')
    one_line(predict('.', 'd.png', cwd=tmp_path), 1, 'no such file')
    one_line(predict(net/'weights.safetensors', cwd=tmp_path), 2, 'IMAGE')
    one_line(predict(cwd=tmp_path), 2, 'WEIGHTS')


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

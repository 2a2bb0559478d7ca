"""Files that are complete or absent, checksums, values without code, locks and signals."""
import errno
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from common import same
from safetensors.torch import load_file, save_file

from miniai import files
from miniai.files import Damaged, StopSignals, lock_folder, new_path, pack, save_tensors, unpack, verify_files, write_checksums, write_files

# ---- values in files

ODD = [None, True, False, 0, 1, -3, 2**70, .1, 1/3, 5e-324, float('inf'), -float('inf'), float('nan'), -0., '', '$tensor', 'π', [], (), {},
       (1,), [[]], {0: 'a', 1: {'b': torch.tensor(2.)}}, {'$tensor': 'x'}, {'$dict': 1, 'y': 2}, {'y': 2, '$': 1},
       {(1, 'k'): None, 'k': 3}, {'a': {'': (torch.tensor([1, 2]), [torch.tensor(True)])}}]


@pytest.mark.parametrize('value', [*ODD, ODD], ids=lambda v: repr(v)[:20])
def test_odd_values_come_back_from_files(tmp_path, value):
    tensors = {}
    text = json.dumps(pack(value, tensors))
    save_file(tensors, tmp_path/'t')
    assert same(value, unpack(json.loads(text), load_file(tmp_path/'t')))


def test_pack_copies_nothing():
    stored, wide = {}, torch.arange(6.).view(2, 3).requires_grad_()
    assert pack((1, {'a': [wide]}), stored) == {'$tuple': [1, {'a': [{'$tensor': '0'}]}]}
    assert stored['0'].data_ptr() == wide.data_ptr() and not stored['0'].requires_grad
    pack(wide, stored)
    assert list(stored) == ['0', '1']


@pytest.mark.parametrize('value, plain', [(np.float32(.1), np.float32(.1).item()), (np.int64(5), 5), (np.bool_(True), True),
                                          (np.float64(.1), .1), ({'lr': np.float16(.5)}, {'lr': .5})])
def test_numpy_numbers_become_pythons(value, plain): assert same(pack(value, {}), plain)


@pytest.mark.parametrize('value, place', [({'opt': {'hook': print}}, 'value.opt.hook'), ([0, [set()]], r'value\[1\]\[0\]'),
                                          ({3: (object(),)}, r'value\.3\[0\]'), (np.zeros(2), 'value')])
def test_other_values_are_named(value, place):
    with pytest.raises(TypeError, match=f'^{place} is a '): pack(value, {})


# ---- files

def content(folder): return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(Path(folder).rglob('*')) if f.is_file()}


def test_files_are_replaced_together(tmp_path):
    write_files(tmp_path, {'a': b'old', 'b': b'old'})
    with pytest.raises(TypeError): write_files(tmp_path, {'a': b'new', 'b': 3})
    with pytest.raises(TypeError): write_files(tmp_path, {'a': 3, 'b': b'new'})
    assert content(tmp_path) == {'a': b'old', 'b': b'old'}
    write_files(str(tmp_path), {'a': b'new'})
    assert content(tmp_path) == {'a': b'new', 'b': b'old'}


def test_a_folder_appears_at_once_and_replaces_another(tmp_path):
    for text in 'one', 'two':
        with new_path(tmp_path/'deep/c') as part:
            part.mkdir()
            (part/'x').write_text(text)
            assert not (tmp_path/'deep/c').exists() or (tmp_path/'deep/c/x').read_text() == 'one'
    with pytest.raises(RuntimeError), new_path(tmp_path/'deep/c') as part:
        part.mkdir()
        (part/'x').touch()
        raise RuntimeError
    assert content(tmp_path) == {'deep/c/x': b'two'} and [p.name for p in (tmp_path/'deep').iterdir()] == ['c']
    with pytest.raises(OSError), new_path(tmp_path/'deep/c') as part: part.touch()    # a file replaces no folder
    assert content(tmp_path) == {'deep/c/x': b'two'}


def test_a_folder_is_put_back_if_the_second_rename_fails(tmp_path, monkeypatch):
    (tmp_path/'c').mkdir()
    (tmp_path/'c/old').touch()
    def fail(*args): raise OSError(errno.EIO, 'no')
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='no'), new_path(tmp_path/'c') as part: part.mkdir()
    assert [*content(tmp_path)] == ['c/old'] and len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize('system, calls', [('posix', ['file', 'file', 'folder', 'replace', 'folder']), ('nt', ['file', 'file', 'replace'])])
def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch, system, calls):
    seen, fsync, replace = [], os.fsync, os.replace
    def noted_fsync(fd):
        seen.append('folder' if stat.S_ISDIR(os.fstat(fd).st_mode) else 'file')
        fsync(fd)
    def noted_replace(*args):
        seen.append('replace')
        replace(*args)
    with new_path(tmp_path/'c') as part:
        part.mkdir()
        for name in 'a', 'b': (part/name).touch()
        monkeypatch.setattr(os, 'fsync', noted_fsync)
        monkeypatch.setattr(os, 'replace', noted_replace)
        monkeypatch.setattr(files.os, 'name', system)
    monkeypatch.undo()
    assert seen == calls


@pytest.mark.parametrize('code, kind', [(errno.EINVAL, 'folder'), (errno.EIO, 'folder'), (errno.EINVAL, 'file')])
def test_only_a_folder_may_lack_fsync(tmp_path, monkeypatch, code, kind):
    def fail(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode) == (kind == 'folder'): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, 'fsync', fail)
    if (code, kind) == (errno.EINVAL, 'folder'):
        with pytest.warns(UserWarning, match='cannot fsync a folder'): write_files(tmp_path, {'a': b'new'})
        assert content(tmp_path) == {'a': b'new'}
    else:
        with pytest.raises(OSError, match=os.strerror(code)): write_files(tmp_path/'b', {'a': b'new'})
        if kind == 'file': assert content(tmp_path) == {}


# ---- checksums

@pytest.fixture
def sealed(tmp_path):
    write_files(tmp_path/'c', {'a': bytes(range(200)), 'b': b'ink'})
    write_checksums(str(tmp_path/'c'), ['a', 'b'])
    return tmp_path/'c'


def test_checksums_are_those_of_sha256sum(sealed):
    found = content(sealed)
    lines = found.pop('SHA256SUMS').decode()
    assert lines == ''.join(f'{hashlib.sha256(data).hexdigest()}  {name}\n' for name, data in found.items())


@pytest.mark.parametrize('name', ['a', 'b', 'SHA256SUMS'])
def test_every_damage_is_found(sealed, name):
    path, dice = sealed/name, random.Random(0)
    data = path.read_bytes()
    flips = [(dice.randrange(len(data)), 1 << dice.randrange(8)) for _ in range(40)]
    for hurt in (b'', data[:-1], b'\xff'*9, *(data[:i] + bytes([data[i] ^ k]) + data[i + 1:] for i, k in flips)):
        path.write_bytes(hurt)
        with pytest.raises(Damaged, match=f'^{sealed}'): verify_files(sealed, ['a', 'b'])
    path.unlink()
    with pytest.raises(Damaged, match=f'damaged or incomplete .*{name}'): verify_files(sealed, ['a', 'b'])


def test_files_are_verified_by_name(sealed):
    (sealed/'b').write_bytes(b'oil')
    verify_files(str(sealed), ['a'])
    with pytest.raises(Damaged, match='c: b is damaged: its checksum is wrong'): verify_files(sealed, ['a', 'b'])
    (sealed/'new').touch()
    with pytest.raises(Damaged, match='new is damaged'): verify_files(sealed, ['new'])     # it has no line
    for path in sealed/'nothing', sealed/'a':
        with pytest.raises(FileNotFoundError, match='no such folder'): verify_files(path, ['a'])


# ---- tensors

def test_tensors_that_share_memory(tmp_path):
    base = torch.arange(6.).view(2, 3)
    tensors = {'base': base, 'again': base, 'row': base[0], 'turned': base.T, 'weight': torch.nn.Parameter(base), 'none': torch.empty(0)}
    save_tensors(tmp_path/'t', tensors)
    torch.testing.assert_close(load_file(tmp_path/'t'), {k: t.detach() for k, t in tensors.items()}, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_dtypes(tmp_path, dtype):
    save_tensors(str(tmp_path/'t'), {'x': torch.tensor([0, 1]).to(dtype)})
    assert same(load_file(tmp_path/'t'), {'x': torch.tensor([0, 1]).to(dtype)})


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match='^t: '): save_tensors(tmp_path/'missing'/'t', {'x': torch.ones(2)})


# ---- locks and signals

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    with lock_folder(tmp_path):
        if not (child := os.fork()):   # like a loader's worker, which may outlive a killed process
            time.sleep(20)
            os._exit(0)
    try:
        with lock_folder(tmp_path): pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_lock_is_free_after_the_block(tmp_path):
    with pytest.raises(RuntimeError), lock_folder(str(tmp_path/'deep/new')): raise RuntimeError
    with lock_folder(tmp_path/'deep/new'):
        with pytest.raises(BlockingIOError, match='new is in use by another run'), lock_folder(tmp_path/'deep/new'): pass
        with lock_folder(tmp_path): pass


def test_a_disk_without_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip('fcntl')
    code = errno.ENOLCK
    def fail(*args): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(fcntl, 'flock', fail)
    with pytest.warns(UserWarning, match='this disk has no locks'), lock_folder(tmp_path): pass
    code = errno.EPERM
    with pytest.raises(PermissionError), lock_folder(tmp_path): pass


NUMBERS = signal.SIGINT, signal.SIGTERM
handlers = lambda: [signal.getsignal(n) for n in NUMBERS]


def test_signals_are_noted_and_delivered():
    before = handlers()
    for number, error, text in (signal.SIGINT, KeyboardInterrupt, 'saved'), (signal.SIGTERM, SystemExit, '143'):
        with StopSignals() as signals:
            assert signals.caught is None
            signal.raise_signal(number)
            assert signals.caught == number
        assert handlers() == before
        with pytest.raises(error, match=text): signals.deliver('saved')
    with signals: assert signals.caught is None                                       # can be used again


@pytest.mark.parametrize('first', NUMBERS)
def test_the_second_ctrl_c_acts_at_once(first):
    before = handlers()
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGTERM)
        assert signals.caught == first
        signal.raise_signal(signal.SIGINT)
    assert handlers() == before


def test_handlers_of_the_program(monkeypatch):
    told, before = [], signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with StopSignals() as signals: signal.raise_signal(signal.SIGTERM)
        assert told == []
        with pytest.raises(SystemExit): signals.deliver('saved')
        assert told == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with StopSignals() as signals: signal.raise_signal(signal.SIGTERM)
        assert signals.caught is None and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally: signal.signal(signal.SIGTERM, before)
    monkeypatch.setattr(signal, 'getsignal', lambda number: None)                     # set by other code than Python's
    with StopSignals() as signals: assert not signals._before


def test_import_changes_nothing():
    code = "import sys, miniai.files; print([m for m in ('matplotlib', 'safetensors', 'filelock') if m in sys.modules])"
    done = subprocess.run([sys.executable, '-c', code], env=os.environ | {'PYTHONPATH': str(Path(__file__).resolve().parent.parent)},
                          capture_output=True, text=True)
    assert done.stdout == '[]\n', done.stderr


def test_dead_workers_raise_no_error_once_a_signal_is_noted():
    def handler(number, frame): pass
    before = signal.signal(signal.SIGCHLD, handler)  # PyTorch's loader sets one: it raises when a worker dies
    try:
        with StopSignals():
            assert signal.getsignal(signal.SIGCHLD) is handler
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally: signal.signal(signal.SIGCHLD, before)

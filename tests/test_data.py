"""How `miniai.data` behaves when the network, the disk or a file is bad, against a real HTTP server on this machine.

Run with `python -m pytest tests/test_data.py`. The code under test is never replaced: it is given a small data set of its own
(four files and their hashes). The tests marked `full` read the complete files from the folder that MINIAI_DATA names, and are
skipped where it is unset."""
import gzip
import hashlib
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from contextlib import redirect_stderr
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import miniai.data as D
from miniai.data import DataUnavailable, fashion_mnist, gunzip, mnist, read_idx, show_images

ROOT = Path(__file__).resolve().parent.parent
FULL = os.environ.get('MINIAI_DATA')
full = pytest.mark.skipif(not FULL, reason='MINIAI_DATA is unset: the complete files are not at hand')
posix = pytest.mark.skipif(os.name != 'posix', reason='needs a POSIX system')
linux = pytest.mark.skipif(sys.platform != 'linux', reason='needs Linux')
root_only = pytest.mark.skipif(os.name != 'posix' or os.getuid() != 0, reason='needs root')


# ---- a small data set, and servers for it

def idx(a, kind=8): return struct.pack(f'>HBB{a.ndim}I', 0, kind, a.ndim, *a.shape) + a.tobytes()

RNG = np.random.default_rng(0)
TRAIN, TEST = RNG.integers(0, 256, (50, 28, 28), dtype=np.uint8), RNG.integers(0, 256, (10, 28, 28), dtype=np.uint8)
TRAIN_Y, TEST_Y = RNG.integers(0, 10, 50, dtype=np.uint8), RNG.integers(0, 10, 10, dtype=np.uint8)
PLAIN = dict(zip(D._FILES, map(idx, (TRAIN, TRAIN_Y, TEST, TEST_Y))))
BODIES = {f'{name}.gz': gzip.compress(raw) for name, raw in PLAIN.items()}
SHA = {name: hashlib.sha256(raw).hexdigest() for name, raw in PLAIN.items()}
TINY = D._Set('Tiny', 'tiny', SHA, (), 40, False)
LIMIT = f'{2**26:,}'

def load(mirrors, folder, sample=False, timeout=5.): return D._load(TINY, sample, mirrors, folder, timeout)

def check(d):
    assert [tuple(t.shape) for part in d for t in part] == [(40, 784), (40,), (10, 784), (10,), (10, 784), (10,)]
    assert np.array_equal(torch.cat([d.train.x, d.valid.x]).numpy()*256, TRAIN.reshape(50, 784))
    assert np.array_equal(d.test.x.numpy()*256, TEST.reshape(10, 784))
    assert torch.cat([d.train.y, d.valid.y, d.test.y]).tolist() == [*TRAIN_Y, *TEST_Y]
    assert all(p.x.dtype == torch.float32 and p.y.dtype == torch.int64 for p in d)

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        s = self.server
        s.asked.append(self.path)
        try: s.answer(self, s.bodies.get(self.path.rsplit('/', 1)[-1]))
        except OSError: pass  # the other side has left

def send(h, body, length=None, status=200, **headers):
    h.send_response(status)
    h.send_header('Content-Length', len(body) if length is None else length)
    for k, v in headers.items(): h.send_header(k.replace('_', '-'), v)
    h.end_headers()
    h.wfile.write(body)
    h.wfile.flush()

def good(h, body): send(h, body) if body is not None else send(h, b'no such file', status=404)
def status(code): return lambda h, body: send(h, b'<html>no</html>', status=code)
def wrong(h, body): send(h, gzip.compress(b'these are other bytes'))
def html(h, body): send(h, b'<html>Please log in to the hotel network</html>')
def short(h, body): send(h, body[:len(body)//2], length=len(body))
def short_quietly(h, body): send(h, body[:len(body)//2])  # the length agrees, the file does not
def encoded(h, body): send(h, body, Content_Encoding='gzip')  # the client library unpacks this on its own
def no_length(h, body):
    h.send_response(200)
    h.end_headers()
    h.wfile.write(body)
def silent(h, body): h.server.end.wait(30)
def stalled(h, body):
    send(h, body[:len(body)//2], length=len(body))
    h.server.end.wait(30)
def first_time_busy(h, body):
    if h.server.asked.count(h.path) > 1: send(h, body)
    else: send(h, b'', status=503)
def slow(h, body):  # a healthy but slow line
    send(h, b'', length=len(body))
    for k in range(0, len(body), 8192):
        h.wfile.write(body[k:k + 8192])
        h.server.sent.set()
        if h.server.end.wait(.1): return
def endless(h, body):
    h.send_response(200)
    h.end_headers()
    while not h.server.end.is_set(): h.wfile.write(b'\0'*2**16)
def bomb(h, body): send(h, BOMB)

z = io.BytesIO()
with gzip.GzipFile(fileobj=z, mode='wb', compresslevel=1) as f:
    for _ in range(256): f.write(bytes(2**20))
BOMB = z.getvalue()  # 1 MB that unpacks to 256 MB

@pytest.fixture
def serve():
    "Starts servers: `serve(answer)` -> server with `.url` and `.asked`"
    servers = []
    def start(answer=good, bodies=BODIES):
        s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        s.answer, s.bodies, s.asked, s.end, s.sent = answer, bodies, [], threading.Event(), threading.Event()
        s.daemon_threads, s.block_on_close = True, False
        s.url = f'http://127.0.0.1:{s.server_port}/set'
        threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
        servers.append(s)
        return s
    yield start
    for s in servers:
        s.end.set()
        s.shutdown()
        s.server_close()

@pytest.fixture(autouse=True)
def clean(monkeypatch):
    "No state of one test reaches the next, none of the caller's environment reaches a test, and warnings are failures"
    for k in ('MINIAI_DATA', 'MINIAI_SAMPLE'): monkeypatch.delenv(k, raising=False)
    for k in ('no_proxy', 'NO_PROXY'): monkeypatch.setenv(k, '127.0.0.1')
    D._told.clear()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield

@pytest.fixture
def at_once(monkeypatch):
    "The pause before the second attempt, left out"
    monkeypatch.setattr(D.time, 'sleep', lambda _: None)

def dead_url():
    "The address of a server that is down"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return f'http://127.0.0.1:{s.getsockname()[1]}'

def stored(folder): return sorted(p.name for p in (folder/'tiny').glob('*'))

def code(folder, mirrors, prelude='', timeout=5):
    "A program for another process that loads the small set and prints a sum"
    args = json.dumps([SHA, mirrors, str(folder)])
    return '\n'.join([f'import json, sys; sys.path.insert(0, {str(ROOT)!r}); from miniai import data as D', prelude,
                      f'sha, mirrors, folder = json.loads({args!r})', 's = D._Set("Tiny", "tiny", sha, (), 40, False)',
                      f'print(D._load(s, False, mirrors, folder, {timeout}).train.x.sum().item())'])

def run(program, **kw):
    return subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=120, **kw)

SUM = f'{torch.from_numpy(TRAIN[:40].astype(np.float32)/256).reshape(40, 784).sum().item()}\n'


# ---- mirrors

def test_good_mirror_then_cache(serve, tmp_path):
    s = serve()
    check(load([s.url], tmp_path))
    assert len(s.asked) == 4 and stored(tmp_path) == sorted(BODIES)
    check(load([dead_url()], tmp_path))  # no request is made
    assert len(s.asked) == 4

def test_a_slash_at_the_end_and_a_single_string(serve, tmp_path):
    s = serve()
    check(load(s.url + '/', tmp_path))
    assert s.asked[0] == '/set/train-images-idx3-ubyte.gz'

@pytest.mark.parametrize('answer', [encoded, no_length])
def test_other_forms_of_a_good_response(serve, tmp_path, answer):
    check(load([serve(answer).url], tmp_path))
    check(load([], tmp_path))

@pytest.mark.parametrize('answer,why,tries', [(status(403), '403', 2), (status(503), '503', 2), (status(404), '404', 2),
    (wrong, 'SHA-256', 1), (html, 'SHA-256', 1), (short, 'IncompleteRead|Connection', 2), (short_quietly, 'broken gzip', 1),
    (bomb, f'unpacks to more than {LIMIT}', 1), (endless, f'sends more than {LIMIT}', 1)],
    ids='403 503 404 wrong_hash login_page cut_short cut_short_quietly bomb endless'.split())
def test_bad_mirror(serve, tmp_path, at_once, answer, why, tries):
    "It is named with its reason, leaves no file behind, is not tried for the other files, and the next mirror serves"
    bad, ok = serve(answer), serve()
    with pytest.raises(DataUnavailable, match=why) as e: load([bad.url], tmp_path)
    assert bad.url in str(e.value) and str(tmp_path/'tiny') in str(e.value) and 'train-images-idx3-ubyte: missing' in str(e.value)
    assert not (tmp_path/'tiny').exists() and len(bad.asked) == tries
    check(load([bad.url, ok.url], tmp_path))
    assert len(bad.asked) == 2*tries and len(ok.asked) == 4

def test_a_second_attempt(serve, tmp_path, at_once):
    s = serve(first_time_busy)
    check(load([s.url], tmp_path))
    assert len(s.asked) == 8

def test_mirror_down(serve, tmp_path, at_once):
    down, ok = dead_url(), serve()
    with pytest.raises(DataUnavailable, match='Connection') as e: load([down], tmp_path)
    assert down in str(e.value)
    check(load([down, ok.url], tmp_path))

def test_mirror_that_lacks_some_files(serve, tmp_path, at_once):
    first = serve(bodies={k: v for k, v in BODIES.items() if k.startswith('train-images')})
    second = serve()
    check(load([first.url, second.url], tmp_path))
    assert len(first.asked) == 1 + 2 and len(second.asked) == 3

@pytest.mark.parametrize('address', ['nonsense', 'ftp://127.0.0.1/x', 'http://'])
def test_address_that_is_none(serve, tmp_path, at_once, address):
    check(load([address, serve().url], tmp_path))
    with pytest.raises(DataUnavailable, match='Mirrors tried:\n  ' + address): load([address], tmp_path/'2')

@pytest.mark.parametrize('answer', [silent, stalled])
def test_stalled_server(serve, tmp_path, at_once, answer):
    bad = serve(answer)
    t = time.monotonic()
    with pytest.raises(DataUnavailable, match='timed out'): load([bad.url], tmp_path, timeout=.3)
    assert time.monotonic() - t < 10
    check(load([bad.url, serve().url], tmp_path, timeout=.3))

@linux
def test_address_that_swallows_connections(tmp_path, at_once):
    "A full queue of connections drops new ones silently, as a firewall does"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen(0)
        fill = [socket.socket() for _ in range(4)]
        for c in fill:
            c.setblocking(False)
            c.connect_ex(s.getsockname())
        t = time.monotonic()
        url = f'http://127.0.0.1:{s.getsockname()[1]}'
        with pytest.raises(DataUnavailable, match='timed out'): load([url], tmp_path, timeout=.3)
        assert time.monotonic() - t < 10
        for c in fill: c.close()

def test_the_limit_of_a_download(monkeypatch):
    monkeypatch.setattr(D, '_CAP', 10)
    f = D._Capped()
    f.write(b'6 byte')
    f.write(b'ten.')
    with pytest.raises(ValueError, match='more than 10 bytes'): f.write(b'!')
    assert f.getvalue() == b'6 byteten.'

def test_the_pause_before_the_second_attempt(serve, monkeypatch):
    pauses = []
    monkeypatch.setattr(D.time, 'sleep', pauses.append)
    with pytest.raises(OSError, match='503'): D._transfer(serve(status(503)).url, 5.)
    assert pauses == [1]

def test_no_mirrors_means_no_downloads(tmp_path):
    with pytest.raises(DataUnavailable) as e: load([], tmp_path)
    assert 'Mirrors tried' not in str(e.value) and 'MINIAI_DATA' in str(e.value)
    with pytest.raises(DataUnavailable) as e: load(None, tmp_path)  # the small set has none of its own
    assert 'Mirrors tried' not in str(e.value)

class Terminal(io.StringIO):
    "A text buffer that claims to be a terminal"
    def isatty(self): return True

@pytest.mark.parametrize('err', [Terminal(), io.StringIO()], ids=['terminal', 'file'])
def test_progress_bar(serve, tmp_path, err):
    "On a terminal one bar per file, elsewhere no output at all"
    with redirect_stderr(err): check(load([serve(slow).url], tmp_path))
    text = err.getvalue()
    assert text.count('100%') >= 4 if err.isatty() else text == ''


# ---- the folder

def test_damaged_file_in_the_cache_is_replaced(serve, tmp_path):
    s = serve()
    load([s.url], tmp_path)
    path = tmp_path/'tiny'/'t10k-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataUnavailable, match='t10k-images-idx3-ubyte: broken gzip') as e: load([], tmp_path)
    assert 'missing' not in str(e.value)
    check(load([s.url], tmp_path))
    assert len(s.asked) == 5
    check(load([], tmp_path))

def test_what_is_still_missing_is_named(serve, tmp_path, at_once):
    "A file that arrived before a mirror failed is kept, and not called missing"
    s = serve(bodies={k: v for k, v in BODIES.items() if k.startswith('train-images')})
    with pytest.raises(DataUnavailable, match='train-labels-idx1-ubyte: missing') as e: load([s.url], tmp_path)
    assert 'train-images-idx3-ubyte: missing' not in str(e.value) and '404' in str(e.value)
    assert stored(tmp_path) == ['train-images-idx3-ubyte.gz']

def test_files_in_any_order(serve, tmp_path):
    "What is read and what is downloaded come together under the right names"
    s = serve()
    load([s.url], tmp_path)
    for name in 'train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz': (tmp_path/'tiny'/name).unlink()
    check(load([s.url], tmp_path))

def test_unpacked_files_are_read(tmp_path):
    (tmp_path/'tiny').mkdir()
    for name, raw in PLAIN.items(): (tmp_path/'tiny'/name).write_bytes(raw)
    check(load([], tmp_path))
    (tmp_path/'tiny'/'t10k-labels-idx1-ubyte.gz').write_bytes(b'junk')  # a bad .gz beside a good unpacked file
    check(load([], tmp_path))

def test_a_directory_where_a_file_should_be(serve, tmp_path):
    (tmp_path/'tiny'/'t10k-labels-idx1-ubyte.gz').mkdir(parents=True)
    with pytest.raises(DataUnavailable, match='t10k-labels-idx1-ubyte: not a file'): load([], tmp_path)
    with pytest.warns(UserWarning, match='cannot be kept'): check(load([serve().url], tmp_path))

@posix
def test_a_named_pipe_where_a_file_should_be(tmp_path):
    "To open it would wait for ever"
    os.mkfifo(tmp_path/'pipe')
    program = (f'import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from miniai.data import _read_verified\n'
               f'try: _read_verified(Path({str(tmp_path)!r}), "pipe", "")\nexcept ValueError as e: print(e)')
    assert run(program).stdout == 'not a file\n'

def test_files_that_cannot_be_read(tmp_path):
    sha = hashlib.sha256(b'x').hexdigest()
    with pytest.raises(ValueError, match='missing'): D._read_verified(tmp_path, 'f', sha)
    (tmp_path/'file').write_bytes(b'x')
    with pytest.raises(ValueError, match='missing'): D._read_verified(tmp_path/'file', 'f', sha)  # a file in the folder's place
    with pytest.raises(ValueError, match='too long'): D._read_verified(tmp_path, 'n'*300, sha)
    with open(tmp_path/'big', 'wb') as f: f.truncate(2**26 + 1)
    with pytest.raises(ValueError, match=f'more than {LIMIT}'): D._read_verified(tmp_path, 'big', sha)
    assert D._read_verified(tmp_path, 'file', sha) == b'x'

def test_ctrl_c_leaves_nothing(serve, tmp_path):
    s = serve(slow)
    (tmp_path/'t').mkdir()
    env = os.environ | dict(TMPDIR=str(tmp_path/'t'))
    p = subprocess.Popen([sys.executable, '-c', code(tmp_path/'cache', [s.url])], stderr=subprocess.PIPE, env=env, text=True)
    assert s.sent.wait(60)
    time.sleep(.15)
    p.send_signal(signal.SIGINT)
    assert 'KeyboardInterrupt' in p.communicate(timeout=60)[1] and p.returncode != 0
    assert stored(tmp_path/'cache') == [] and list((tmp_path/'t').iterdir()) == []

def test_killed_in_mid_download(serve, tmp_path):
    s = serve(slow)
    p = subprocess.Popen([sys.executable, '-c', code(tmp_path, [s.url])])
    assert s.sent.wait(60)
    p.kill()
    assert p.wait() != 0
    with pytest.raises(DataUnavailable): load([], tmp_path)
    s.answer = good
    check(load([s.url], tmp_path))

@posix
def test_killed_in_mid_write(tmp_path):
    "The kernel kills the process at the 5,000th byte it writes; the half file has another name"
    program = ('import resource, signal, sys; from pathlib import Path\n'
               f'sys.path.insert(0, {str(ROOT)!r}); from miniai.data import _store\n'
               'signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n'
               'resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n'
               f'_store(bytes(9000), Path({str(tmp_path/"f.gz")!r}))')
    r = run(program)
    assert r.returncode == -signal.SIGXFSZ, r.stderr
    left, = tmp_path.iterdir()
    assert left.suffix == '.part' and left.stat().st_size == 5000

def test_store(tmp_path):
    path = tmp_path/'some'/'cache'/'f'
    for raw in b'first', b'second':
        D._store(raw, path)
        assert path.read_bytes() == raw
    (path.parent/'g').mkdir()
    for bad in path.parent/'g', path/'h':  # a folder in the file's place, a file in the folder's place
        with pytest.raises(OSError): D._store(b'raw', bad)
    assert sorted(p.name for p in path.parent.iterdir()) == ['f', 'g']

def test_the_file_appears_complete(tmp_path, monkeypatch):
    "At the moment of the rename the other name holds all bytes"
    seen, replace = [], os.replace
    def watched(a, b):
        seen.append((Path(a).read_bytes(), Path(a).parent, Path(b).exists()))
        replace(a, b)
    monkeypatch.setattr(os, 'replace', watched)
    D._store(b'all bytes', tmp_path/'f')
    assert seen == [(b'all bytes', tmp_path, False)]

def test_two_processes_at_once(serve, tmp_path):
    "Each file is served when both have asked for it, so both download and store it; their stderr stays empty"
    meet = threading.Barrier(2)
    def together(h, body):
        meet.wait(60)
        good(h, body)
    s = serve(together)
    program = [sys.executable, '-c', code(tmp_path, [s.url], timeout=60)]
    ps = [subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in '12']
    assert [(p.communicate(timeout=120), p.returncode) for p in ps] == [((SUM, ''), 0)]*2
    assert len(s.asked) == 8 and stored(tmp_path) == sorted(BODIES)
    check(load([], tmp_path))

def test_file_in_the_folder_s_place(serve, tmp_path):
    "Holds for root too: verified data are used from memory, with one warning"
    (tmp_path/'cache').write_text('I am a file')
    s = serve()
    with pytest.warns(UserWarning, match='cannot be kept in .*folder=') as w: check(mirrored(s, tmp_path/'cache'))
    assert len(w) == 1 and w[0].filename == __file__
    check(mirrored(s, tmp_path/'cache'))  # told once
    assert len(s.asked) == 8

def mirrored(s, folder):
    "As `mnist(mirrors=…)`, of the small set, so the warning names the line above"
    def public(): return D._load(TINY, False, [s.url], folder, 5.)
    return public()

@linux
def test_user_s_cache_folder(serve, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    check(load([serve().url], None))
    assert sorted(p.name for p in (tmp_path/'miniai'/'tiny').iterdir()) == sorted(BODIES)
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    with pytest.raises(DataUnavailable, match='missing'): load([], None)

NO_HOME = '''
for k in 'HOME', 'XDG_CACHE_HOME', 'MINIAI_DATA', 'MINIAI_SAMPLE': os.environ.pop(k, None)
import pwd
def getpwuid(_): raise KeyError('no such user')
pwd.getpwuid = getpwuid
'''

@linux
@pytest.mark.parametrize('call,said', [('mnist(mirrors=[])', '4000'), ('mnist(sample=False)', 'No folder for MNIST'),
    ('fashion_mnist()', 'No folder for Fashion-MNIST'), ('mnist(sample=False, folder="~/x")', 'No folder for MNIST')])
def test_no_home_folder(call, said):
    "A user of a container without an entry in passwd: the sample, or an error that names folder="
    program = (f'import os, sys; sys.path.insert(0, {str(ROOT)!r}); from miniai.data import *\n{NO_HOME}\n'
               f'try: print(len({call}.train.x))\nexcept DataUnavailable as e: print(e)')
    r = run(program)
    assert said in r.stdout and 'folder=' in r.stdout + r.stderr and 'Traceback' not in r.stderr, r

@linux
def test_no_home_folder_is_no_matter_elsewhere(tmp_path):
    (tmp_path/'tiny').mkdir()
    for name, body in BODIES.items(): (tmp_path/'tiny'/name).write_bytes(body)
    r = run(code(tmp_path, [], prelude='import os' + NO_HOME))
    assert (r.stdout, r.stderr) == (SUM, '')

@pytest.mark.skipif(os.name != 'posix' or os.getuid() == 0, reason='root may write everywhere')
def test_folder_without_permission(serve, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.warns(UserWarning, match='cannot be kept'): check(load([serve().url], tmp_path))
    tmp_path.chmod(0o700)

@linux
@root_only
def test_full_disk(serve, tmp_path):
    "A real file system of 16 kB"
    mount = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=16k', 'tmpfs', tmp_path], capture_output=True)
    if mount.returncode: pytest.skip('this user may not mount a file system')
    try:
        s = serve()
        with pytest.warns(UserWarning, match='No space left on device'): check(load([s.url], tmp_path))
        assert not [n for n in stored(tmp_path) if n.endswith('.part')]
        check(load([s.url], tmp_path))
    finally: subprocess.run(['umount', tmp_path], check=True)


# ---- arguments and environment

def no_network(): return dict(mirrors=[dead_url()])

def test_falls_back_to_the_sample_with_one_warning(tmp_path, at_once):
    with pytest.warns(UserWarning) as w: d = mnist(folder=tmp_path, **no_network())
    text = str(w[0].message)
    assert len(w) == 1 and w[0].filename == __file__
    for part in ('sample of 5,000', str(tmp_path/'mnist'), 'train-images-idx3-ubyte: missing', 'Connection', 'MINIAI_DATA'):
        assert part in text
    assert len(d.train.x) == 4000
    mnist(folder=tmp_path, **no_network())  # no second warning: the fixture would make it a failure

def test_sample():
    d = mnist(sample=True)
    assert [tuple(t.shape) for part in d for t in part] == [(4000, 784), (4000,), (500, 784), (500,), (500, 784), (500,)]
    for part, n in zip(d, (400, 50, 50)):
        assert part.y.bincount().tolist() == [n]*10 and part.x.dtype == torch.float32 and part.y.dtype == torch.int64
        assert torch.equal(part.x*256, (part.x*256).round()) and part.x.max() == 255/256 and part.x.min() == 0
    images = {r.tobytes() for part in d for r in part.x.numpy()}
    assert len(images) == 5000
    assert d.train.y[:5].tolist() == [1, 5, 8, 3, 1]

def test_sample_variable(monkeypatch, tmp_path, at_once):
    bad = no_network()
    monkeypatch.setenv('MINIAI_SAMPLE', '1')
    assert len(mnist().train.x) == 4000
    t = time.monotonic()
    with pytest.raises(DataUnavailable, match='Fashion-MNIST has no sample'): fashion_mnist()
    assert time.monotonic() - t < 1
    with pytest.raises(DataUnavailable, match='missing'): mnist(sample=False, folder=tmp_path, **bad)  # the argument wins
    monkeypatch.setenv('MINIAI_SAMPLE', '0')
    with pytest.raises(DataUnavailable, match='missing'): mnist(folder=tmp_path, **bad)
    assert len(mnist(sample=True).train.x) == 4000
    monkeypatch.setenv('MINIAI_SAMPLE', '')
    with pytest.warns(UserWarning): mnist(folder=tmp_path, **bad)

@pytest.mark.parametrize('value', ['yes', 'true', ' 1', '2'])
def test_sample_values_that_mean_nothing(monkeypatch, value):
    with pytest.raises(ValueError, match=f"sample='{value}'"): mnist(sample=value)
    monkeypatch.setenv('MINIAI_SAMPLE', value)
    with pytest.raises(ValueError, match=f"MINIAI_SAMPLE is '{value}'"): mnist()

def test_fashion_mnist_has_no_sample(tmp_path, at_once):
    with pytest.raises(DataUnavailable, match='has no sample'): fashion_mnist(sample=True)
    with pytest.raises(DataUnavailable, match='missing'): fashion_mnist(folder=tmp_path, mirrors=[])

def test_data_variable(monkeypatch, tmp_path):
    monkeypatch.setenv('MINIAI_DATA', str(tmp_path))
    for function in (mnist, fashion_mnist):
        for sample in (None, False):
            with pytest.raises(DataUnavailable, match='t10k-labels-idx1-ubyte: missing') as e: function(sample=sample)
            assert 'Mirrors' not in str(e.value) and 'MINIAI_DATA is' in str(e.value)
    assert len(mnist(sample=True).train.x) == 4000
    (tmp_path/'tiny').mkdir()
    for name, body in BODIES.items(): (tmp_path/'tiny'/name).write_bytes(body)
    check(load(None, None))
    (tmp_path/'tiny'/'train-labels-idx1-ubyte.gz').unlink()
    with pytest.raises(DataUnavailable) as e: load(['http://not.used'], None)
    assert 'train-labels-idx1-ubyte: missing' in str(e.value) and 'train-images' not in str(e.value) and 'Mirrors' not in str(e.value)
    (tmp_path/'tiny'/'train-labels-idx1-ubyte.gz').write_bytes(gzip.compress(b'another file'))
    with pytest.raises(DataUnavailable, match='train-labels-idx1-ubyte: SHA-256'): load(None, None)

def test_folder_wins_over_the_variable(serve, monkeypatch, tmp_path):
    monkeypatch.setenv('MINIAI_DATA', str(tmp_path/'nothing'))
    check(load([serve().url], tmp_path))

def test_each_set_has_mirrors_and_hashes():
    for s in (D._MNIST, D._FASHION):
        assert len(s.mirrors) >= 2 and tuple(s.sha) == D._FILES and all(len(h) == 64 for h in s.sha.values()) and s.n_train == 50_000
    assert (D._MNIST.sample, D._FASHION.sample) == (True, False)
    for f in mnist, fashion_mnist: assert f.__defaults__ == (None, None, None, 5.)

def test_import_is_light():
    "Beyond torch and numpy, importing the module loads only the standard library"
    program = (f'import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, numpy; before = set(sys.modules); import miniai.data\n'
               'print(sorted({m.split(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))')
    assert run(program).stdout == "['miniai']\n"

def test_no_library_is_loaded_for_files_at_hand(tmp_path):
    (tmp_path/'tiny').mkdir()
    for name, body in BODIES.items(): (tmp_path/'tiny'/name).write_bytes(body)
    r = run(code(tmp_path, ['http://not.used']) + '\nprint({"pooch", "requests", "matplotlib"} & set(sys.modules))')
    assert r.stdout == SUM + 'set()\n'


# ---- IDX files, gzip

def test_gunzip():
    packed = gzip.compress(b'ten bytes.')
    for raw in packed, b'ten bytes.':
        assert gunzip(raw, 10) == b'ten bytes.'
        with pytest.raises(ValueError, match='more than 9 bytes'): gunzip(raw, 9)
    for bad in packed[:-1], packed[:12] + b'?' + packed[13:]:
        with pytest.raises(ValueError, match='broken gzip file'): gunzip(bad)
    with pytest.raises(ValueError, match=f'more than {LIMIT}'): gunzip(BOMB)

KINDS = {np.uint8: 8, np.int8: 9, '>i2': 0xB, '>i4': 0xC, '>f4': 0xD, '>f8': 0xE}

@pytest.mark.parametrize('dtype,kind', KINDS.items(), ids=str)
@pytest.mark.parametrize('pack', [bytes, gzip.compress])
def test_read_idx(tmp_path, dtype, kind, pack):
    a = (np.arange(24) - (0 if dtype is np.uint8 else 12)).reshape(2, 3, 4).astype(dtype)
    (tmp_path/'f').write_bytes(pack(idx(a, kind)))
    got = read_idx(tmp_path/'f')
    assert np.array_equal(got, a) and got.dtype.isnative and got.dtype.kind == a.dtype.kind and got.itemsize == a.itemsize
    torch.from_numpy(got)[0] = 1  # PyTorch takes it without a warning, and it may be written to

def test_sizes_of_idx():
    assert D._parse_idx(b'\0\0\x08\0\7').shape == () and D._parse_idx(b'\0\0\x08\0\7') == 7
    assert D._parse_idx(b'\0\0\x08\1\0\0\0\0').shape == (0,)
    assert D._parse_idx(idx(np.zeros((1, 0, 300), np.uint8))).shape == (1, 0, 300)

@pytest.mark.parametrize('raw,why', [(b'', 'not an IDX'), (b'<html>', 'not an IDX file: it starts with .3c 68 74 6d'),
    (b'\0\0\x08', 'not an IDX'), (b'\0\0\x07\1\0\0\0\0', 'not an IDX'), (b'\0\1\x08\1\0\0\0\0', 'not an IDX'),
    (b'\0\0\x08\3\0\0', 'header cut short: 6 of 16'), (b'\0\0\x08\0', r'\(\) must have 5 bytes, got 4'),
    (b'\0\0\x08\1\0\0\0\3ab', r'\(3,\) must have 11 bytes, got 10'),
    (b'\0\0\x08\1\0\0\0\3abcd', 'must have 11 bytes, got 12'), (b'\0\0\x0e\3' + b'\xff'*12, 'must have 633,825,299,')])
def test_broken_idx(tmp_path, raw, why):
    (tmp_path/'f').write_bytes(raw)
    with pytest.raises(ValueError, match=why): read_idx(tmp_path/'f')

def test_bomb(tmp_path):
    (tmp_path/'f').write_bytes(BOMB)
    tracemalloc.start()
    with pytest.raises(ValueError, match='more than 1,000,000 bytes'): read_idx(tmp_path/'f', max_bytes=10**6)
    assert tracemalloc.get_traced_memory()[1] < 10*2**20
    tracemalloc.stop()

def test_examples():
    with pytest.raises(ValueError, match='50 images, 10 labels'): D._examples(TRAIN, TEST_Y)
    got = D._examples(TRAIN, TRAIN_Y)
    assert str(got) == 'Examples(x=(50, 784) float32, y=(50,) int64)' and got.x.is_contiguous()
    assert D.Splits._fields == ('train', 'valid', 'test')


# ---- images

def shown(*args, **kwargs):
    "The axes and the images of the figure that `show_images` draws"
    from matplotlib import pyplot as plt
    assert show_images(*args, **kwargs) is None  # a value would be shown in a notebook, beside the figure
    axes = plt.gcf().axes
    return axes, [im for ax in axes for im in ax.images]

@pytest.fixture
def plt():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    yield plt
    plt.close('all')

X = torch.rand(12, 784, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('images,n', [(X, 12), (X.numpy(), 12), (X[0], 1), (X[0].view(28, 28), 1), (X[:3].view(3, 28, 28), 3),
    (X[:3].view(3, 1, 28, 28), 3), (X[:2].double().requires_grad_(), 2), (np.zeros((2, 5, 7)), 2), (np.zeros((5, 7)), 1),
    (X[:2].bfloat16(), 2), (X[:2].half(), 2), (X[:2] > .5, 2), ((X[:2]*255).byte(), 2), ([[0, 1], [2, 3]], 1),
    ([np.zeros((4, 4)), np.ones((4, 4))], 2), (list(X[:2]), 2)],
    ids='batch array vector image images channel grad small one bfloat16 half bool bytes lists arrays tensors'.split())
def test_show_images(plt, images, n):
    axes, drawn = shown(images)
    assert len(drawn) == n and not any(ax.axison for ax in axes)
    want = images.detach().float().numpy() if isinstance(images, torch.Tensor) else np.array([np.asarray(i) for i in images])
    assert np.allclose(np.concatenate([im.get_array().ravel() for im in drawn]), want.ravel())
    assert all(isinstance(v, float) for im in drawn for v in im.get_clim())

def test_grid_of_images(plt):
    labels = torch.arange(12) % 10
    for titles in labels, labels.tolist(), labels.numpy(), tuple(labels):
        axes, drawn = shown(X, titles=titles, ncols=5)
        assert [ax.get_title() for ax in axes] == [str(int(i)) for i in labels] + ['']*3
    assert axes[0].get_gridspec().get_geometry() == (3, 5) and np.array_equal(drawn[3].get_array(), X[3].view(28, 28))
    def inches(*args, **kwargs): return shown(*args, **kwargs)[0][0].figure.get_size_inches().tolist()
    assert inches(X[:4], ncols=np.int64(2), size=2) == [4, 4]
    assert inches(X[:4], 'abcd', ncols=2, size=2) == [4, 4.4]
    assert inches(X[:5]) == [4, .8]
    assert [shown(X[:n])[0][0].get_gridspec().get_geometry() for n in (1, 10, 11)] == [(1, 1), (1, 10), (2, 10)]
    def clims(*args, **kwargs): return [im.get_clim() for im in shown(*args, **kwargs)[1]]
    assert clims([X[0]*0, X[0]*0 + .5]) == [(0, .5)]*2  # one scale
    assert clims(X, vmin=-1, vmax=X.new_tensor(2))[0] == (-1, 2)
    assert clims(X, vmin=-1)[0] == (-1, X.max())

@pytest.mark.parametrize('shape', [(5,), (0, 784), (2, 3, 28, 28), (2, 2, 2, 2, 2), ()], ids=str)
def test_shapes_that_are_no_images(plt, shape):
    with pytest.raises(ValueError, match='show_images: got shape'): show_images(np.zeros(shape))

def test_titles_and_columns_that_do_not_fit(plt):
    with pytest.raises(ValueError, match='2 titles for 3 images'): show_images(X[:3], titles='ab')
    for n in 0, -1:
        with pytest.raises(ValueError, match=f'ncols={n}'): show_images(X, ncols=n)
    assert plt.get_fignums() == []  # no empty figure stays open


# ---- the complete files

@full
def test_full_sets(monkeypatch):
    monkeypatch.setenv('MINIAI_DATA', FULL)
    for function, first in ((mnist, [5, 0, 4]), (fashion_mnist, [9, 0, 0])):
        d = function(sample=False)
        assert [tuple(t.shape) for part in d for t in part] == [(50000, 784), (50000,), (10000, 784), (10000,), (10000, 784), (10000,)]
        assert d.train.y[:3].tolist() == first and d.train.x.max() == 255/256
        assert torch.equal(d.train.x*256, (d.train.x*256).round())
    assert d.test.y.bincount().tolist() == [1000]*10

@full
def test_full_set_from_a_server(serve, tmp_path, at_once):
    "The public function with its own hashes, through HTTP and the folder"
    bodies = {p.name: p.read_bytes() for p in (Path(FULL)/'mnist').iterdir() if p.name.endswith('.gz')}
    if len(bodies) != 4: pytest.skip('the files in MINIAI_DATA are unpacked')
    s = serve(bodies=bodies)
    d = mnist(mirrors=[dead_url(), s.url], folder=tmp_path)
    again = mnist(mirrors=[], folder=tmp_path, sample=False)
    assert len(s.asked) == 4 and torch.equal(d.train.x, again.train.x) and d.train.y[:3].tolist() == [5, 0, 4]

@full
def test_sample_is_part_of_the_full_set(monkeypatch):
    monkeypatch.setenv('MINIAI_DATA', FULL)
    d = mnist(sample=False)
    known = {r.tobytes(): y for part in (d.train, d.valid) for r, y in zip(part.x.numpy(), part.y.tolist())}
    for part in mnist(sample=True): assert all(known[r.tobytes()] == y for r, y in zip(part.x.numpy(), part.y.tolist()))

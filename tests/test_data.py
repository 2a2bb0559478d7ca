"""How `miniai.data` behaves when the network, the disk or the file is bad, against a real HTTP server on this machine.

Run with `python -m pytest tests/test_data.py`. The code under test is never replaced: it is given a small set of its own
(four files and their checksums). The tests named `whole` read the complete files from the folder that MINIAI_DATA names, and are skipped
where it is unset."""
import gzip
import hashlib
import io
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import miniai.data as D
from miniai.data import DataUnavailable, fashion_mnist, mnist, read_idx, read_mnist_pickle, show_images

ROOT = Path(__file__).resolve().parent.parent
WHOLE = os.environ.get('MINIAI_DATA')
whole = pytest.mark.skipif(not WHOLE, reason='MINIAI_DATA is unset: the complete files are not at hand')
posix = pytest.mark.skipif(os.name != 'posix', reason='needs a POSIX system')
linux = pytest.mark.skipif(sys.platform != 'linux', reason='needs Linux')


# ---- a small set, and servers for it

def idx(a): return struct.pack(f'>HBB{a.ndim}I', 0, 8, a.ndim, *a.shape) + a.tobytes()

RNG = np.random.default_rng(0)
TRAIN, TEST = RNG.integers(0, 256, (50, 28, 28), dtype=np.uint8), RNG.integers(0, 256, (10, 28, 28), dtype=np.uint8)
TRAIN_Y, TEST_Y = RNG.integers(0, 10, 50, dtype=np.uint8), RNG.integers(0, 10, 10, dtype=np.uint8)
PLAIN = dict(zip(D._FILES, map(idx, (TRAIN, TRAIN_Y, TEST, TEST_Y))))
BODIES = {f'{name}.gz': gzip.compress(raw) for name, raw in PLAIN.items()}
SHA = {name: hashlib.sha256(raw).hexdigest() for name, raw in PLAIN.items()}

def tiny(sample=False): return D._Set('Tiny', 'tiny', 'tiny', SHA, (), 40, sample)

def load(mirrors, folder, sample=False, timeout=5., deadline=30.):
    return D._load(tiny(), sample, mirrors, folder, timeout, deadline)

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
def silent(h, body): h.server.end.wait(30)
def stalled(h, body):
    send(h, body[:len(body)//2], length=len(body))
    h.server.end.wait(30)
def trickle(h, body):  # never idle for long, never done
    send(h, b'', length=len(body))
    for k in range(len(body)):
        if h.server.end.wait(.05): return
        h.wfile.write(body[k:k + 1])
def slow(h, body):  # a healthy but slow line
    send(h, b'', length=len(body))
    for k in range(0, len(body), 8192):
        h.wfile.write(body[k:k + 8192])
        h.server.sent.set()
        if h.server.end.wait(.3): return
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
    D._dead.clear()
    D._told.clear()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield

def dead_url():
    "The address of a server that is down"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return f'http://127.0.0.1:{s.getsockname()[1]}'

def whole_files(folder): return sorted(p.name for p in (folder/'tiny').glob('*'))

def code(folder, mirrors, deadline=30., prelude=''):
    "A program for another process that loads the small set and prints a sum"
    args = json.dumps([SHA, mirrors, str(folder)])
    return '\n'.join([f'import json, sys; sys.path.insert(0, {str(ROOT)!r}); from miniai import data as D', prelude,
                      f'sha, mirrors, folder = json.loads({args!r})', 's = D._Set("Tiny", "tiny", "tiny", sha, (), 40, False)',
                      f'print(D._load(s, False, mirrors, folder, 5., {deadline}).train.x.sum().item())'])

def run(program, **kw):
    return subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=120, **kw)

SUM = f'{torch.from_numpy(TRAIN[:40].astype(np.float32)/256).reshape(40, 784).sum().item()}\n'


# ---- mirrors

def test_good_mirror_then_cache(serve, tmp_path):
    s = serve()
    check(load([s.url], tmp_path))
    assert len(s.asked) == 4 and whole_files(tmp_path) == sorted(BODIES)
    check(load([dead_url()], tmp_path))  # nothing is asked for
    assert len(s.asked) == 4

def test_a_slash_at_the_end_and_a_single_string(serve, tmp_path):
    s = serve()
    check(load(s.url + '/', tmp_path))
    assert s.asked[0] == '/set/train-images-idx3-ubyte.gz'

def test_body_unpacked_by_the_client_library(serve, tmp_path):
    check(load([serve(encoded).url], tmp_path))
    check(load([], tmp_path))

@pytest.mark.parametrize('answer,why', [(status(403), 'HTTP 403'), (status(503), 'HTTP 503'), (status(404), 'HTTP 404'), (wrong, 'SHA-256'),
    (html, 'SHA-256'), (short, 'ChunkedEncodingError|ConnectionError|broken gzip'), (short_quietly, 'broken gzip'),
    (bomb, 'unpacks to more than 67,108,864'), (endless, 'more than 67,108,864')],
    ids='403 503 404 wrong_hash login_page cut_short cut_short_quietly bomb endless'.split())
def test_bad_mirror(serve, tmp_path, answer, why):
    "A bad mirror is named with its reason, leaves nothing behind, is asked once a process, and the next mirror serves"
    bad = serve(answer)
    with pytest.raises(DataUnavailable, match=why) as e: load([bad.url], tmp_path)
    assert bad.url in str(e.value) and str(tmp_path/'tiny') in str(e.value) and 'train-images-idx3-ubyte: missing' in str(e.value)
    assert not (tmp_path/'tiny').exists() and len(bad.asked) == 1
    check(load([bad.url, serve().url], tmp_path))
    assert len(bad.asked) == 1

def test_mirror_down(serve, tmp_path):
    down, ok = dead_url(), serve()
    t = time.monotonic()
    with pytest.raises(DataUnavailable, match='ConnectionError'): load([down], tmp_path)
    check(load([down, ok.url], tmp_path))
    assert time.monotonic() - t < 10 and down in D._dead and ok.url not in D._dead

def test_mirror_that_fails_half_way_through_the_set(serve, tmp_path):
    first = serve(bodies={k: v for k, v in BODIES.items() if k.startswith('train-images')})
    second = serve()
    check(load([first.url, second.url], tmp_path))
    assert len(first.asked) == 2 and len(second.asked) == 3

@pytest.mark.parametrize('answer', [silent, stalled, trickle])
def test_stalled_server(serve, tmp_path, answer):
    bad = serve(answer)
    t = time.monotonic()
    with pytest.raises(DataUnavailable, match='nothing came for 0.5 s|ReadTimeout|ConnectionError'): load([bad.url], tmp_path, timeout=.5)
    assert time.monotonic() - t < 10
    check(load([bad.url, serve().url], tmp_path, timeout=5.))

@linux
def test_address_that_swallows_connections(tmp_path):
    "A full queue of connections drops new ones without a word, as a firewall does"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen(0)
        fill = [socket.socket() for _ in range(4)]
        for c in fill:
            c.setblocking(False)
            c.connect_ex(s.getsockname())
        t = time.monotonic()
        url = f'http://127.0.0.1:{s.getsockname()[1]}'
        with pytest.raises(DataUnavailable, match='nothing came|Timeout'): load([url], tmp_path, timeout=.5)
        assert time.monotonic() - t < 10
        for c in fill: c.close()

def test_deadline_for_the_whole(serve, tmp_path):
    "A slow mirror is not a dead one: what was complete is kept, the message says so, and a later call goes on"
    s = serve(slow)
    t = time.monotonic()
    with pytest.raises(DataUnavailable, match='deadline=1 s') as e: load([s.url], tmp_path, deadline=1.)
    assert time.monotonic() - t < 10 and s.url not in D._dead and f'{s.url}: no file finished in time' in str(e.value)
    s.answer = good
    check(load([s.url], tmp_path))

@pytest.mark.parametrize('kw', [dict(timeout=0), dict(deadline=-1.)])
def test_times_must_be_positive(tmp_path, kw):
    with pytest.raises(ValueError, match='above 0'): load([], tmp_path, **kw)

def test_no_mirrors_means_no_downloads(tmp_path):
    with pytest.raises(DataUnavailable) as e: load([], tmp_path)
    assert 'Mirrors tried' not in str(e.value) and 'MINIAI_DATA' in str(e.value)


# ---- the folder

def test_damaged_file_in_the_cache_is_replaced(serve, tmp_path):
    s = serve()
    load([s.url], tmp_path)
    path = tmp_path/'tiny'/'t10k-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataUnavailable, match='t10k-images-idx3-ubyte: broken gzip'): load([], tmp_path)
    check(load([s.url], tmp_path))
    assert len(s.asked) == 5
    check(load([], tmp_path))

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

def test_killed_in_mid_download(serve, tmp_path):
    s = serve(slow)
    p = subprocess.Popen([sys.executable, '-c', code(tmp_path, [s.url])])
    assert s.sent.wait(60)
    time.sleep(.1)
    p.kill()
    assert p.wait() != 0
    with pytest.raises(DataUnavailable): load([], tmp_path)
    s.answer = good
    check(load([s.url], tmp_path))

@posix
def test_killed_in_mid_write(serve, tmp_path):
    "The kernel kills the process at the 5,000th byte it writes; the half file has another name, and is swept away when it is old"
    s = serve()
    kill_at = ('import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n'
               'resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))')
    r = run(code(tmp_path, [s.url], prelude=kill_at))
    assert r.returncode == -signal.SIGXFSZ, r.stderr
    left, = (tmp_path/'tiny').iterdir()
    assert left.suffix == '.part' and left.stat().st_size == 5000
    check(load([s.url], tmp_path))
    assert left.exists()  # it may belong to a download that is going on
    os.utime(left, (time.time() - 7200,)*2)
    (tmp_path/'tiny'/'t10k-labels-idx1-ubyte.gz').unlink()
    check(load([s.url], tmp_path))
    assert whole_files(tmp_path) == sorted(BODIES)

def test_two_processes_at_once(serve, tmp_path):
    s = serve(slow)
    program = [sys.executable, '-c', code(tmp_path, [s.url])]
    ps = [subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in '12']
    assert [(p.communicate(timeout=120), p.returncode) for p in ps] == [((SUM, ''), 0)]*2
    assert len(s.asked) > 4 and whole_files(tmp_path) == sorted(BODIES)
    check(load([], tmp_path))

def test_file_in_the_folder_s_place(serve, tmp_path):
    "Holds for root too: verified data are used from memory, with one warning"
    (tmp_path/'cache').write_text('I am a file')
    s = serve()
    with pytest.warns(UserWarning, match='cannot be kept in .*folder=') as w: check(load([s.url], tmp_path/'cache'))
    assert len(w) == 1
    check(load([s.url], tmp_path/'cache'))  # told once
    assert len(s.asked) == 8

@linux
def test_user_s_cache_folder(serve, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    check(load([serve().url], None))
    assert sorted(p.name for p in (tmp_path/'miniai'/'tiny').iterdir()) == sorted(BODIES)
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    with pytest.raises(DataUnavailable, match='missing'): load([], None)

@pytest.mark.skipif(os.name != 'posix' or os.getuid() == 0, reason='root may write everywhere')
def test_folder_without_permission(serve, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.warns(UserWarning, match='cannot be kept'): check(load([serve().url], tmp_path))
    tmp_path.chmod(0o700)

@posix
def test_no_more_room_for_files(serve, tmp_path):
    "Writing beyond 5,000 bytes fails in the child, as on a full disk: advice and good data, no half file"
    limit = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))'
    r = run(code(tmp_path, [serve().url], prelude=limit))
    assert (r.returncode, r.stdout) == (0, SUM) and 'cannot be kept' in r.stderr and 'Traceback' not in r.stderr
    assert not [n for n in whole_files(tmp_path) if n.endswith('.part') or 'images' in n]

@linux
def test_full_disk(serve, tmp_path):
    "A real file system of 16 kB"
    mount = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=16k', 'tmpfs', tmp_path], capture_output=True)
    if mount.returncode: pytest.skip('this user may not mount a file system')
    try:
        s = serve()
        with pytest.warns(UserWarning, match='No space left on device'): check(load([s.url], tmp_path))
        assert not [n for n in whole_files(tmp_path) if n.endswith('.part')]
        check(load([s.url], tmp_path))
    finally: subprocess.run(['umount', tmp_path], check=True)


# ---- what is asked for: arguments and environment

def no_network(): return dict(mirrors=[dead_url()])

def test_falls_back_to_the_sample_with_one_warning(tmp_path):
    with pytest.warns(UserWarning) as w: d = mnist(folder=tmp_path, **no_network())
    text = str(w[0].message)
    assert len(w) == 1 and w[0].filename == __file__
    for part in ('sample of 5,000', str(tmp_path/'mnist'), 'train-images-idx3-ubyte: missing', 'ConnectionError', 'MINIAI_DATA'):
        assert part in text
    assert len(d.train.x) == 4000
    mnist(folder=tmp_path, **no_network())  # no second warning: the fixture would make it a failure

def test_sample():
    d = mnist(sample=True)
    assert [tuple(t.shape) for part in d for t in part] == [(4000, 784), (4000,), (500, 784), (500,), (500, 784), (500,)]
    for part, n in zip(d, (400, 50, 50)):
        assert part.y.bincount().tolist() == [n]*10 and part.x.dtype == torch.float32 and part.y.dtype == torch.int64
        assert torch.equal(part.x*256, (part.x*256).round()) and part.x.max() == 255/256 and part.x.min() == 0
    rows = {r.tobytes() for part in d for r in part.x.numpy()}
    assert len(rows) == 5000

def test_sample_variable(monkeypatch, tmp_path):
    bad = no_network()
    monkeypatch.setenv('MINIAI_SAMPLE', '1')
    assert len(mnist().train.x) == 4000
    t = time.monotonic()
    with pytest.raises(DataUnavailable, match='Fashion-MNIST has none'): fashion_mnist()
    assert time.monotonic() - t < 1
    with pytest.raises(DataUnavailable, match='missing'): mnist(sample=False, folder=tmp_path, **bad)  # the argument wins
    monkeypatch.setenv('MINIAI_SAMPLE', '0')
    with pytest.raises(DataUnavailable, match='missing'): mnist(folder=tmp_path, **bad)
    assert len(mnist(sample=True).train.x) == 4000
    monkeypatch.setenv('MINIAI_SAMPLE', '')
    with pytest.warns(UserWarning): mnist(folder=tmp_path, **bad)
    for value in ('yes', 'true', ' 1', '2'):
        monkeypatch.setenv('MINIAI_SAMPLE', value)
        with pytest.raises(ValueError, match=f"MINIAI_SAMPLE is '{value}'"): mnist()
    with pytest.raises(ValueError, match="sample='yes'"): mnist(sample='yes')

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
    with pytest.raises(DataUnavailable) as e: load(None, None)
    assert 'train-labels-idx1-ubyte: missing' in str(e.value) and 'train-images' not in str(e.value)
    (tmp_path/'tiny'/'train-labels-idx1-ubyte.gz').write_bytes(gzip.compress(b'another file'))
    with pytest.raises(DataUnavailable, match='train-labels-idx1-ubyte: SHA-256'): load(None, None)

def test_folder_wins_over_the_variable(serve, monkeypatch, tmp_path):
    monkeypatch.setenv('MINIAI_DATA', str(tmp_path/'nothing'))
    check(load([serve().url], tmp_path))

def test_each_set_has_mirrors_and_hashes():
    for s in (D._MNIST, D._FASHION):
        assert len(s.mirrors) >= 2 and tuple(s.sha) == D._FILES and all(len(h) == 64 for h in s.sha.values()) and s.n_train == 50_000

def test_import_is_light():
    "Beyond torch and numpy, importing the module loads nothing but the standard library"
    program = (f'import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, numpy; before = set(sys.modules); import miniai.data\n'
               'print(sorted({m.split(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))')
    assert run(program).stdout == "['miniai']\n"


# ---- IDX files

def test_read_idx(tmp_path):
    for dtype, kind in ((np.uint8, 8), (np.int8, 9), ('>i2', 0xB), ('>i4', 0xC), ('>f4', 0xD), ('>f8', 0xE)):
        a = np.arange(24).reshape(2, 3, 4).astype(dtype)
        raw = struct.pack('>HBB3I', 0, kind, 3, 2, 3, 4) + a.tobytes()
        for body in (raw, gzip.compress(raw)):
            (tmp_path/'f').write_bytes(body)
            got = read_idx(tmp_path/'f')
            assert np.array_equal(got, a) and got.dtype.isnative and got.dtype.kind == a.dtype.kind and got.itemsize == a.itemsize

@pytest.mark.parametrize('raw,why', [(b'', 'not an IDX'), (b'<html>', 'not an IDX file: it starts with .3c 68 74 6d'),
    (b'\0\0\x08', 'not an IDX'), (b'\0\0\x07\1\0\0\0\0', 'not an IDX'), (b'\0\0\x08\3\0\0', 'header cut short'),
    (b'\0\0\x08\1\0\0\0\3ab', r'\(3,\) must have 11 bytes, got 10'),
    (b'\0\0\x08\1\0\0\0\3abcd', 'must have 11 bytes, got 12'), (b'\0\0\x0e\3' + b'\xff'*12, 'must have 633,825,299,')])
def test_broken_idx(tmp_path, raw, why):
    (tmp_path/'f').write_bytes(raw)
    with pytest.raises(ValueError, match=why): read_idx(tmp_path/'f')

def test_bomb(tmp_path):
    (tmp_path/'f').write_bytes(BOMB)
    tracemalloc.start()
    with pytest.raises(ValueError, match='more than 1,000,000 bytes'): read_idx(tmp_path/'f', max_bytes=10**6)
    with pytest.raises(ValueError, match='more than 1,000,000 bytes'): read_mnist_pickle(tmp_path/'f', max_bytes=10**6)
    assert tracemalloc.get_traced_memory()[1] < 10*2**20
    tracemalloc.stop()


# ---- pickles

def parts(n=20, dtype=np.float32, ydtype=np.int64):
    return tuple(((RNG.integers(0, 256, (n + k, 784))/256).astype(dtype), RNG.integers(0, 10, n + k).astype(ydtype)) for k in range(3))

def same(d, ps):
    for rows, (x, y) in zip(d, ps, strict=True):
        assert rows.x.dtype == torch.float32 and rows.y.dtype == torch.int64
        assert np.array_equal(rows.x.numpy(), x.astype(np.float32)) and np.array_equal(rows.y.numpy(), y)

@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('pack', [gzip.compress, bytes])
def test_pickle_protocols(tmp_path, protocol, pack):
    for ps in (parts(), parts(dtype='>f8', ydtype='i1'), [list((np.asfortranarray(x), y)) for x, y in parts(dtype='f2', ydtype='u2')]):
        (tmp_path/'f').write_bytes(pack(pickle.dumps(ps, protocol=protocol)))
        same(read_mnist_pickle(tmp_path/'f'), ps)

def test_pickle_of_old_numpy(tmp_path):
    "Before NumPy 2 the modules were named numpy.core"
    ps = parts()
    (tmp_path/'f').write_bytes(pickle.dumps(ps, protocol=2).replace(b'numpy._core', b'numpy.core'))
    same(read_mnist_pickle(tmp_path/'f'), ps)

def python2(a, code):
    "The array `a` as Python 2's cPickle wrote it in protocol 2, byte for byte but for the memo"
    data = a.tobytes()
    dims = b''.join(b'J' + struct.pack('<i', n) for n in a.shape)
    return (b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R(K\1(' + dims + b't'
            b'cnumpy\ndtype\nU\2' + code + b'K\0K\1\x87R(K\3'
            b'U\1<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89T' + struct.pack('<i', len(data)) + data + b'tb')

def test_pickle_of_python_2(tmp_path):
    ps = parts()
    body = b'\x80\2' + b''.join(python2(x, b'f4') + python2(y, b'i8') + b'\x86' for x, y in ps) + b'\x87.'
    for part, part2 in zip(pickle.loads(body, encoding='latin1'), ps):  # a fair likeness
        for a, b in zip(part, part2): assert np.array_equal(a, b)
    (tmp_path/'f').write_bytes(gzip.compress(body))
    same(read_mnist_pickle(tmp_path/'f'), ps)

def test_real_pickle_of_python_2(tmp_path):
    "NumPy's own tests carry one"
    path = next((p for d in ('_core', 'core') if (p := Path(np.__file__).parent/d/'tests'/'data'/'astype_copy.pkl').exists()), None)
    if path is None: pytest.skip('this NumPy comes without its test data')
    got = D._load_numbers(path.read_bytes())
    assert np.array_equal(got, pickle.loads(path.read_bytes(), encoding='latin1')) and got.dtype == np.float64 and got.shape == (73,)
    with pytest.raises(ValueError, match='not of the form'): read_mnist_pickle(path)

class Call:
    "Pickles as a call of `f(*args)`"
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

@pytest.mark.parametrize('protocol', range(6))
def test_malicious_pickle(tmp_path, protocol):
    mark = tmp_path/'mark'
    (tmp_path/'f').write_bytes(gzip.compress(pickle.dumps([Call(os.system, f'echo > "{mark}"'), *parts()], protocol=protocol)))
    with pytest.raises(pickle.UnpicklingError, match=f'refused {os.name}.system'): read_mnist_pickle(tmp_path/'f')
    assert not mark.exists()
    pickle.loads(gzip.decompress((tmp_path/'f').read_bytes()))
    assert mark.exists()  # it was armed

@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('a', [np.array([1, None], dtype=object), np.array([{}]), np.array(['text']), np.array([b'text']),
    *(np.zeros(2, dtype=t) for t in ('f4,O', 'i4,f4', 'M8[s]', 'c16', 'V4'))], ids=lambda a: str(a.dtype))
def test_arrays_of_other_things_are_refused(protocol, a):
    with pytest.raises(pickle.UnpicklingError, match='refused'): D._load_numbers(pickle.dumps(a, protocol=protocol))

@pytest.mark.parametrize('f,args,name', [(eval, ('1',), '(__builtin__|builtins).eval'),
    (getattr, (1, 'real'), '(__builtin__|builtins).getattr'), (np.load, ('f',), 'numpy.load'),
    (np.fromfile, ('f',), 'numpy.*fromfile'), (torch.load, ('f',), r'torch.serialization.load')])
def test_other_functions_are_refused(f, args, name):
    for protocol in range(6):
        body = pickle.dumps(Call(f, *args), protocol=protocol)
        with pytest.raises(pickle.UnpicklingError, match=f'refused {name}'): D._load_numbers(body)

@pytest.mark.parametrize('body', [
    b'\x80\4\x8c\5numpy\x8c\x0fndarray.__new__\x93.',                           # a dotted name
    b'\x80\4\x8c\5numpy\x8c\x13core.multiarray._reconstruct\x93.',              # the right words, cut elsewhere
    b'\x80\2\x82\1.',                                                           # an extension code
    b'Pid\n.',                                                                  # a persistent id
    b'c_codecs\nencode\n(Va\nVrot13\ntR.',                                      # an encoding that is none of text
    b'cnumpy\ndtype\n}Vx\nK\1sb.',                                              # set attributes on the class that stands in for dtypes
    b'cnumpy.core.multiarray\n_reconstruct\n(N}Vx\nK\1stb.',                    # or on a function
    b'cnumpy\ndtype\n(Vf4\ntR(K\3V<\nN(Va\nt}tb.',                              # fields slipped in through a dtype's state
    b'', b'\x80', b'\x80\4.', b'<html>', b'\x80\x63.', b'\x8e' + b'\xff'*8,
    b'\x80\4\x8e' + struct.pack('<Q', 2**62) + b'x.',                           # a string said to be huge
])
def test_crafted_pickles(body):
    with pytest.raises(pickle.UnpicklingError, match='.'): D._load_numbers(body)
    assert not hasattr(D._Dtype, 'x') and not hasattr(D._NumbersOnly._array, 'x')

@pytest.mark.parametrize('o', [{}, {'a': 1}, [{1}], (frozenset({1}),)], ids=str)
def test_dicts_and_sets_are_refused(o):
    with pytest.raises(pickle.UnpicklingError, match='refused'): D._load_numbers(pickle.dumps(o, protocol=4))

@pytest.mark.parametrize('change', [lambda p: p[:2], lambda p: (), lambda p: 7, lambda p: [1, 2, 3],
    lambda p: [(x.astype('i4'), y) for x, y in p], lambda p: [(x[:, :-1], y) for x, y in p],
    lambda p: [(x, y[:-1]) for x, y in p], lambda p: [(x, y[:, None]) for x, y in p],
    lambda p: [(x*256, y) for x, y in p], lambda p: [(x - 1, y) for x, y in p], lambda p: [(x*np.nan, y) for x, y in p],
    lambda p: [(x, y.astype('f4')) for x, y in p], lambda p: [(x, y + 10) for x, y in p], lambda p: [(x, y - 10) for x, y in p],
    lambda p: [(x[:0], y[:0]) for x, y in p]])
def test_pickle_of_another_form(tmp_path, change):
    (tmp_path/'f').write_bytes(pickle.dumps(change(parts())))
    with pytest.raises(ValueError, match='not of the form'): read_mnist_pickle(tmp_path/'f')


# ---- pictures

def test_show_images():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    d = mnist(sample=True).train
    for a, n in ((d.x[:12], 12), (d.x[:12].numpy(), 12), (d.x[0], 1), (d.x[0].view(28, 28), 1), (d.x[:3].view(3, 28, 28), 3),
                 (d.x[:3].view(3, 1, 28, 28), 3), (d.x[:2].double().requires_grad_(), 2), (np.zeros((2, 5, 7)), 2), (np.zeros((5, 7)), 1)):
        fig = show_images(a)
        shown = [im for ax in fig.axes for im in ax.images]
        assert len(shown) == n
        plt.close(fig)
    fig = show_images(d.x[:12], titles=d.y[:12].tolist(), ncols=5)
    assert [ax.get_title() for ax in fig.axes[:12]] == [str(int(i)) for i in d.y[:12]] and len(fig.axes) == 15
    assert np.array_equal(fig.axes[3].images[0].get_array(), d.x[3].view(28, 28))
    plt.close(fig)
    for bad in (np.zeros(5), np.zeros((0, 784)), np.zeros((2, 3, 28, 28)), np.zeros((2, 2, 2, 2, 2))):
        with pytest.raises(ValueError, match='show_images: shape'): show_images(bad)
    with pytest.raises(ValueError, match='2 titles for 3 images'): show_images(d.x[:3], titles='ab')


# ---- the complete files

@whole
def test_whole_sets(monkeypatch):
    monkeypatch.setenv('MINIAI_DATA', WHOLE)
    for function, first in ((mnist, [5, 0, 4]), (fashion_mnist, [9, 0, 0])):
        d = function(sample=False)
        assert [tuple(t.shape) for part in d for t in part] == [(50000, 784), (50000,), (10000, 784), (10000,), (10000, 784), (10000,)]
        assert d.train.y[:3].tolist() == first and d.train.x.max() == 255/256
        assert torch.equal(d.train.x*256, (d.train.x*256).round())

@whole
def test_whole_set_from_a_server(serve, tmp_path):
    "The public function with its own hashes, through HTTP and the folder"
    bodies = {p.name: p.read_bytes() for p in (Path(WHOLE)/'mnist').iterdir() if p.name.endswith('.gz')}
    if len(bodies) != 4: pytest.skip('the files in MINIAI_DATA are unpacked')
    s = serve(bodies=bodies)
    d = mnist(mirrors=[dead_url(), s.url], folder=tmp_path)
    again = mnist(mirrors=[], folder=tmp_path, sample=False)
    assert len(s.asked) == 4 and torch.equal(d.train.x, again.train.x) and d.train.y[:3].tolist() == [5, 0, 4]

@whole
def test_whole_set_as_a_pickle(monkeypatch, tmp_path):
    "A file of the classic size and form"
    monkeypatch.setenv('MINIAI_DATA', WHOLE)
    d = mnist(sample=False)
    (tmp_path/'f').write_bytes(pickle.dumps(tuple((p.x.numpy(), p.y.numpy()) for p in d), protocol=4))
    for a, b in zip(read_mnist_pickle(tmp_path/'f'), d): assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)

@whole
def test_sample_is_part_of_the_whole(monkeypatch):
    monkeypatch.setenv('MINIAI_DATA', WHOLE)
    d = mnist(sample=False)
    known = {r.tobytes(): y for part in (d.train, d.valid) for r, y in zip(part.x.numpy(), part.y.tolist())}
    for part in mnist(sample=True): assert all(known[r.tobytes()] == y for r, y in zip(part.x.numpy(), part.y.tolist()))

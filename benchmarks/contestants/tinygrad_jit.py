"tinygrad: a step under `TinyJit`"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, run


def setup(job):
    import os
    import shutil

    import numpy as np
    if 'CC' not in os.environ and not shutil.which('clang'):  # it takes no other compiler, but the name may have a number
        os.environ['CC'] = next((name for n in range(30, 13, -1) if shutil.which(name := f'clang-{n}')), 'clang')
    from tinygrad import Context, Tensor, TinyJit, nn
    Tensor.manual_seed(job.seed)
    rng = np.random.default_rng(job.seed)
    x, y, vx, vy = (Tensor(a).realize() for a in (job.x, job.y.astype(np.int32), job.vx, job.vy.astype(np.int32)))
    n, bs = len(job.x), job.bs
    params = [Tensor(w).realize() for w in job.weights]
    w1, b1, w2, b2 = params
    opt = nn.optim.SGD(params, lr=job.lr)

    def logits(xb): return (xb @ w1.T + b1).relu() @ w2.T + b2

    def step(idx):
        opt.zero_grad()
        loss = logits(x[idx]).sparse_categorical_crossentropy(y[idx]).backward()
        opt.step()
        return loss.realize()

    step_full, step_last = TinyJit(step), TinyJit(step)  # a jitted step has one shape

    @TinyJit
    def evaluate():
        out = logits(vx)
        return out.sparse_categorical_crossentropy(vy).realize(), (out.argmax(1) == vy).mean().realize()

    def go():
        for p, w in zip(params, job.weights): p.assign(Tensor(w)).realize()
        updates = 0
        for _ in range(job.epochs):
            order = rng.permutation(n).astype(np.int32)
            with Context(TRAINING=1):
                for i in range(0, n, bs):
                    idx = Tensor(order[i:i + bs]).realize()
                    (step_full if idx.shape[0] == bs else step_last)(idx)
                    updates += 1
            accuracy = evaluate()[1].item()
        return Result([p.numpy() for p in params], accuracy, updates)
    return go


if __name__ == '__main__': run(setup, ['tinygrad'], jit=True)

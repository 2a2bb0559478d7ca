"`torch.compile` of the full step: forward, gradient and update"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, run


def setup(job):
    import os
    import tempfile
    folder = tempfile.TemporaryDirectory()  # each process compiles anew, as a first run does
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = folder.name
    os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = '1'
    import torch
    import torch.nn.functional as F

    from miniai.training import Dataset, get_dls
    x, y, vx, vy = job.tensors()
    train_dl, valid_dl = get_dls(Dataset(x, y), Dataset(vx, vy), job.bs)

    def logits(params, xb):
        w1, b1, w2, b2 = params
        return F.linear(F.linear(xb, w1, b1).relu(), w2, b2)

    def loss_func(params, xb, yb): return F.cross_entropy(logits(params, xb), yb)

    @torch.compile(dynamic=False)
    def step(params, xb, yb):
        grads, loss = torch.func.grad_and_value(loss_func)(params, xb, yb)
        return tuple(p - job.lr * g for p, g in zip(params, grads)), loss  # compiled, an update in place here goes wrong, and silently

    @torch.no_grad()
    def go(folder=folder):  # the folder lives as long as this function
        torch.manual_seed(job.seed)
        params, updates = tuple(torch.from_numpy(w) for w in job.weights), 0
        for _ in range(job.epochs):
            for xb, yb in train_dl:
                params, loss = step(params, xb, yb)
                updates += 1
            right, loss = 0, 0.
            for xb, yb in valid_dl:
                out = logits(params, xb)
                loss += F.cross_entropy(out, yb) * len(xb)
                right += (out.argmax(1) == yb).sum()
        return Result([p.numpy() for p in params], right.item() / len(vx), updates)

    return go


if __name__ == '__main__': run(setup, ['torch'], jit=True)

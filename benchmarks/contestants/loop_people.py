"the loop as people write it: `x[idx]`, `p -= lr * p.grad`, `model.zero_grad()`"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, arrays, run


def setup(job):
    import torch
    import torch.nn.functional as F
    x, y, vx, vy = job.tensors()

    def go():
        model, updates = job.torch_model(), 0
        for _ in range(job.epochs):
            perm = torch.randperm(len(x))
            for i in range(0, len(x), job.bs):
                idx = perm[i:i + job.bs]
                xb, yb = x[idx], y[idx]
                loss = F.cross_entropy(model(xb), yb)
                loss.backward()
                with torch.no_grad():
                    for p in model.parameters(): p -= job.lr * p.grad
                    model.zero_grad()
                updates += 1
            right, loss = 0, 0.
            with torch.no_grad():
                for i in range(0, len(vx), job.valid_bs):
                    xb, yb = vx[i:i + job.valid_bs], vy[i:i + job.valid_bs]
                    out = model(xb)
                    loss += F.cross_entropy(out, yb) * len(xb)
                    right += (out.argmax(1) == yb).sum()
        return Result(arrays(model), right.item() / len(vx), updates)
    return go


if __name__ == '__main__': run(setup, ['torch'])

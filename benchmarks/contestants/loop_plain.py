"a loop without a trainer: `torch.nn`, autograd, miniai's loader, weights updated in place"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, arrays, run


def setup(job):
    import torch
    from torch import nn

    from miniai.training import Dataset, get_dls
    x, y, vx, vy = job.tensors()
    train_dl, valid_dl = get_dls(Dataset(x, y), Dataset(vx, vy), job.bs)

    def go():
        model, loss_func, updates = job.torch_model(), nn.CrossEntropyLoss(), 0
        params = list(model.parameters())
        for _ in range(job.epochs):
            for xb, yb in train_dl:
                loss_func(model(xb), yb).backward()
                with torch.no_grad():
                    for p in params: p.add_(p.grad, alpha=-job.lr)
                for p in params: p.grad = None
                updates += 1
            right, loss = 0, 0.
            with torch.no_grad():
                for xb, yb in valid_dl:
                    out = model(xb)
                    loss += loss_func(out, yb) * len(xb)
                    right += (out.argmax(1) == yb).sum()
        return Result(arrays(model), right.item() / len(vx), updates)
    return go


if __name__ == '__main__': run(setup, ['torch'])

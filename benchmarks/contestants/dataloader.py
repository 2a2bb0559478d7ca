"PyTorch as its tutorials write it: `DataLoader` over a `TensorDataset`, item by item, `torch.optim.SGD`"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, arrays, run


def setup(job, num_workers=0):
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    x, y, vx, vy = job.tensors()
    train_dl = DataLoader(TensorDataset(x, y), batch_size=job.bs, shuffle=True, num_workers=num_workers)
    valid_dl = DataLoader(TensorDataset(vx, vy), batch_size=job.valid_bs, num_workers=num_workers)

    def go():
        model, loss_func, updates = job.torch_model(), nn.CrossEntropyLoss(), 0
        opt = torch.optim.SGD(model.parameters(), lr=job.lr)
        for _ in range(job.epochs):
            for xb, yb in train_dl:
                loss = loss_func(model(xb), yb)
                opt.zero_grad()
                loss.backward()
                opt.step()
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

"miniai's `fit`, loader and SGD around `torch.nn` and autograd"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, arrays, run


def setup(job):
    from torch import nn

    from miniai.training import SGD, Dataset, fit, get_dls
    x, y, vx, vy = job.tensors()
    train_dl, valid_dl = get_dls(Dataset(x, y), Dataset(vx, vy), job.bs)

    def go():
        model = job.torch_model()
        records = fit(job.epochs, model, nn.CrossEntropyLoss(), SGD(model.parameters(), lr=job.lr), train_dl, valid_dl)
        return Result(arrays(model), records[-1].valid_accuracy, len(records) * len(train_dl))
    return go


if __name__ == '__main__': run(setup, ['torch'])

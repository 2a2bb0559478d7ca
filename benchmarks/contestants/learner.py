"miniai's `Learner` without callbacks, its loader and SGD, around `torch.nn` and autograd"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, arrays, run


def setup(job, layers='torch', callbacks=list):
    from miniai.learner import Learner
    from miniai.training import Dataset, get_dls
    if layers == 'ours':
        from miniai.losses import CrossEntropyLoss
        from miniai.module import Linear, ReLU, Sequential
    else:
        from torch.nn import CrossEntropyLoss, Linear, ReLU, Sequential
    x, y, vx, vy = job.tensors()
    dls = get_dls(Dataset(x, y), Dataset(vx, vy), job.bs)

    def go():
        model = job.load(Sequential(Linear(784, len(job.b1)), ReLU(), Linear(len(job.b1), 10)))
        learn = Learner(model, dls, CrossEntropyLoss(), lr=job.lr, cbs=callbacks())
        records = learn.fit(job.epochs)
        return Result(arrays(model), records[-1].get('valid_accuracy'), learn.steps)
    return go


if __name__ == '__main__': run(setup, ['torch'])

"fastai's `Learner`, its own `DataLoader`"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, arrays, run


def setup(job, by_batch=False):
    import fastai.callback.progress  # noqa: F401 - it registers the progress bar
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.optimizer import SGD
    from torch import nn
    from torch.utils.data import TensorDataset
    x, y, vx, vy = job.tensors()

    class BatchLoader(DataLoader):
        "Takes a batch of examples at once"
        def create_batches(self, samples):
            for i in self.chunkify(samples): yield self.dataset.tensors[0][i], self.dataset.tensors[1][i]

    kind = BatchLoader if by_batch else DataLoader
    train_dl = kind(TensorDataset(x, y), bs=job.bs, shuffle=True, num_workers=0)
    valid_dl = kind(TensorDataset(vx, vy), bs=job.valid_bs, num_workers=0)

    def go():
        model = job.torch_model()
        learn = Learner(DataLoaders(train_dl, valid_dl), model, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, metrics=accuracy)
        learn.fit(job.epochs, lr=job.lr)
        return Result(arrays(model), learn.recorder.values[-1][-1], job.epochs * len(train_dl))
    return go


if __name__ == '__main__': run(setup, ['fastai', 'torch'])

"skorch's `NeuralNetClassifier`"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, arrays, run


def setup(job):
    import torch
    from skorch import NeuralNetClassifier
    from skorch.dataset import Dataset
    from skorch.helper import predefined_split
    job.tensors()  # one thread, seed
    net = NeuralNetClassifier(job.torch_model(), criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=job.lr,
                              batch_size=job.bs, iterator_valid__batch_size=job.valid_bs, iterator_train__shuffle=True,
                              max_epochs=job.epochs, train_split=predefined_split(Dataset(job.vx, job.vy)))

    def go():
        net.initialize()
        job.load(net.module_)
        net.partial_fit(job.x, job.y)
        updates = sum(len([b for b in e['batches'] if 'train_loss' in b]) for e in net.history)
        return Result(arrays(net.module_), net.history[-1, 'valid_acc'], updates)
    return go


if __name__ == '__main__': run(setup, ['skorch', 'torch'])

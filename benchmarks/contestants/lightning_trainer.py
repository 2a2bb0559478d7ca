"Lightning's `Trainer`, PyTorch's `DataLoader`; no logger, no checkpoints, its progress bar on"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, arrays, run


def setup(job, by_batch=False):
    import logging
    import warnings

    import lightning
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    warnings.filterwarnings('ignore')
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    x, y, vx, vy = job.tensors()

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.loss_func = job.torch_model(), nn.CrossEntropyLoss()

        def training_step(self, batch, batch_idx):
            xb, yb = batch
            return self.loss_func(self.model(xb), yb)

        def validation_step(self, batch, batch_idx):
            xb, yb = batch
            out = self.model(xb)
            self.log('valid_loss', self.loss_func(out, yb), batch_size=len(xb))
            self.log('valid_accuracy', (out.argmax(1) == yb).float().mean(), batch_size=len(xb))

        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=job.lr)

    if by_batch:
        from miniai.training import Dataset, get_dls
        train_dl, valid_dl = get_dls(Dataset(x, y), Dataset(vx, vy), job.bs)
    else:
        train_dl = DataLoader(TensorDataset(x, y), batch_size=job.bs, shuffle=True)
        valid_dl = DataLoader(TensorDataset(vx, vy), batch_size=job.valid_bs)

    def go():
        net = Net()
        trainer = lightning.Trainer(max_epochs=job.epochs, accelerator='cpu', devices=1, logger=False, enable_checkpointing=False,
                                    enable_model_summary=False, num_sanity_val_steps=0)
        trainer.fit(net, train_dl, valid_dl)
        return Result(arrays(net.model), trainer.callback_metrics['valid_accuracy'], trainer.global_step)
    return go


if __name__ == '__main__': run(setup, ['lightning', 'torch'])

# Batches that are dicts, as datasets of Hugging Face give them, loaded by two processes.
import torch
from torch import nn
from torch.utils.data import DataLoader

from miniai.learner import Learner
from miniai.metrics import Accuracy, MetricsCB

class Texts:                            # token numbers and labels
    def __len__(self): return 600
    def __getitem__(self, i):
        ids = torch.randint(100, (12,), generator=torch.Generator().manual_seed(i))
        return {'input_ids': ids, 'labels': (ids < 50).sum() > 6}

class Bag(nn.Sequential):
    def forward(self, input_ids): return super().forward(input_ids)

class DictLearner(Learner):             # what the model gets, and what the loss gets
    def inputs(self): return {'input_ids': self.batch['input_ids']}
    def targets(self): return self.batch['labels'].long()

if __name__ == '__main__':
    dls = [DataLoader(Texts(), 60, num_workers=2) for _ in range(2)]
    model, cbs = Bag(nn.EmbeddingBag(100, 8), nn.Linear(8, 2)), [MetricsCB(Accuracy())]
    DictLearner(model, dls, nn.CrossEntropyLoss(), torch.optim.Adam, lr=.05, cbs=cbs).fit(5)

# A trained body and a new head: first only the head learns, then both, the body ten times slower.
import torch
from torch import nn

from miniai.data import mnist
from miniai.learner import Learner
from miniai.metrics import Accuracy, MetricsCB
from miniai.optim import AdamW
from miniai.training import get_dls

torch.manual_seed(0)
data = mnist(sample=True)
body, old_head = nn.Sequential(nn.Linear(784, 64), nn.ReLU()), nn.Linear(64, 10)
Learner(nn.Sequential(body, old_head), get_dls(data.train, data.valid), nn.CrossEntropyLoss(), AdamW, .003).fit(3)

def odd(part): return part.x, part.y % 2      # the new task: is the digit odd?
def groups(params, lr): return AdamW([{'params': body.parameters(), 'lr': lr/10}, {'params': head.parameters()}], lr)

head = nn.Linear(64, 2)
learn = Learner(nn.Sequential(body, head), get_dls(odd(data.train), odd(data.valid)), nn.CrossEntropyLoss(),
                groups, lr=.003, cbs=[MetricsCB(Accuracy())])
body.requires_grad_(False)
learn.fit(1)
body.requires_grad_(True)
learn.fit(2)

# A trained body and a new head: first only the head learns, then both, the body ten times slower.
import torch
from torch import nn

from miniai.data import mnist
from miniai.learner import Learner
from miniai.metrics import Accuracy, MetricsCB
from miniai.optim import AdamW
from miniai.training import get_dls

torch.manual_seed(0)
train, valid = mnist(sample=True)[:2]
body, loss_func = nn.Sequential(nn.Linear(784, 64), nn.ReLU()), nn.CrossEntropyLoss()
digits = nn.Sequential(body, nn.Linear(64, 10))
Learner(digits, get_dls(train, valid), loss_func, AdamW, .003).fit(3)
def odd(part): return part.x, part.y % 2      # the new task: is the digit odd?
def two_rates(params, lr):
    return AdamW([{'params': head.parameters()}, {'params': body.parameters(), 'lr': lr/10}], lr)

head = nn.Linear(64, 2)
learn = Learner(nn.Sequential(body, head), get_dls(odd(train), odd(valid)), loss_func, two_rates,
                lr=.003, cbs=[MetricsCB(Accuracy())])
for trained, epochs in (False, 1), (True, 2):
    body.requires_grad_(trained)
    learn.fit(epochs)

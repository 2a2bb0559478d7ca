# Predict a number from a table: eight columns, one target per row.
import torch
from torch import nn

from miniai.learner import Learner
from miniai.metrics import MetricsCB
from miniai.optim import AdamW
from miniai.training import Dataset, get_dls

torch.manual_seed(0)
x = torch.randn(2000, 8)
y = x[:, 0]*x[:, 1] + x[:, 2] + .1*torch.randn(2000)
y = y[:, None]                          # the shape of the output: (n, 1)

train, valid = Dataset(x[:1600], y[:1600]), Dataset(x[1600:], y[1600:])
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
learn = Learner(model, get_dls(train, valid, bs=64), nn.MSELoss(), AdamW, lr=.01,
                cbs=[MetricsCB(mae=nn.L1Loss())])
learn.fit(15)
explained = 1 - learn.evaluate()['loss']/valid.y.var().item()
print(f'{explained:.0%} of the variance is explained')

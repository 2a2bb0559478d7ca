# A class for each pixel: outputs (n, 2, 16, 16), targets (n, 16, 16).
import torch
from torch import nn

from miniai.learner import Learner
from miniai.metrics import Accuracy, F1, MetricsCB
from miniai.training import get_dls

torch.manual_seed(0)
row, column = torch.meshgrid(torch.arange(16.), torch.arange(16.), indexing='ij')
centre, radius = torch.rand(600, 2, 1, 1)*16, torch.rand(600, 1, 1)*4 + 2
mask = (row - centre[:, 0])**2 + (column - centre[:, 1])**2 < radius**2     # (600, 16, 16)
x, y = mask[:, None] + .5*torch.randn(600, 1, 16, 16), mask.long()

dls = get_dls((x[:500], y[:500]), (x[500:], y[500:]), bs=50)
model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))
learn = Learner(model, dls, nn.CrossEntropyLoss(), torch.optim.Adam, lr=.02,
                cbs=[MetricsCB(Accuracy(), F1())])
learn.fit(4)
print(learn.predict(x[500:]).argmax(1).shape)

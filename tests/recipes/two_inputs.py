# A model with two inputs: a batch is ((a, b), y), and the model is called as model(a, b).
import torch
from torch import nn
from torch.utils.data import DataLoader

from miniai.learner import Learner

class Pairs:
    def __init__(self, n): self.a, self.b = torch.randn(n, 6), torch.randn(n, 3)
    def __len__(self): return len(self.a)
    def __getitem__(self, i): return (self.a[i], self.b[i]), int(self.a[i].sum() > self.b[i].sum())

class Compare(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 16), nn.Linear(3, 16)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(16, 2))
    def forward(self, a, b): return self.head(self.left(a) + self.right(b))

torch.manual_seed(0)
dls = DataLoader(Pairs(1000), 50, shuffle=True), DataLoader(Pairs(200), 100)
learn = Learner(Compare(), dls, nn.CrossEntropyLoss(), torch.optim.Adam, lr=.01)
learn.fit(5)
print(learn.predict((torch.ones(4, 6), torch.zeros(4, 3))).argmax(1))

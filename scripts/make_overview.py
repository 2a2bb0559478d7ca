#!/usr/bin/env python3
"""Draw the picture of the README, nbs/images/overview.png, from a run made here and now.

    python scripts/make_overview.py

Left: the training loss of the first epochs, our layers and torch.nn from the same seed over the same batches. Right: the
first digits of the test set with the predictions of our network, and some that it gets wrong. It takes about ten seconds."""
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from miniai.data import mnist
from miniai.losses import CrossEntropyLoss
from miniai.module import Linear, ReLU, Sequential
from miniai.training import SGD, Dataset, get_dls

target = Path(__file__).resolve().parents[1] / 'nbs' / 'images' / 'overview.png'


def train(data, sequential, linear, relu, loss, opt, epochs=2):
    "A network of 50 hidden units after `epochs`, and its loss at every batch"
    torch.manual_seed(0)
    train_dl, _ = get_dls(Dataset(*data.train), Dataset(*data.valid), bs=64)
    model, loss_func, losses = sequential(linear(784, 50), relu(), linear(50, 10)), loss(), []
    optimiser = opt(model.parameters(), lr=0.2)
    for _ in range(epochs):
        for xb, yb in train_dl:
            batch_loss = loss_func(model(xb), yb)
            batch_loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(batch_loss.item())
    return model, torch.tensor(losses)


def smooth(losses, width=50): return losses.unfold(0, width, 1).mean(1)


def main():
    torch.set_num_threads(1)
    data = mnist()
    model, ours = train(data, Sequential, Linear, ReLU, CrossEntropyLoss, SGD)
    _, theirs = train(data, nn.Sequential, nn.Linear, nn.ReLU, nn.CrossEntropyLoss, torch.optim.SGD)
    gap = (ours[:100] - theirs[:100]).abs().max().item()
    x, y = data.test
    with torch.no_grad(): predicted = model(x).argmax(1)
    right = (predicted == y).float().mean().item()

    fig = Figure(figsize=(10, 3.6), layout='constrained', dpi=100)
    left, other = fig.subfigures(1, 2, width_ratios=[1, 1])
    ax = left.subplots()
    ax.plot(smooth(theirs), color='#e69f00', lw=5, alpha=.6, label='torch.nn')
    ax.plot(smooth(ours), color='#0072b2', lw=1.2, label='miniai')
    ax.set(xlabel='batch of 64', ylabel='training loss, mean of 50 batches', title=f'one seed: {gap:.0e} apart in the first 100 batches')
    ax.legend(frameon=False)
    ax.spines[['top', 'right']].set_visible(False)
    wrong = (predicted != y).nonzero()[:, 0]
    shown = torch.cat([torch.arange(18), wrong[wrong >= 18][:6]])
    for a, i in zip(other.subplots(4, 6).flat, shown.tolist()):
        a.imshow(x[i].reshape(28, 28), cmap='gray_r')
        title, color = (f'{predicted[i]}', 'black') if predicted[i] == y[i] else (f'{predicted[i]}, is {y[i]}', '#d55e00')
        a.set_title(title, color=color, fontsize=9, pad=2)
        a.axis('off')
    other.suptitle(f'predictions for test digits: {right:.1%} right; last row: six errors', fontsize=12)
    target.parent.mkdir(exist_ok=True)
    fig.savefig(target, metadata={'Software': None})
    size = target.stat().st_size / 1024
    print(f'{target.name}: {size:.0f} KB, test accuracy {right:.4f}, largest gap in the first 100 batches {gap:.1e}')


if __name__ == '__main__': main()

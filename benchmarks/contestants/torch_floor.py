"by hand in torch without a framework: kept buffers, `out=`, gradients kept, then the update"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, run


def setup(job):
    import torch
    x, y, vx, vy = job.tensors()
    n, bs, lr = len(x), job.bs, job.lr
    relu_bwd, softmax = torch.ops.aten.threshold_backward.grad_input, torch.ops.aten._softmax.out
    minus_one = torch.full((bs, 1), -1.)

    def buffers(k):
        sizes = dict(xb=(k, 784), h=(k, 50), p=(k, 10), gh=(k, 50))
        return *(torch.empty(size) for size in sizes.values()), minus_one[:k]

    @torch.no_grad()
    def go():
        torch.manual_seed(job.seed)
        w1, b1, w2, b2 = params = [torch.from_numpy(w) for w in job.weights]
        gw1, gb1, gw2, gb2 = grads = [torch.empty_like(w) for w in params]
        w1t, w2t = w1.T, w2.T
        kept, picked, updates = {k: buffers(k) for k in {bs, n % bs} - {0}}, torch.empty(n, 1), 0
        for _ in range(job.epochs):
            order = torch.randperm(n)
            labels = y.index_select(0, order)[:, None]
            for idx, t, chosen in zip(order.split(bs), labels.split(bs), picked.split(bs)):
                k = len(idx)
                xb, h, p, gh, ones = kept[k]
                torch.index_select(x, 0, idx, out=xb)
                torch.addmm(b1, xb, w1t, out=h).clamp_min_(0)
                softmax(torch.addmm(b2, h, w2t, out=p), 1, False, out=p)
                torch.gather(p, 1, t, out=chosen)  # for the loss, looked at once an epoch
                p.scatter_add_(1, t, ones)         # the gradient of the summed loss; the mean is taken in the step
                torch.mm(p.T, h, out=gw2)
                torch.sum(p, 0, out=gb2)
                torch.mm(p, w2, out=gh)
                relu_bwd(gh, h, 0, grad_input=gh)
                torch.mm(gh.T, xb, out=gw1)
                torch.sum(gh, 0, out=gb1)
                for w, g in zip(params, grads): w.add_(g, alpha=-lr / k)
                updates += 1
            train_loss = -picked.log().mean().item()
            scores = torch.addmm(b2, torch.addmm(b1, vx, w1t).clamp_min_(0), w2t)
            valid_loss = -scores.log_softmax(1).gather(1, vy[:, None]).mean().item()
            accuracy = (scores.argmax(1) == vy).float().mean().item()
        assert train_loss < 1 and valid_loss < 1
        return Result([w.numpy() for w in params], accuracy, updates)
    return go


if __name__ == '__main__': run(setup, ['torch'])

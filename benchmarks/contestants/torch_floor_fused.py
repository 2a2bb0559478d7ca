"the floor once more, each update done by the matmul that would have made the gradient: for plain SGD only"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, run


def setup(job):
    import torch
    x, y, vx, vy = job.tensors()
    n, bs, lr = len(x), job.bs, job.lr
    relu_bwd, softmax = torch.ops.aten.threshold_backward.grad_input, torch.ops.aten._softmax.out
    minus_one, one = torch.full((bs, 1), -1.), torch.ones(bs)

    def buffers(k):
        return *(torch.empty(k, m) for m in (784, 50, 10, 50)), minus_one[:k], one[:k]

    @torch.no_grad()
    def go():
        torch.manual_seed(job.seed)
        w1, b1, w2, b2 = params = [torch.from_numpy(w) for w in job.weights]
        w1t, w2t = w1.T, w2.T
        kept, picked, updates = {k: buffers(k) for k in {bs, n % bs} - {0}}, torch.empty(n, 1), 0
        for _ in range(job.epochs):
            order = torch.randperm(n)
            labels = y.index_select(0, order)[:, None]
            for idx, t, chosen in zip(order.split(bs), labels.split(bs), picked.split(bs)):
                k = len(idx)
                xb, h, p, gh, minus, ones = kept[k]
                torch.index_select(x, 0, idx, out=xb)
                torch.addmm(b1, xb, w1t, out=h).clamp_min_(0)
                softmax(torch.addmm(b2, h, w2t, out=p), 1, False, out=p)
                torch.gather(p, 1, t, out=chosen)
                p.scatter_add_(1, t, minus)
                torch.mm(p, w2, out=gh)
                relu_bwd(gh, h, 0, grad_input=gh)
                w2.addmm_(p.T, h, alpha=-lr / k)
                b2.addmv_(p.T, ones, alpha=-lr / k)
                w1.addmm_(gh.T, xb, alpha=-lr / k)
                b1.addmv_(gh.T, ones, alpha=-lr / k)
                updates += 1
            train_loss = -picked.log().mean().item()
            scores = torch.addmm(b2, torch.addmm(b1, vx, w1t).clamp_min_(0), w2t)
            valid_loss = -scores.log_softmax(1).gather(1, vy[:, None]).mean().item()
            accuracy = (scores.argmax(1) == vy).float().mean().item()
        assert train_loss < 1 and valid_loss < 1
        return Result([w.numpy() for w in params], accuracy, updates)
    return go


if __name__ == '__main__': run(setup, ['torch'])

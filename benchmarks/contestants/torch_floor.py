"by hand in torch without a framework: kept buffers, `out=`, gradients kept, then the update"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, run


def setup(job):
    import torch
    x, y, vx, vy = job.tensors()
    n, bs, lr = len(x), job.bs, job.lr
    relu_bwd = torch.ops.aten.threshold_backward.grad_input
    minus_one = torch.full((1, bs), -1.)

    def buffers(k):  # a column an example, so (features, rows): softmax then runs along memory, and the first matmul takes 15% less
        return *(torch.empty(m) for m in ((k, 784), (50, k), (10, k), (1, k), (50, k))), minus_one[:, :k]

    @torch.no_grad()
    def go():
        torch.manual_seed(job.seed)
        w1, b1, w2, b2 = params = [torch.from_numpy(w) for w in job.weights]
        gw1, gb1, gw2, gb2 = grads = [torch.empty_like(w) for w in params]
        w2t, b1c, b2c = w2.T, b1[:, None], b2[:, None]
        kept, picked, updates = {k: buffers(k) for k in {bs, n % bs} - {0}}, torch.empty(1, n), 0
        for _ in range(job.epochs):
            order = torch.randperm(n)
            labels = y.index_select(0, order)[None]
            for idx, t, chosen in zip(order.split(bs), labels.split(bs, 1), picked.split(bs, 1)):
                k = len(idx)
                xb, h, p, s, gh, minus = kept[k]
                torch.index_select(x, 0, idx, out=xb)
                torch.addmm(b1c, w1, xb.T, out=h).clamp_min_(0)
                torch.addmm(b2c, w2, h, out=p)
                p.sub_(torch.amax(p, 0, keepdim=True, out=s)).exp_()
                p.div_(torch.sum(p, 0, keepdim=True, out=s))
                torch.gather(p, 0, t, out=chosen)  # for the loss, looked at once an epoch
                p.scatter_add_(0, t, minus)        # the gradient of the summed loss; the mean is taken in the step
                torch.mm(p, h.T, out=gw2)
                torch.sum(p, 1, out=gb2)
                torch.mm(w2t, p, out=gh)
                relu_bwd(gh, h, 0, grad_input=gh)
                torch.mm(gh, xb, out=gw1)
                torch.sum(gh, 1, out=gb1)
                for w, g in zip(params, grads): w.add_(g, alpha=-lr / k)
                updates += 1
            train_loss = -picked.log().mean().item()
            logits = torch.addmm(b2, torch.addmm(b1, vx, w1.T).clamp_min_(0), w2t)
            valid_loss = -logits.log_softmax(1).gather(1, vy[:, None]).mean().item()
            accuracy = (logits.argmax(1) == vy).float().mean().item()
        assert train_loss < 1 and valid_loss < 1
        return Result([w.numpy() for w in params], accuracy, updates)
    return go


if __name__ == '__main__': run(setup, ['torch'])

"by hand in NumPy: kept buffers, `out=`"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, run


def setup(job):
    import numpy as np
    x, y, vx, vy = job.x, job.y, job.vx, job.vy
    n, bs = len(x), job.bs
    rng = np.random.default_rng(job.seed)

    def buffers(k):
        return *(np.empty((k, m), np.float32) for m in (784, 50, 10, 1, 50)), np.empty((k, 50), bool), np.arange(k)

    def go():
        w1, b1, w2, b2 = params = job.weights
        gw1, gb1, gw2, gb2 = grads = [np.empty_like(w) for w in params]
        kept, picked, updates = {k: buffers(k) for k in {bs, n % bs} - {0}}, np.empty(n, np.float32), 0
        for _ in range(job.epochs):
            order = rng.permutation(n)
            labels = y[order]
            for i in range(0, n, bs):
                idx, t = order[i:i + bs], labels[i:i + bs]
                k = len(idx)
                xb, h, p, s, gh, dead, rows = kept[k]
                np.take(x, idx, 0, out=xb, mode='clip')  # 'raise' would copy through a buffer
                np.matmul(xb, w1.T, out=h)
                h += b1
                np.maximum(h, 0, out=h)
                np.matmul(h, w2.T, out=p)
                p += b2
                p -= np.max(p, 1, out=s, keepdims=True)
                np.exp(p, out=p)
                p /= np.sum(p, 1, out=s, keepdims=True)
                chosen = p[rows, t]
                picked[i:i + k] = chosen
                p[rows, t] = chosen - 1
                np.matmul(p.T, h, out=gw2)
                np.sum(p, 0, out=gb2)
                np.matmul(p, w2, out=gh)
                np.less_equal(h, 0, out=dead)
                np.copyto(gh, 0, where=dead)
                np.matmul(gh.T, xb, out=gw1)
                np.sum(gh, 0, out=gb1)
                step = np.float32(job.lr / k)
                for w, g in zip(params, grads):
                    g *= step
                    w -= g
                updates += 1
            train_loss = -np.log(picked).mean()
            z = np.maximum(vx @ w1.T + b1, 0) @ w2.T + b2
            z -= z.max(1, keepdims=True)
            valid_loss = (np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), vy]).mean()
            accuracy = (z.argmax(1) == vy).mean()
        assert train_loss < 1 and valid_loss < 1
        return Result(params, accuracy, updates)
    return go


if __name__ == '__main__': run(setup, ['numpy'])

"JAX: an epoch is one jitted `lax.scan`"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, run


def setup(job):
    import os
    os.environ['XLA_FLAGS'] = '--xla_cpu_multi_thread_eigen=false'
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    x, y, vx, vy = (jnp.asarray(a) for a in (job.x, job.y.astype(np.int32), job.vx, job.vy.astype(np.int32)))
    n, bs = len(x), job.bs

    def logits(params, xb):
        w1, b1, w2, b2 = params
        return jax.nn.relu(xb @ w1.T + b1) @ w2.T + b2

    def loss_func(params, xb, yb):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits(params, xb)), yb[:, None], 1).mean()

    def step(params, idx, x, y):
        loss, grads = jax.value_and_grad(loss_func)(params, x[idx], y[idx])
        return [p - job.lr * g for p, g in zip(params, grads)], loss

    @jax.jit
    def epoch(params, key, x, y):
        order = jax.random.permutation(key, n)
        params, losses = lax.scan(lambda params, idx: step(params, idx, x, y), params, order[:n // bs * bs].reshape(-1, bs))
        if n % bs: params, last = step(params, order[n // bs * bs:], x, y)
        return params, losses.mean()

    @jax.jit
    def evaluate(params, x, y):
        return loss_func(params, x, y), (logits(params, x).argmax(1) == y).mean()

    def go():
        params, key = [jnp.asarray(w) for w in job.weights], jax.random.key(job.seed)
        for _ in range(job.epochs):
            key, now = jax.random.split(key)
            params, train_loss = epoch(params, now, x, y)
            valid_loss, accuracy = (float(a) for a in evaluate(params, vx, vy))
        assert train_loss < 1 and valid_loss < 1
        return Result([np.asarray(p) for p in params], accuracy, job.epochs * -(-n // bs))
    return go


if __name__ == '__main__': run(setup, ['jax', 'jaxlib'], jit=True)

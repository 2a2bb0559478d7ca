"Keras 3 on JAX: `compile` and `fit`"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import run


def setup(job):
    from keras_torch import setup
    return setup(job, 'jax')


if __name__ == '__main__': run(setup, ['keras', 'jax'], jit=True)

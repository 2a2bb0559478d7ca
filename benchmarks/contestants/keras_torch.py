"Keras 3 on torch: `compile` and `fit`"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, run


def setup(job, backend='torch'):
    import os
    os.environ['KERAS_BACKEND'] = backend
    os.environ['XLA_FLAGS'] = '--xla_cpu_multi_thread_eigen=false'
    import keras
    from keras import layers
    if backend == 'torch': job.tensors()  # one thread
    keras.utils.set_random_seed(job.seed)
    model = keras.Sequential([keras.Input((784,)), layers.Dense(len(job.b1), activation='relu'), layers.Dense(10)])
    model.compile(keras.optimizers.SGD(job.lr), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=['accuracy'])

    def go():
        w1, b1, w2, b2 = job.weights
        model.set_weights([w1.T, b1, w2.T, b2])
        before = int(model.optimizer.iterations)
        history = model.fit(job.x, job.y, batch_size=job.bs, epochs=job.epochs, validation_data=(job.vx, job.vy),
                            validation_batch_size=job.valid_bs)
        w1, b1, w2, b2 = model.get_weights()
        return Result([w1.T, b1, w2.T, b2], history.history['val_accuracy'][-1], int(model.optimizer.iterations) - before)
    return go


if __name__ == '__main__': run(setup, ['keras', 'torch'], jit=True)

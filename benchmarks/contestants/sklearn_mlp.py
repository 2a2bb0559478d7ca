"scikit-learn's `MLPClassifier`, an epoch a `partial_fit`"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import Result, run


def setup(job):
    import warnings

    import numpy as np
    from sklearn.metrics import log_loss
    from sklearn.neural_network import MLPClassifier
    model = MLPClassifier((len(job.b1),), solver='sgd', batch_size=job.bs, learning_rate_init=job.lr, alpha=0, momentum=0,
                          nesterovs_momentum=False, random_state=job.seed)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model.partial_fit(job.x[:64], job.y[:64], classes=np.arange(10))  # it has no other way to make its weights

    def go():
        for own, given in zip(model.coefs_ + model.intercepts_, [*(job.weights[i].T for i in (0, 2)), job.weights[1], job.weights[3]]):
            own[...] = given  # in place: its optimiser holds on to these arrays
        seen = model.t_
        for _ in range(job.epochs):
            model.partial_fit(job.x, job.y)
            probs = model.predict_proba(job.vx)
            accuracy, _ = (probs.argmax(1) == job.vy).mean(), log_loss(job.vy, probs)
        w1, w2 = (w.T.copy() for w in model.coefs_)
        passes = (model.t_ - seen) // len(job.x)
        return Result([w1, model.intercepts_[0].copy(), w2, model.intercepts_[1].copy()], accuracy, passes * -(-len(job.x) // job.bs))
    return go


if __name__ == '__main__': run(setup, ['scikit-learn', 'numpy'])

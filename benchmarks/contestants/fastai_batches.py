"the same with a loader that takes a batch at a time"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import run


def setup(job):
    from fastai_learner import setup
    return setup(job, by_batch=True)


if __name__ == '__main__': run(setup, ['fastai', 'torch'])

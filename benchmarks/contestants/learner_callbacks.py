"the same with callbacks: accuracy, progress with a bar and a table, and a record of every batch"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import run


def callbacks():
    from miniai.metrics import Accuracy, MetricsCB
    from miniai.progress import ProgressCB, RecorderCB
    return [MetricsCB(Accuracy()), ProgressCB(), RecorderCB()]


def setup(job):
    from learner import setup
    return setup(job, callbacks=callbacks)


if __name__ == '__main__': run(setup, ['torch'])

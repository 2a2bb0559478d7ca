"the same with two worker processes"
import sys

sys.path.insert(0, f'{sys.path[0]}/..')
from job import run


def setup(job):
    from dataloader import setup
    return setup(job, num_workers=2)


if __name__ == '__main__': run(setup, ['torch'])

#!/usr/bin/env python3
"""Run `nbdev_test` over every notebook, then pytest over tests/, and count what ran.

    python scripts/run_tests.py                     everything
    python scripts/run_tests.py --only 00 04        the notebooks whose names begin so, solutions too; no tests
    python scripts/run_tests.py --only 00 --chapters    the same without solutions
    python scripts/run_tests.py --only 10 --slow    with the long trainings, cells flagged `#| slow`, which are left out otherwise

nbdev_test alone counts nothing, has no time-out, and is content when no notebook matches; so each notebook gets an
nbdev_test process of its own, and only one that was seen to start, to complete and to run code counts as passed.
What is skipped is named. The last line reads `whole: 12 passed, 0 failed`, where the first word says on which data:

    MINIAI_SAMPLE=1     the sample that lies in the package
    MINIAI_SAMPLE=0     the whole MNIST; it is a failure if that cannot be had
    unset               the whole if it can be had, else the sample, after a line that says why

The choice is made once. On `whole` every process is started with MINIAI_SAMPLE=0, so none can fall back unseen.
Exit status: 0 if something ran and nothing failed, 1 otherwise, 2 for wrong arguments, 130 after Ctrl-C."""
import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

root = Path(__file__).resolve().parents[1]
nbs = root / 'nbs'
quiet = {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONUNBUFFERED': '1', 'PYDEVD_DISABLE_FILE_VALIDATION': '1'}
ask = """
import sys
from miniai.data import DataUnavailable, mnist
try: mnist(sample=False)
except DataUnavailable as e:
    print(e)
    sys.exit(3)
"""


class Child:
    "A process in a group of its own, its output in a file, its time and peak memory measured"
    running: 'list[Child]' = []

    def __init__(self, args, env, timeout, show=False):
        self.log = None if show else tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace')
        self.start, self.timeout, self.timed_out, self.code = time.monotonic(), timeout, False, None
        self.proc = subprocess.Popen([str(a) for a in args], cwd=root, env=env, stdin=subprocess.DEVNULL, start_new_session=True,
                                     stdout=self.log, stderr=self.log and subprocess.STDOUT)
        Child.running.append(self)

    def done(self):
        "Whether it has ended; one that is over its time is ended here"
        if self.code is not None: return True
        pid, status, usage = os.wait4(self.proc.pid, os.WNOHANG)
        if not pid:
            if time.monotonic() - self.start < self.timeout: return False
            self.timed_out = True
            self.signal(signal.SIGKILL)
            pid, status, usage = os.wait4(self.proc.pid, 0)
        else: self.signal(signal.SIGKILL)   # what it left behind in its group
        self.seconds = time.monotonic() - self.start
        self.mb = usage.ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)
        self.code = self.proc.returncode = os.waitstatus_to_exitcode(status)
        Child.running.remove(self)
        return True

    def signal(self, sig):
        try: os.killpg(self.proc.pid, sig)
        except (ProcessLookupError, PermissionError): pass

    def wait(self):
        while not self.done(): time.sleep(0.05)
        return self.code

    def text(self):
        self.log.seek(0)
        return self.log.read()

    @classmethod
    def end_all(cls):
        for sig in signal.SIGTERM, signal.SIGKILL:
            for c in cls.running: c.signal(sig)
            stop = time.monotonic() + 3
            while time.monotonic() < stop and not all([c.done() for c in list(cls.running)]): time.sleep(0.05)


def choose_data(env):
    "`whole` or `sample`, said in a line; `env['MINIAI_SAMPLE']` is set so that every process agrees"
    asked = env.get('MINIAI_SAMPLE', '')
    if asked not in ('', '0', '1'): sys.exit(usage(f'MINIAI_SAMPLE={asked!r}: allowed are 1 (the sample), 0 (the whole) and unset'))
    if asked == '1':
        print('data: sample (MINIAI_SAMPLE=1)', flush=True)
        return 'sample'
    where = f'MINIAI_DATA={env["MINIAI_DATA"]}' if env.get('MINIAI_DATA') else 'the cache or a download'
    env['MINIAI_SAMPLE'] = '0'
    child = Child([sys.executable, '-c', ask], env, 1800)
    code, said = child.wait(), child.text().strip()
    if code == 0:
        print(f'data: whole ({where})', flush=True)
        return 'whole'
    if code != 3 or asked == '0' or env.get('MINIAI_DATA'):
        print(said)
        why = 'miniai.data failed' if code != 3 else 'MINIAI_DATA is set' if env.get('MINIAI_DATA') else 'MINIAI_SAMPLE=0 was asked for'
        print(f'run_tests: the whole MNIST cannot be had from {where}, and since {why} the sample is not taken in its place')
        print('whole: 0 passed, 1 failed')
        sys.exit(1)
    env['MINIAI_SAMPLE'] = '1'
    print(f'data: sample, for the whole MNIST cannot be had from {where}: {" ".join(said.split())}', flush=True)
    return 'sample'


def notebooks(only, chapters):
    "The notebooks that nbdev would take, those of `only` if given"
    found = [p for p in sorted(nbs.rglob('*.ipynb')) if not any(x.startswith(('.', '_')) for x in p.relative_to(nbs).parts)]
    for o in only or []:
        if not any(p.name.startswith(o) for p in found): sys.exit(usage(f'no notebook in {nbs} begins with {o!r}'))
    if chapters: found = [p for p in found if p.parent == nbs]
    return [p for p in found if not only or p.name.startswith(tuple(only))]


def usage(message):
    print(f'run_tests: {message}', file=sys.stderr)
    return 2


def cells(path, slow):
    "How many code cells nbdev_test will run, and how many it will leave out"
    from fastcore.basics import str2bool
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    flags = set(get_config().tst_flags.split()) - ({'slow'} if slow else set())
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    code = [c for c in nb.cells if c.cell_type == 'code' and c.source.strip()]
    if str2bool(getattr(nb, 'frontmatter_', {}).get('skip_exec', False)): return 0, len(code)
    def skipped(c):
        d = getattr(c, 'directives_', None) or {}
        return 'nbdev_export(' in c.source or d.get('eval:', [''])[0].lower() == 'false' or flags & d.keys()
    left_out = sum(bool(skipped(c)) for c in code)
    return len(code) - left_out, left_out


def run_notebooks(paths, env, jobs, timeout, results, slow=False):
    nbdev_test = Path(sys.executable).parent / 'nbdev_test'
    if not nbdev_test.exists(): sys.exit(usage(f'{nbdev_test} is missing: run `sh scripts/setup.sh dev`'))
    todo, running, counts = list(paths), {}, {p: cells(p, slow) for p in paths}
    width = max(len(str(p.relative_to(nbs))) for p in paths)
    while todo or running:
        while todo and len(running) < jobs:
            p = todo.pop(0)
            running[p] = Child([nbdev_test, '--path', p, '--do_print', *(['--flags', 'slow'] if slow else [])], env, timeout)
        for p, c in list(running.items()):
            if not c.done(): continue
            del running[p]
            ran, left_out = counts[p]
            text, name = c.text(), str(p.relative_to(nbs))
            started, completed = f'Starting {p}' in text, f'- Completed {p}' in text
            if c.timed_out: state, note = 'failed', f'timed out after {timeout} s'
            elif c.code < 0: state, note = 'failed', f'killed by signal {-c.code}'
            elif c.code: state, note = 'failed', ''
            elif not ran: state, note = 'skipped', 'skip_exec, or every cell left out' if left_out else 'has no code cell'
            elif not (started and completed): state, note = 'failed', 'nbdev_test says success, but did not run it'
            else: state, note = 'passed', f'{left_out} of {ran + left_out} code cells left out' if left_out else ''
            results[state].append(name)
            print(f'{state:7}  {name:{width}}  {c.seconds:6.1f} s  {c.mb:5.0f} MB  {note}'.rstrip(), flush=True)
            if state == 'failed': print('\n'.join('    ' + line for line in text.strip().splitlines()[-150:]), flush=True)
        time.sleep(0.05)


def run_pytest(env, timeout, results):
    tests = root / 'tests'
    if not list(tests.rglob('test_*.py')): return print('no tests in tests/')
    with tempfile.TemporaryDirectory() as tmp:
        xml = Path(tmp) / 'tests.xml'
        child = Child([sys.executable, '-m', 'pytest', tests, '-q', '-p', 'no:cacheprovider', '--junitxml', xml], env, timeout, show=True)
        child.wait()
        counted = sum(map(len, results.values()))
        bad = len(results['failed'])
        if xml.exists():
            for case in ET.parse(xml).iter('testcase'):
                name = f'{case.get("classname")}.{case.get("name")}'
                kinds = {e.tag for e in case}
                state = 'failed' if kinds & {'failure', 'error'} else 'skipped' if 'skipped' in kinds else 'passed'
                results[state].append(name)
        if (child.code and len(results['failed']) == bad) or sum(map(len, results.values())) == counted:
            how = f'timed out after {timeout} s' if child.timed_out else f'ended with exit status {child.code}'
            results['failed'].append(f'pytest {how} and reported {"no failure" if xml.exists() else "nothing"}')
            print(results['failed'][-1])
    print(f'tests: {child.seconds:.1f} s, {child.mb:.0f} MB', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', metavar='NN', help='only the notebooks whose names begin so, and no tests')
    parser.add_argument('--chapters', action='store_true', help='no solutions, no tests')
    parser.add_argument('--slow', action='store_true', help='cells flagged `#| slow` too; some take minutes')
    parser.add_argument('--jobs', type=int, default=min(2, os.cpu_count() or 1), help='notebooks at a time (%(default)s)')
    parser.add_argument('--timeout', type=float, default=600, metavar='S', help='seconds for each notebook (%(default)g)')
    args = parser.parse_args()
    os.chdir(root)
    paths = notebooks(args.only, args.chapters)
    env = {**os.environ, **quiet}
    data, results, start = choose_data(env), {'passed': [], 'failed': [], 'skipped': []}, time.monotonic()
    if paths: run_notebooks(paths, env, args.jobs, args.timeout, results, args.slow)
    else: print(f'no notebooks in {nbs}')
    if not (args.only or args.chapters): run_pytest(env, 3 * args.timeout, results)
    print(f'{time.monotonic() - start:.0f} s in all')
    for state in 'skipped', 'failed':
        if results[state]: print(f'{state}: ' + ', '.join(results[state]))
    n, bad, left_out = (len(results[s]) for s in ('passed', 'failed', 'skipped'))
    if not n and not bad: print('nothing ran, and that counts as a failure')
    print(f'{data}: {n} passed, {bad} failed' + (f', {left_out} skipped' if left_out else ''), flush=True)
    return 0 if n and not bad else 1


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a job in the background ignores Ctrl-C, and its children would, too
    try: code = main()
    except KeyboardInterrupt:
        print('interrupted', flush=True)
        code = 130
    finally: Child.end_all()
    sys.exit(code)

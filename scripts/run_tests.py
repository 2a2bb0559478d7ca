#!/usr/bin/env python3
"""Run pytest over every file of tests and `nbdev_test` over every notebook, two at a time, and count what ran.

    python scripts/run_tests.py                     everything but what --browser runs
    python scripts/run_tests.py --only 00 04        the notebooks whose names begin so, solutions too; no tests
    python scripts/run_tests.py --only 10 --slow    with the long trainings, cells flagged `#| slow`, which are left out otherwise
    python scripts/run_tests.py --browser           only tests/browser: the site, and JupyterLab, in a headless Chromium

nbdev_test alone counts nothing, has no time-out, and succeeds when no notebook matches; so each notebook gets an
nbdev_test process of its own, and only one that was seen to start, to complete and to run code counts as passed.
Each file of tests is a process of its own, too; the largest files start first.
What is skipped is named. The last line reads `full: 12 passed, 0 failed`, where the first word names the data:

    MINIAI_SAMPLE=1     the sample in the package
    MINIAI_SAMPLE=0     the full MNIST; it is a failure if that is not available
    unset               the full MNIST if it is available, else the sample, after a line that gives the reason

The choice is made once. On `full` every process is started with MINIAI_SAMPLE=0, so none can fall back unseen.
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
load_full = """
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

    def __init__(self, args, env, timeout):
        self.log = tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace')
        self.start, self.timeout, self.timed_out, self.code = time.monotonic(), timeout, False, None
        self.proc = subprocess.Popen([str(a) for a in args], cwd=root, env=env, stdin=subprocess.DEVNULL, start_new_session=True,
                                     stdout=self.log, stderr=subprocess.STDOUT)
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
    "`full` or `sample`, after a line about the choice; `env['MINIAI_SAMPLE']` is set so that every process agrees"
    given = env.get('MINIAI_SAMPLE', '')
    if given not in ('', '0', '1'): sys.exit(usage(f'MINIAI_SAMPLE={given!r}: allowed are 1 (the sample), 0 (the full MNIST) and unset'))
    if given == '1':
        print('data: sample (MINIAI_SAMPLE=1)', flush=True)
        return 'sample'
    where = f'MINIAI_DATA={env["MINIAI_DATA"]}' if env.get('MINIAI_DATA') else 'the cache or a download'
    env['MINIAI_SAMPLE'] = '0'
    child = Child([sys.executable, '-c', load_full], env, 1800)
    code, message = child.wait(), child.text().strip()
    if code == 0:
        print(f'data: full ({where})', flush=True)
        return 'full'
    if code != 3 or given == '0' or env.get('MINIAI_DATA'):
        print(message)
        why = 'miniai.data failed' if code != 3 else 'MINIAI_DATA is set' if env.get('MINIAI_DATA') else 'MINIAI_SAMPLE=0 is set'
        print(f'run_tests: the full MNIST is not available from {where}, and since {why} the sample does not replace it')
        print('full: 0 passed, 1 failed')
        sys.exit(1)
    env['MINIAI_SAMPLE'] = '1'
    print(f'data: sample, since the full MNIST is not available from {where}: {" ".join(message.split())}', flush=True)
    return 'sample'


def notebooks(only):
    "The notebooks that nbdev would take, those of `only` if given: the beginning of a name, or a path in `nbs`"
    wanted = lambda p, o: p.name.startswith(o) or p == nbs / o
    found = [p for p in sorted(nbs.rglob('*.ipynb')) if not any(x.startswith(('.', '_')) for x in p.relative_to(nbs).parts)]
    for o in only or []:
        if not any(wanted(p, o) for p in found): sys.exit(usage(f'no notebook in {nbs} begins with {o!r}'))
    return [p for p in found if not only or any(wanted(p, o) for o in only)]


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


class Notebook:
    "One notebook, run by nbdev_test"
    def __init__(self, path, timeout, slow):
        self.path, self.name, self.timeout = path, str(path.relative_to(nbs)), timeout
        self.counts = cells(path, slow)
        self.args = [Path(sys.executable).parent / 'nbdev_test', '--path', path, '--do_print', *(['--flags', 'slow'] if slow else [])]

    def outcome(self, child, results):
        "`(state, note, output to show)`; adds to `results`"
        (ran, left_out), text = self.counts, child.text()
        completed = f'Starting {self.path}' in text and f'- Completed {self.path}' in text
        if child.code: state, note = 'failed', ended(child)
        elif not ran: state, note = 'skipped', 'skip_exec, or every cell left out' if left_out else 'has no code cell'
        elif not completed: state, note = 'failed', 'nbdev_test reports success, but did not run it'
        else: state, note = 'passed', f'{left_out} of {ran + left_out} code cells left out' if left_out else ''
        results[state].append(self.name)
        return state, note, text


class Tests:
    "One file of tests, run by pytest"
    def __init__(self, path, timeout, folder):
        self.name, self.timeout, self.xml = str(path.relative_to(root)), timeout, Path(folder) / f'{path.stem}.xml'
        self.args = [sys.executable, '-m', 'pytest', path, '-q', '-p', 'no:cacheprovider', '--junitxml', self.xml]

    def outcome(self, child, results):
        "`(state, note, output to show)`; adds every test to `results`"
        seen = {'passed': [], 'failed': [], 'skipped': []}
        for case in ET.parse(self.xml).iter('testcase') if self.xml.exists() else ():
            kinds = {e.tag for e in case}
            state = 'failed' if kinds & {'failure', 'error'} else 'skipped' if 'skipped' in kinds else 'passed'
            seen[state].append(f'{case.get("classname")}.{case.get("name")}')
        note = ', '.join(f'{len(names)} {state}' for state, names in seen.items() if names)
        if (child.code and not seen['failed']) or not note:
            seen['failed'].append(f'{self.name} {ended(child) or "ended"} and reported {"no failure" if note else "nothing"}')
            note = seen['failed'][0]
        for state, names in seen.items(): results[state] += names
        return 'failed' if seen['failed'] else 'passed', note, child.text()


def ended(child):
    if child.timed_out: return f'timed out after {child.timeout:g} s'
    return f'killed by signal {-child.code}' if child.code < 0 else f'ended with exit status {child.code}' if child.code else ''


def run_all(todo, env, jobs, results):
    "Run files of tests and notebooks, `jobs` at a time, in the order given"
    todo, running, width = list(todo), {}, max(len(job.name) for job in todo)
    while todo or running:
        while todo and len(running) < jobs:
            job = todo.pop(0)
            running[job] = Child(job.args, env, job.timeout)
        for job, c in list(running.items()):
            if not c.done(): continue
            del running[job]
            state, note, text = job.outcome(c, results)
            print(f'{state:7}  {job.name:{width}}  {c.seconds:6.1f} s  {c.mb:5.0f} MB  {note}'.rstrip(), flush=True)
            if state == 'failed': print('\n'.join('    ' + line for line in text.strip().splitlines()[-300:]), flush=True)
        time.sleep(0.05)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', metavar='NN', help='only the notebooks whose names begin so, and no tests')
    parser.add_argument('--slow', action='store_true', help='cells flagged `#| slow` too; some take minutes')
    parser.add_argument('--browser', action='store_true', help='the tests that need a Chromium, and no notebooks')
    parser.add_argument('--jobs', type=int, default=min(2, os.cpu_count() or 1), help='processes at a time (%(default)s)')
    parser.add_argument('--timeout', type=float, default=900, metavar='S', help='seconds for each of them (%(default)g)')
    args = parser.parse_args()
    os.chdir(root)
    paths = [] if args.browser else notebooks(args.only)
    env = {**os.environ, **quiet}
    nbdev_test = Path(sys.executable).parent / 'nbdev_test'
    if not nbdev_test.exists(): sys.exit(usage(f'{nbdev_test} is missing: run `sh scripts/setup.sh dev`'))
    data, results, start = choose_data(env), {'passed': [], 'failed': [], 'skipped': []}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        where = root / 'tests' / ('browser' if args.browser else '')
        tests = [] if args.only else sorted(where.glob('test_*.py'), key=lambda p: -p.stat().st_size)
        print(f'{len(tests)} files of tests and {len(paths)} notebooks, {args.jobs} at a time', flush=True)
        todo = [Tests(p, args.timeout, folder) for p in tests] + [Notebook(p, args.timeout, args.slow) for p in paths]
        run_all(todo, env, args.jobs, results)
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

"""Time the contestants side by side: `python benchmarks/run.py`.

Makes `benchmarks/.venv`, installs miniai from this checkout and the contestants into it, and runs each contestant in a process of its own,
all of them once a round, in a new random order each round. Writes `results/table.md`, `results/results.json` and
`results/comparison.png` after every round; Ctrl-C keeps what was measured.
"""
import argparse
import ast
import datetime
import hashlib
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import venv
from collections import defaultdict
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
ROOT, VENV, JOB, RESULTS = HERE.parent, HERE / '.venv', HERE / '.job', HERE / 'results'
OURS = 'ours'
TARGETS = [('ours', 'loop_plain', 1.7), ('fit_torch_nn', 'loop_plain', 1.05)]


def requirements():
    "The contestants' packages, pinned"
    lines = (line.split('#')[0].strip() for line in (HERE / 'requirements.txt').read_text().splitlines())
    return [line for line in lines if line]


def constraints():
    "What miniai needs, as the repository pins it (not its development tools: fastai needs another fastcore), and the contestants"
    settings = re.search(r'^requirements *= *(.*)$', (ROOT / 'settings.ini').read_text(), re.M)[1]
    needs = {re.split('[<>=]', need)[0] for need in settings.split()}
    pins = [line.strip() for line in (ROOT / 'constraints.txt').read_text().splitlines() if line.split('==')[0] in needs]
    return '\n'.join([*pins, *requirements()]) + '\n'


def install():
    "Make the environment; returns, for each package that could not be installed, pip's reason"
    text = constraints()
    stamp, done = hashlib.sha256((text + sys.version).encode()).hexdigest(), VENV / 'installed.json'
    if done.exists() and (state := json.loads(done.read_text()))['stamp'] == stamp: return state['failed']
    print(f'setting up {VENV.relative_to(ROOT)}', flush=True)
    venv.create(VENV, with_pip=True, clear=True)
    pins = VENV / 'constraints.txt'
    pins.write_text(text)
    python, failed = VENV / 'bin' / 'python', {}

    def pip(*args):
        print('  pip install', *args, flush=True)
        p = subprocess.run([python, '-m', 'pip', 'install', '-q', '-c', pins, *args], capture_output=True, text=True)
        errors = [line for line in p.stderr.splitlines() if line.startswith('ERROR')] or p.stderr.splitlines()[-1:]
        return errors[-1] if p.returncode else None

    if reason := pip(next(line for line in text.splitlines() if line.startswith('torch=='))) or pip('-e', str(ROOT)):
        raise SystemExit(f'miniai itself could not be installed: {reason}')
    for line in requirements():
        if reason := pip(line): failed[line.split('==')[0]] = reason
    if 'torchvision' not in failed and subprocess.run([python, '-c', 'import torchvision'], capture_output=True).returncode:
        subprocess.run([python, '-m', 'pip', 'uninstall', '-q', '-y', 'torchvision'])
        failed['torchvision'] = 'was built for another build of torch, and taken out again; no contestant needs it'
    done.write_text(json.dumps(dict(stamp=stamp, failed=failed)))
    return failed


def contestants():
    "Name to (what it is, the packages it names)"
    found = {}
    for path in sorted((HERE / 'contestants').glob('*.py')):
        text = path.read_text()
        packages = re.search(r'run\(setup, (\[.*?\])', text)
        found[path.stem] = ast.get_docstring(ast.parse(text)), ast.literal_eval(packages[1])
    return found


def drain(master, log):
    "Copy what a contestant shows on its terminal to a file"
    with open(log, 'wb') as f:
        while True:
            try: data = os.read(master, 65536)
            except OSError: return
            if not data: return
            f.write(data)


def measure(name, number, limit):
    "Run one contestant; returns its row, with `error` in it if it failed"
    import pty
    import termios
    logs = JOB / 'logs'
    logs.mkdir(exist_ok=True)
    log = logs / f'{name}-{number}.log'
    master, slave = pty.openpty()  # a terminal, so that each tool shows the progress that a user sees
    termios.tcsetwinsize(slave, (40, 120))
    env = {**os.environ, 'BENCH_ROUND': str(number), 'PYTHONUNBUFFERED': '1', 'TERM': 'xterm'}
    p = subprocess.Popen([sys.executable, str(HERE / 'contestants' / f'{name}.py')], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=slave, env=env, start_new_session=True, text=True)
    os.close(slave)
    reader = threading.Thread(target=drain, args=(master, log), daemon=True)
    reader.start()
    try: out, _ = p.communicate(timeout=limit)
    except subprocess.TimeoutExpired: out = None
    finally:
        try: os.killpg(p.pid, signal.SIGKILL)  # workers too
        except ProcessLookupError: pass
        p.wait()
        reader.join(5)
        os.close(master)
    if out is None: return dict(name=name, error=f'took longer than {limit} s')
    if p.returncode == 0 and out.strip(): return json.loads(out.strip().splitlines()[-1])
    shown = [line.strip() for line in log.read_text(errors='replace').splitlines() if line.strip()]
    return dict(name=name, error=(shown or [f'exit status {p.returncode}'])[-1][:300])


def machine():
    "Processor, cores, system, Python"
    model = platform.processor()
    try: model = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())[1]
    except (OSError, TypeError): pass
    return f'{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}'


def commit():
    "What was measured"
    try:
        git = ['git', '-C', str(ROOT)]
        head = subprocess.check_output([*git, 'log', '-1', '--format=%h'], text=True).strip()
        return head + (' with changes' if subprocess.check_output([*git, 'status', '--porcelain', 'miniai'], text=True).strip() else '')
    except (OSError, subprocess.CalledProcessError): return 'unknown'


def ratio(a, b, key):
    "Median over the rounds of a's time by b's in the same round"
    other = {r['round']: r[key] for r in b if key in r}
    both = [r[key] / other[r['round']] for r in a if key in r and r['round'] in other]
    return median(both) if both else None


def shown(line, busy):
    "Seconds of the first and of a later run; of processor time if the machine was busy with other work"
    first = line['first_cpu' if busy else 'first']['median']
    return first, line['later_cpu' if busy else 'later']['median'] if 'later' in line else first


def summarise(rows, about, busy=False):
    "One dict a contestant, the fastest first"
    good, bad = defaultdict(list), {}
    for r in rows:
        if 'error' in r: bad[r['name']] = r['error']
        else: good[r['name']].append(r)
    lines = []
    for name, rs in good.items():
        line = dict(name=name, what=about[name][0], rounds=len(rs), versions=rs[-1]['versions'], problems=[])
        for key in 'first', 'later', 'first_cpu', 'later_cpu':
            if values := [r[key] for r in rs if key in r]: line[key] = dict(median=median(values), min=min(values), max=max(values))
            line[f'{key}_ratio'] = ratio(rs, good[OURS], key) if OURS in good else None
        accuracies = [a for r in rs for a in r['accuracies']]
        line['accuracy'] = dict(median=median(accuracies), min=min(accuracies), max=max(accuracies), count=len(accuracies))
        line['loss'] = median([loss for r in rs for loss in r['losses']])
        line['peak_mb'], line['setup_mb'] = median(r['peak_mb'] for r in rs), median(r['setup_mb'] for r in rs)
        line['updates'], due = rs[-1]['updates'], rs[-1]['updates_due']
        if line['updates'] != due: line['problems'].append(f'{line["updates"]} updates instead of {due}')
        if name in bad: line['problems'].append(f'failed in some rounds: {bad[name]}')
        lines.append(line)
    ours = next((line for line in lines if line['name'] == OURS), None)
    for line in lines:
        enough = ours and min(line['accuracy']['count'], ours['accuracy']['count']) >= 6  # with fewer the noise of the last step decides
        if enough and not abs(line['accuracy']['median'] - ours['accuracy']['median']) <= 0.01 or line['accuracy']['max'] < 0.5:
            line['problems'].append(f'accuracy {line["accuracy"]["median"]:.4f}, more than a point from ours: not the same job')
    lines.sort(key=lambda line: shown(line, busy)[1])
    failed = {name: why for name, why in bad.items() if name not in good}
    return lines, failed


def table(lines, failed, missing, info, good):
    "The results as Markdown"
    def seconds(line, key): return f'{line[key]["median"]:.2f}' if key in line else '–'
    def times(x): return '–' if x is None else f'{x:.2f}'
    out = ['# Side by side', '',
           f'784-50-10 with ReLU and cross entropy, SGD at 0.5, batches of 64, {info["epochs"]} epochs of '
           f'{info["examples"]:,} shuffled examples, a validation pass of 10,000 after each; float32, one thread.',
           f'{info["rounds"]} rounds in random order, each contestant a process of its own; medians. {info["machine"]}; '
           f'miniai at {info["commit"]}; {info["date"]}; load average {info["load_before"]} before, {info["load_after"]} after.', '']
    if info['busy']:
        out += ['**The machine was busy with other work**: compare processor times (CPU), by which the table is sorted; the clock says '
                'little.', '']
    out += ['*First*: the first run in the process, with everything that a tool compiles or loads then; *later*: the median of up to four '
            'more runs there. *CPU*: processor time of a later run, all threads and workers. '
            '*× ours*: median over the rounds of the ratio in one round.', '',
            '| contestant | later, s | min to max | first, s | CPU, s | × ours, later | first | CPU | accuracy | lowest to highest '
            '| peak MB | versions |',
            '|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|']
    for line in lines:
        turn = 'later' if 'later' in line else 'first'
        a, t = line['accuracy'], line[turn]
        mark = ' ⚠' if line['problems'] else ''
        out.append(f'| **{line["name"]}**{mark}: {line["what"]} | {seconds(line, "later")} | {t["min"]:.2f} to {t["max"]:.2f} '
                   f'| {seconds(line, "first")} | {seconds(line, f"{turn}_cpu")} '
                   f'| {times(line["later_ratio"])} | {times(line["first_ratio"])} '
                   f'| {times(line[f"{turn}_cpu_ratio"])} | {a["median"]:.4f} | {a["min"]:.3f} to {a["max"]:.3f} | {line["peak_mb"]:.0f} '
                   f'| {", ".join(f"{k} {v}" for k, v in line["versions"].items())} |')
    out += ['']
    if problems := [f'- **{line["name"]}**: {p}' for line in lines for p in line['problems']]: out += ['⚠ To look at:', '', *problems, '']
    if failed or missing:
        out += ['Not in the table:', '', *[f'- **{name}** failed: `{why}`' for name, why in failed.items()],
                *[f'- package **{name}**: {why}' for name, why in missing.items()], '']
    met = []
    for a, b, bar in TARGETS:
        if not (good[a] and good[b]): continue
        wall, cpu = (ratio(good[a], good[b], key) for key in ('later', 'later_cpu'))
        met.append(f'| {a} / {b} | {bar:.2f} | {times(wall)} | {times(cpu)} | {"yes" if wall is not None and wall <= bar else "no"} |')
    if met: out += ['| target | at most | clock | CPU | met on the clock |', '|---|--:|--:|--:|---|', *met, '']
    return '\n'.join(out)


def plot(lines, info, path):
    "A dot for a later run and one for the first, the fastest contestant on top"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    with plt.rc_context({'font.size': 9}):
        fig, ax = plt.subplots(figsize=(8, 0.32 * len(lines) + 1.4), layout='constrained', dpi=100)
        for i, line in enumerate(lines):
            first, later = shown(line, info['busy'])
            own = line['name'] in (OURS, 'fit_torch_nn')
            color = '#d95f02' if own else '#4c78a8'
            ax.plot([later, first], [i, i], color='#bbbbbb', lw=2, zorder=1)
            ax.plot(first, i, 'o', color='#bbbbbb', zorder=2)
            ax.plot(later, i, 'o', color=color, zorder=3)
            cpu = '_cpu' if info['busy'] else ''
            r = line[f'later{cpu}_ratio'] or line[f'first{cpu}_ratio']
            ax.text(max(first, later) * 1.12, i, f'{later:.2f} s' + (f'   {r:.2f} × ours' if r else ''), va='center')
        ax.set_yticks(range(len(lines)), [line['name'] for line in lines])
        ax.invert_yaxis()
        ax.set_xscale('log')
        ax.set_xlim(right=ax.get_xlim()[1] * 4)
        ax.set_xlabel(f'{"processor " if info["busy"] else ""}seconds for the job, logarithmic (grey: the first run in a process)')
        ax.set_title(f'epochs: {info["epochs"]}, of {info["examples"]:,} examples each; one thread; rounds: {info["rounds"]}', fontsize=9)
        ax.grid(axis='x', color='#eeeeee')
        ax.set_axisbelow(True)
        for side in 'top', 'right': ax.spines[side].set_visible(False)
        fig.savefig(path)
        plt.close(fig)


def write(rows, about, missing, info):
    "All three results, from what was measured so far"
    rows = [r for r in rows if r]
    info.update(load_after=round(os.getloadavg()[0], 1), rounds=1 + max(r['round'] for r in rows))
    # on a quiet machine a contestant of one thread gets a processor for as long as it runs
    share = [r['later_cpu'] / r['later'] for r in rows if 'later' in r]
    info['busy'] = bool(share) and median(share) < 0.9
    lines, failed = summarise(rows, about, info['busy'])
    good = defaultdict(list)
    for r in rows:
        if 'error' not in r: good[r['name']].append(r)
    RESULTS.mkdir(exist_ok=True)
    everything = dict(info=info, missing=missing, failed=failed, summary=lines, runs=rows)
    (RESULTS / 'results.json').write_text(json.dumps(everything, indent=1) + '\n')
    (RESULTS / 'table.md').write_text(table(lines, failed, missing, info, good))
    if lines: plot(lines, info, RESULTS / 'comparison.png')
    return lines, failed


def main():
    about = contestants()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5, help='processes for each contestant (default: 5)')
    parser.add_argument('--only', nargs='+', choices=about, metavar='NAME', help=f'some of: {", ".join(about)}')
    parser.add_argument('--quick', action='store_true',
                        help='one round of one epoch of 10,000 examples, to see that everything runs; results/ stays as it is')
    parser.add_argument('--limit', type=float, default=600, help='seconds a process may take (default: 600)')
    args = parser.parse_args()
    if args.rounds < 1: parser.error('--rounds must be 1 or more')
    missing = install() if Path(sys.prefix) != VENV else json.loads((VENV / 'installed.json').read_text())['failed']
    if Path(sys.prefix) != VENV: os.execv(VENV / 'bin' / 'python', [str(VENV / 'bin' / 'python'), __file__, *sys.argv[1:]])

    from tqdm import tqdm
    global RESULTS
    if args.quick: args.rounds, RESULTS = 1, JOB / 'quick'
    smaller = ['--examples', '10000', '--epochs', '1'] if args.quick else []
    subprocess.run([sys.executable, str(HERE / 'job.py'), *smaller], check=True)
    names, rows = list(args.only or about), []
    info = dict(machine=machine(), commit=commit(), date=datetime.date.today().isoformat(), load_before=round(os.getloadavg()[0], 1),
                epochs=1 if args.quick else 3, examples=10_000 if args.quick else 50_000)
    draw = random.Random(0)
    with tqdm(total=args.rounds * len(names)) as bar:
        try:
            for number in range(args.rounds):
                for name in draw.sample(names, len(names)):
                    bar.set_description(f'round {number + 1}, {name}')
                    rows.append({**measure(name, number, args.limit), 'round': number})
                    bar.update()
                write(rows, about, missing, info)
        except KeyboardInterrupt: bar.write('stopped; what was measured is kept')
    if not rows: return
    lines, failed = write(rows, about, missing, info)
    print((RESULTS / 'table.md').read_text())
    print(f'written: {RESULTS}')
    if any(line['problems'] for line in lines): raise SystemExit(1)  # a fast wrong run is a failure


if __name__ == '__main__': main()

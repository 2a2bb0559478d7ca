#!/usr/bin/env python3
"""Break exported lines one at a time, and check that the chapter or its tests notice.

    python scripts/break_lines.py                       sixteen places in every chapter that exports something
    python scripts/break_lines.py 00 03 --per-chapter 0 every place in two chapters
    python scripts/break_lines.py 02 --list             only name the places
    python scripts/break_lines.py 02 --only 5 9         only these two of them

A break is one small change in one `#| export` cell: a sign, a factor, a constant, a comparison, a condition, a dropped term,
statement or guard, an argument. The choice is spread over functions and kinds, takes at most two places per line, and is the same for
the same seed and source. Each break is written into a copy of the checkout: into the notebook's cell and into the module made from it.
Two checks can catch it: the notebook, run cell by cell, and the module's test files, run by `pytest -x`. The check that is faster
on unbroken code runs first, the other one only if the first noticed nothing. Both run on the sample, unless MINIAI_SAMPLE is set.
A break is

    caught      when a check fails, its process dies, or it takes longer than the time-out (six unbroken runs, at least 60 s)
    survived    when every check passes

A check that fails on unbroken code is not used. scripts/break_lines_survivors.txt gives the reasons why certain breaks may survive.
Exit status: 0 if at least 95% are caught, every survivor has its reason, and no check fails on unbroken code; 1 otherwise; 2 for wrong
arguments; 130 after Ctrl-C."""
import argparse
import ast
import configparser
import json
import os
import random
import re
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

SHARE = 95          # per cent that must be caught
PER_LINE = 2        # places taken on one source line, at most
MEMORY = 8 * 2**30  # bytes that one notebook run may hold
TESTS = {'callbacks': ['callbacks', 'metrics']}  # module -> its tests/test_*.py; for any other module MODULE it is test_MODULE.py
RAN = 77            # exit status of a notebook that ran to its end: 0 could also come from a cell that ends the process

# ---- where a change is worth making

SKIPPED_FUNCTIONS = {'__repr__', '__str__', 'extra_repr'}
# keywords and parameters that change how a thing looks or how long it waits, but no result
APPEARANCE = set('''alpha aspect bins c cmap color colour colors constrained_layout desc disable dpi figsize fontsize fraction height label
    labels layout leave level linestyle linewidth ls lw marker markersize ms ncols nrows rotation seed size stacklevel title titles timeout
    deadline total unit unit_scale vmax vmin width xlabel ylabel zorder'''.split())
MESSAGES = {'print', 'warn', 'warn_explicit'}  # their arguments are messages
SWAPS = dict(max='min', min='max', amax='amin', amin='amax', argmax='argmin', argmin='argmax', any='all', all='any', sum='mean', mean='sum',
             exp='log', log='exp', zeros='ones', ones='zeros', zeros_like='ones_like', ones_like='zeros_like')
BARE = set('abs clone contiguous copy detach double exp log mean requires_grad_ sqrt square sum'.split())  # `x.clone()` -> `x`
SYMMETRIC = set('max min isinstance issubclass hasattr getattr setattr allclose equal maximum minimum add mul'.split())
REDUCTIONS = set('''all amax amin any argmax argmin argsort cat concatenate cumsum flatten gather index_select log_softmax logsumexp max
    mean min norm prod select size softmax sort squeeze stack std sum transpose unbind unsqueeze var'''.split())
COMPARE = {ast.Gt: ('>', '>='), ast.GtE: ('>=', '>'), ast.Lt: ('<', '<='), ast.LtE: ('<=', '<'), ast.Eq: ('==', '!='),
           ast.NotEq: ('!=', '=='), ast.Is: (r'is(?!\s+not\b)', 'is not'), ast.IsNot: (r'is\s+not', 'is'), ast.In: ('in', 'not in'),
           ast.NotIn: (r'not\s+in', 'in')}
BINARY = {ast.Add: ('sign', r'\+', '-'), ast.Sub: ('sign', '-', '+'), ast.Mult: ('factor', r'\*', '/'), ast.Div: ('factor', '/', '*'),
          ast.FloorDiv: ('factor', '//', '*'), ast.Mod: ('factor', '%', '*'), ast.Pow: ('factor', r'\*\*', '*')}
ATOMS = ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant, ast.List, ast.Tuple, ast.Dict
KINDS = 'sign factor comparison statement constant condition guard boolean term index keyword argument function call return context'.split()


def is_text(node):
    "Does this expression look like a string, a list or a path, for which `+`, `*` and `/` mean no arithmetic?"
    if isinstance(node, ast.Constant): return isinstance(node.value, (str, bytes))
    if isinstance(node, ast.BinOp): return is_text(node.left) or is_text(node.right)
    return isinstance(node, (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp, ast.Dict))


class Finder(ast.NodeVisitor):
    "Visits the code of a cell and collects changes: kind, function, start and end (in bytes of the code), new text"
    def __init__(self, code):
        self.raw, self.found, self.scope = code.encode(), [], []
        self.starts = [0]
        for line in self.raw.splitlines(keepends=True): self.starts.append(self.starts[-1] + len(line))
        self.visit(ast.parse(code))

    def start(self, node): return self.starts[node.lineno - 1] + node.col_offset
    def end(self, node): return self.starts[node.end_lineno - 1] + node.end_col_offset
    def text(self, node): return self.raw[self.start(node):self.end(node)].decode()
    def kept(self, node): return self.text(node) if isinstance(node, ATOMS) else f'({self.text(node)})'

    def add(self, kind, start, end, new): self.found.append((kind, '.'.join(self.scope) or '(top level)', start, end, new))

    def change(self, kind, node, new): self.add(kind, self.start(node), self.end(node), new)

    def between(self, kind, left, right, pattern, new):
        "Change the operator that stands between two nodes; nothing if something else, like a comment, stands there too"
        start, gap = self.end(left), self.raw[self.end(left):self.start(right)].decode()
        if m := re.match(rf'([\s)\\]*)({pattern})(?=[\s(\\]*$)', gap):
            at = start + len(m[1].encode())
            self.add(kind, at, at + len(m[2].encode()), new)

    def negate(self, test):
        if not isinstance(test, ast.Constant): self.change('condition', test, f'not ({self.text(test)})')
        self.visit(test)

    # -- statements

    def visit_FunctionDef(self, node):
        if node.name in SKIPPED_FUNCTIONS: return
        self.scope.append(node.name)
        self.defaults(node.args)
        for s in node.body: self.visit(s)
        self.scope.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node):
        self.defaults(node.args)
        self.visit(node.body)

    def defaults(self, args):
        "Default values, but not annotations"
        pos = [*args.posonlyargs, *args.args]
        for arg, value in [*zip(pos[len(pos) - len(args.defaults):], args.defaults), *zip(args.kwonlyargs, args.kw_defaults)]:
            if value is not None and arg.arg not in APPEARANCE: self.value(value, 'constant')

    def visit_ClassDef(self, node):
        self.scope.append(node.name)
        for s in node.body: self.visit(s)
        self.scope.pop()

    def visit_Expr(self, node):
        if not isinstance(node.value, ast.Call): return  # a docstring, a yield
        if self.called(node.value) != 'print': self.change('statement', node, 'pass')
        self.visit(node.value)

    def visit_Assign(self, node):
        if all(isinstance(t, (ast.Attribute, ast.Subscript)) for t in node.targets): self.change('statement', node, 'pass')
        self.generic_visit(node)

    def visit_AnnAssign(self, node):
        if node.value: self.visit(node.value)

    def visit_AugAssign(self, node):
        self.change('statement', node, 'pass')
        if type(node.op) in BINARY and not is_text(node.value):
            kind, pattern, new = BINARY[type(node.op)]
            self.between(kind, node.target, node.value, pattern + '=', new + '=')
        self.generic_visit(node)

    def visit_Delete(self, node): self.change('statement', node, 'pass')

    def visit_If(self, node):
        if not node.orelse and len(node.body) == 1 and isinstance(node.body[0], (ast.Raise, ast.Return, ast.Continue, ast.Break)):
            if self.raw[self.start(node):].startswith(b'if'): self.change('guard', node, 'pass')
        self.negate(node.test)
        for s in node.body + node.orelse: self.visit(s)

    def visit_While(self, node):
        self.negate(node.test)
        for s in node.body + node.orelse: self.visit(s)

    def visit_With(self, node):
        last = node.items[-1].context_expr
        if not any(i.optional_vars for i in node.items) and re.match(rb'\s*:', self.raw[self.end(last):]):
            self.add('context', self.start(node), self.end(last), 'if True')
        self.generic_visit(node)

    def visit_Return(self, node):
        if node.value is None: return
        if not isinstance(node.value, ast.Constant): self.change('return', node.value, 'None')
        elif isinstance(node.value.value, bool): self.change('return', node.value, repr(not node.value.value))
        self.visit(node.value)

    def visit_Assert(self, node): self.negate(node.test)

    # -- expressions

    def visit_BinOp(self, node, top=True):
        if is_text(node): return
        if type(node.op) in BINARY: self.between(BINARY[type(node.op)][0], node.left, node.right, *BINARY[type(node.op)][1:])
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.MatMult)):
            self.change('term', node, self.kept(node.left))
            if isinstance(node.op, (ast.Add, ast.Mult)): self.change('term', node, self.kept(node.right))
            if top: self.change('factor', node, f'(2*({self.text(node)}))')
        for side in node.left, node.right:
            if isinstance(side, ast.BinOp): self.visit_BinOp(side, top=False)
            else: self.visit(side)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.Not): self.change('boolean', node, self.kept(node.operand))
        elif isinstance(node.op, ast.USub): self.change('sign', node, self.kept(node.operand))
        self.visit(node.operand)

    def visit_BoolOp(self, node):
        operator, other = ('and', 'or') if isinstance(node.op, ast.And) else ('or', 'and')
        for i, (left, right) in enumerate(zip(node.values, node.values[1:])):
            self.between('boolean', left, right, operator, other)
            if i == 0: self.add('term', self.start(left), self.end(node), self.raw[self.start(right):self.end(node)].decode())
            self.add('term', self.start(node), self.end(right), self.raw[self.start(node):self.end(left)].decode())
        self.generic_visit(node)

    def visit_Compare(self, node):
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators):
            self.between('comparison', left, right, *COMPARE[type(op)])
        self.generic_visit(node)

    def visit_IfExp(self, node):
        self.negate(node.test)
        self.visit(node.body)
        self.visit(node.orelse)

    def visit_comprehension(self, node):
        self.visit(node.iter)
        for c in node.ifs: self.negate(c)

    def called(self, node): return getattr(node.func, 'attr', getattr(node.func, 'id', ''))

    def visit_Call(self, node):
        name, args = self.called(node), node.args
        if name in MESSAGES: return
        self.visit(node.func)
        if name in SWAPS:
            end = self.end(node.func)
            self.add('function', end - len(name), end, SWAPS[name])
        if isinstance(node.func, ast.Attribute) and name in BARE and not args and not node.keywords:
            self.change('call', node, self.text(node.func.value))
        starred = any(isinstance(a, ast.Starred) for a in args)
        if len(args) > 1 and not starred and name not in SYMMETRIC and ast.dump(args[0]) != ast.dump(args[1]):
            a, b = args[:2]
            gap = self.raw[self.end(a):self.start(b)].decode()
            if re.fullmatch(r'\s*,\s*', gap): self.add('argument', self.start(a), self.end(b), self.text(b) + gap + self.text(a))
        for a in args: self.value(a, 'index' if name in REDUCTIONS and isinstance(node.func, ast.Attribute) else 'constant')
        before = args[-1] if args else None
        for k in node.keywords:
            if k.arg is not None and k.arg not in APPEARANCE:
                self.value(k.value, 'index' if k.arg in ('dim', 'axis') else 'constant')
                if before is None: self.change('keyword', k, '')
                elif re.fullmatch(rb'\s*,\s*', self.raw[self.end(before):self.start(k)]):
                    self.add('keyword', self.end(before), self.end(k), '')
            before = k

    def visit_Subscript(self, node):
        self.visit(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for p in parts:
            if not isinstance(p, ast.Slice): self.value(p, 'index')
            elif p.step is None and (p.lower is None) != (p.upper is None):
                bound = p.upper or p.lower
                self.change('index', p, f'{self.text(bound)}:' if p.lower is None else f':{self.text(bound)}')
                self.value(bound, 'index')

    def value(self, node, kind):
        "A constant that stands in this place (an argument, an index, a default), or any other expression"
        minus = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant)
        if isinstance(node, ast.Constant) and isinstance(node.value, bool): self.change('keyword', node, repr(not node.value))
        elif minus and kind == 'index': self.change('index', node, str(1 - node.operand.value))
        elif isinstance(node, ast.Constant): self.constant(node, kind)
        else: self.visit(node)

    def visit_Constant(self, node): self.constant(node, 'constant')

    def constant(self, node, kind):
        v, text = node.value, self.text(node)
        if isinstance(v, bool) or not isinstance(v, (int, float)): return
        if isinstance(v, int): new = hex(v + 1) if text.lower().startswith('0x') else str(v + 1)
        elif v == 0: new = '1.'
        else: new = f'{v*(2 if abs(v) > 1e-3 else 1000):g}'  # a tolerance counts as changed when it is another order of magnitude
        self.change(kind, node, new if isinstance(v, int) or set('.e') & set(new) else new + '.')

    def quiet(self, node): "Messages, and what only leads to one, are not changed"

    visit_Raise = visit_JoinedStr = visit_Import = visit_ImportFrom = visit_Global = visit_Nonlocal = quiet


# ---- places: changes in a chapter

class Place(NamedTuple):
    "One change: where it is, what it is, and the texts of cell and module that have it"
    notebook: str   # '02_module.ipynb'
    module: str     # 'miniai/module.py'
    line: int       # in the module; the first that changes
    cell: int       # number in the notebook, from 1, text cells counted
    cell_id: str
    function: str   # 'Linear.forward'
    kind: str       # one of `KINDS`
    before: str     # the changed lines, joined and squeezed
    after: str
    source: str     # of the cell, changed
    text: str       # of the module, changed


class Chapter(NamedTuple):
    "A notebook that exports, its module, and every place in it where a line can be broken"
    notebook: str
    module: str
    places: list


def joined(s):
    "Source lines as one line, without indentation and comments at the ends"
    return ' '.join(' '.join(re.sub(r'\s\s#\s.*$|^\s*#\s.*$', '', line) for line in s.splitlines()).split())


def directives(source):
    "The `#|` lines at the head of a cell as name -> value, and the code after them"
    lines, found = source.splitlines(), {}
    while lines and (m := re.match(r'#\s*\|\s*([\w-]+):?\s*(.*)', lines[0])):
        found[m[1]] = m[2].strip()
        del lines[0]
    return found, '\n'.join(lines).strip('\n')


def cells_of(path):
    "The cells of a notebook, `source` in one piece"
    nb = json.loads(Path(path).read_text(encoding='utf-8'))
    for c in nb['cells']: c['source'] = ''.join(c['source'])
    return nb, nb['cells']


def breaks(code):
    "Every change of a cell's code that compiles and means something else, each once: kind, function, first and last line, new code"
    raw, was, seen = code.encode(), ast.dump(ast.parse(code)), set()
    for kind, function, start, end, new in Finder(code).found:
        changed = (raw[:start] + new.encode() + raw[end:]).decode()
        try: now = ast.dump(ast.parse(changed))
        except SyntaxError: continue
        if now == was or now in seen: continue
        seen.add(now)
        yield kind, function, raw.count(b'\n', 0, start), raw.count(b'\n', 0, end), changed


def places_in(
    root:Path,  # the checkout
    nb_path:Path,
    lib:str,    # folder of the package, in `root`
)->Chapter:     # or None if the notebook exports nothing
    "All places of a chapter; `SystemExit` if notebook and module are out of step"
    _, cells = cells_of(nb_path)
    name = next((d['default_exp'] for c in cells if 'default_exp' in (d := directives(c['source'])[0])), None)
    if name is None: return None
    module = f'{lib}/{name.replace(".", "/")}.py'
    if not (root/module).exists(): sys.exit(f'break_lines: {module} is missing: run nbdev_export')
    lines, found = (root/module).read_text(encoding='utf-8').splitlines(), []
    for no, c in enumerate(cells, 1):
        d, code = directives(c['source'])
        if c['cell_type'] != 'code' or not {'export', 'exports', 'exporti'} & d.keys() or not code: continue
        at = next((i + 1 for i, s in enumerate(lines) if re.match(rf'# %% \S*{re.escape(nb_path.name)} #{c["id"]}$', s)), None)
        old = code.splitlines()
        if at is None or not all(a.rstrip() == b.rstrip() or 'import' in a for a, b in zip(old, lines[at:at + len(old)], strict=True)):
            sys.exit(f'break_lines: {module} is not what cell {no} (#{c["id"]}) of {nb_path.name} holds: run nbdev_export')
        head = c['source'][:len(c['source']) - len(code)] if c['source'].endswith(code) else '#| export\n'
        for kind, function, first, last, changed in breaks(code):
            new = changed.splitlines()[first:len(changed.splitlines()) - (len(old) - last - 1)]
            text = '\n'.join([*lines[:at + first], *new, *lines[at + last + 1:]]) + '\n'
            before, after = joined('\n'.join(old[first:last + 1])), joined('\n'.join(new))
            found.append(Place(nb_path.name, module, at + first + 1, no, c['id'], function, kind, before, after, head + changed, text))
    return Chapter(nb_path.name, module, found)


def choose(
    places:list, # all of a chapter
    n:int,       # how many to take; 0: all
    seed:int,
)->list:         # in the order of the module
    "Take kinds in turn, from the function with the fewest so far, at most two places a line"
    if not n: return sorted(places, key=lambda p: p.line)
    rng, left = random.Random(f'{seed} {places[0].module if places else ""}'), list(places)
    rng.shuffle(left)
    taken, functions, lines = [], Counter(), Counter()
    while len(taken) < n and left:
        for kind in KINDS:
            fit = [p for p in left if p.kind == kind and lines[p.line] < PER_LINE]
            if not fit or len(taken) == n: continue
            p = min(fit, key=lambda p: (lines[p.line], functions[p.function]))
            left.remove(p)
            taken.append(p)
            functions[p.function] += 1
            lines[p.line] += 1
        if not any(lines[p.line] < PER_LINE for p in left): break
    return sorted(taken, key=lambda p: (p.line, places.index(p)))


# ---- checks: a notebook or test files, run in a copy of the checkout

def run_cells(
    path:str, # of a notebook
):
    "What the child process does: it runs the cells in order, until one raises, and prints where it is"
    with suppress(ImportError, ValueError, OSError):
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    from execnb.shell import CaptureShell
    flags = set(settings(Path(path).resolve().parents[1]).get('tst_flags', '').split())
    shell = CaptureShell(mpl_format='png')
    for no, c in enumerate(cells_of(path)[1], 1):
        d, code = directives(c['source'])
        if c['cell_type'] != 'code' or not code or d.get('eval', '').lower() == 'false' or flags & d.keys(): continue
        where = f'cell {no} #{c["id"]}'
        print(where, flush=True)
        shell.run(c['source'])
        if shell.exc:
            message = str(shell.exc).strip().splitlines() or ['']
            print(f'{where}: {type(shell.exc).__name__}: {message[0]}'.rstrip(': '), flush=True)
            os._exit(1)
    os._exit(RAN)  # without waiting for threads and loaders that a broken chapter left behind


def settings(root):
    "The `[DEFAULT]` section of settings.ini"
    config = configparser.ConfigParser(interpolation=None)
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def environment(copy):
    "Variables of a run: quiet, one thread, imports from the copy, no network but this machine's own, nothing written outside the copy"
    nowhere = {k: 'http://127.0.0.1:9' for k in ('http_proxy', 'https_proxy', 'all_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY')}
    near = {k: '127.0.0.1,localhost,::1' for k in ('no_proxy', 'NO_PROXY')}
    home = copy/'.home'
    (home/'tmp').mkdir(parents=True, exist_ok=True)
    return {'MINIAI_SAMPLE': '1', **os.environ, **nowhere, **near, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'MPLBACKEND': 'agg',
            'PYTHONPATH': str(copy), 'HOME': str(home), 'USERPROFILE': str(home), 'XDG_CACHE_HOME': str(home), 'TMPDIR': str(home/'tmp'),
            'MPLCONFIGDIR': str(home), 'IPYTHONDIR': str(home), 'PYTHONDONTWRITEBYTECODE': '1', 'PYTHONUSERBASE': site.getuserbase(),
            'PYDEVD_DISABLE_FILE_VALIDATION': '1'}


@contextmanager
def copied(root, tmp, place=None):
    "A copy of the checkout, with the break if one is given; it is deleted at the end"
    copy, ini = Path(tempfile.mkdtemp(dir=tmp)), settings(root)
    for part in ini.get('lib_path', 'miniai'), ini.get('nbs_path', 'nbs'), 'tests', 'scripts':
        if (root/part).is_dir(): shutil.copytree(root/part, copy/part, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    for f in root.iterdir():
        if f.is_file(): shutil.copy2(f, copy)
    if place:
        path = copy/ini.get('nbs_path', 'nbs')/place.notebook
        nb, cells = cells_of(path)
        cells[place.cell - 1]['source'] = place.source
        path.write_text(json.dumps(nb), encoding='utf-8')
        (copy/place.module).write_text(place.text, encoding='utf-8')
    try: yield copy
    finally: shutil.rmtree(copy, ignore_errors=True)


class Children:
    "The processes that are running, each in a group of its own, so that all can be ended"
    running, stopped, lock = set(), False, Lock()

    @classmethod
    def start(cls, *args, **kwargs):
        with cls.lock: # so that `end_all` misses none
            if cls.stopped: raise RuntimeError('no more processes are started')
            proc = subprocess.Popen(*args, **kwargs, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
            cls.running.add(proc)
            return proc

    @classmethod
    def end(cls, proc):
        with suppress(ProcessLookupError, PermissionError): os.killpg(proc.pid, signal.SIGKILL)
        proc.wait()
        cls.running.discard(proc)

    @classmethod
    def end_all(cls):
        with cls.lock: cls.stopped = True
        for proc in list(cls.running): cls.end(proc)


class Check(NamedTuple):
    "What can catch a break"
    name: str          # '02_module.ipynb' or 'tests/test_module.py'
    files: list        # in the checkout
    timeout: float
    seconds: float = 0 # that it takes on unbroken code

    def run(self, copy):
        "`''` if it passes in this copy, else in one line how it failed"
        notebook = self.files[0].endswith('.ipynb')
        if notebook: args = [Path(__file__).resolve(), '--run-cells', copy/self.files[0]]
        else: args = ['-m', 'pytest', '-x', '-q', '-rfE', '-p', 'no:cacheprovider', *self.files]
        with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as out:
            where = (copy/self.files[0]).parent if notebook else copy
            proc, late = Children.start([sys.executable, *map(str, args)], cwd=where, env=environment(copy), stdout=out), False
            try: proc.wait(self.timeout)
            except subprocess.TimeoutExpired: late = True
            Children.end(proc)
            out.seek(0)
            text = out.read().strip().replace(str(copy), '.')
        last = text.splitlines()[-1] if text else 'no output'
        if late: return f'timed out after {self.timeout:.0f} s; {last}'
        if proc.returncode == (RAN if notebook else 0): return ''
        if proc.returncode == 1 and notebook: return last
        if m := re.search(r'^(?:FAILED|ERROR) (.+)', text, re.M): return m[1]
        return f'the process ended with status {proc.returncode}; {last}'


def checks_of(root, chapter, nbs, timeout):
    "The chapter's notebook and the test files of its module"
    name = Path(chapter.module).stem
    tests = [f'tests/test_{t}.py' for t in TESTS.get(name, [name])]
    tests = [t for t in tests if (root/t).exists()]
    return [Check(chapter.notebook, [f'{nbs}/{chapter.notebook}'], timeout)] + [Check(' '.join(tests), tests, timeout)]*bool(tests)


# ---- survivors

def known_survivors(
    path:Path, # blocks of four lines: module, `- line before`, `+ line after`, `= reason`; `#` starts a comment, empty lines between
)->dict:       # (module, before, after) -> reason
    "The survivors that were looked at and found harmless"
    reasons, block = {}, []
    for i, line in enumerate(path.read_text(encoding='utf-8').splitlines() if path.exists() else (), 1):
        if not line.strip() or line.startswith('#'): continue
        mark = ('', '- ', '+ ', '= ')[len(block)]
        if not line.startswith(mark): sys.exit(f'{path.name}, line {i}: expected a line that starts with {mark!r}, got {line!r}')
        block.append(joined(line[len(mark):]))
        if len(block) == 4:
            *key, reason = block
            reasons[tuple(key)], block = reason, []
    if block: sys.exit(f'{path.name}: the last block is cut short; it takes module, - before, + after, = reason')
    return reasons


def summary(
    outcomes:list, # (place, name of the check that caught it or '', reason why it may survive or '')
):                 # lines to print, and whether something is wrong
    "`caught K of N (P %)`, by what, and every survivor with its reason"
    n, by = len(outcomes), Counter(name for _, name, _ in outcomes if name)
    k = sum(by.values())
    who = ', '.join(f'{c} by {name}' for name, c in by.most_common())
    lines = [f'caught {k} of {n} ({100*k/n:.1f} %): {who}'] if n else ['nothing ran']
    for p, name, reason in outcomes:
        if name: continue
        lines += [f'survivor {p.module}:{p.line} ({p.function}, {p.kind})', f'  - {p.before}', f'  + {p.after}']
        lines += [f'  = {reason or "NO REASON GIVEN"}']
    return lines, not n or 100*k < SHARE*n or any(not name and not reason for _, name, reason in outcomes)


# ---- the command

def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('chapters', nargs='*', metavar='NN', help='first letters of notebook names; default: all that export')
    parser.add_argument('--per-chapter', type=int, default=16, metavar='N', help='places in each chapter, 0 for all (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='another choice of places (%(default)s)')
    parser.add_argument('--jobs', type=int, default=min(2, os.cpu_count() or 1), help='breaks tried at a time (%(default)s)')
    parser.add_argument('--timeout', type=float, metavar='S', help='seconds for each check, instead of six unbroken runs and at least 60')
    parser.add_argument('--list', action='store_true', help='name the places and run nothing')
    parser.add_argument('--only', type=int, nargs='+', metavar='K', help='only these places, by their numbers in --list')
    parser.add_argument('--root', type=Path, default=Path(__file__).resolve().parents[1], help='another checkout than this one')
    args = parser.parse_args(argv)
    if args.per_chapter < 0: parser.error(f'--per-chapter {args.per_chapter}: must be 0 (all) or more')
    if args.jobs < 1: parser.error(f'--jobs {args.jobs}: must be 1 or more')
    if args.timeout is not None and args.timeout <= 0: parser.error(f'--timeout {args.timeout:g}: must be above 0')
    args.root = args.root.resolve()
    if not (args.root/'settings.ini').exists(): parser.error(f'--root {args.root}: there is no settings.ini')
    return args, parser


def main(argv=None):
    args, parser = arguments(argv)
    ini = settings(args.root)
    nbs, lib = ini.get('nbs_path', 'nbs'), ini.get('lib_path', 'miniai')
    paths = sorted((args.root/nbs).glob('[0-9]*.ipynb'))
    for c in args.chapters:
        if not any(p.name.startswith(c) for p in paths): parser.error(f'no notebook in {nbs} begins with {c!r}')
    chapters = [places_in(args.root, p, lib) for p in paths if not args.chapters or p.name.startswith(tuple(args.chapters))]
    chapters = [c for c in chapters if c and c.places]
    every = [p for c in chapters for p in c.places]
    numbered = dict(enumerate([p for c in chapters for p in choose(c.places, args.per_chapter, args.seed)], 1))
    if not numbered: parser.error(f'no exported line to break in {", ".join(args.chapters) or nbs}')
    if args.only:
        for k in args.only:
            if k not in numbered: parser.error(f'--only {k}: the places have the numbers 1 to {len(numbered)}')
        numbered = {k: numbered[k] for k in sorted(set(args.only))}
    reasons = known_survivors(args.root/'scripts/break_lines_survivors.txt')
    modules = {c.module for c in chapters}
    for module, before, after in reasons:
        if module in modules and not any((p.module, p.before, p.after) == (module, before, after) for p in every):
            print(f'break_lines_survivors.txt is out of date: {module} has no such line any more: {before}')
    if args.list:
        for k, p in numbered.items():
            print(f'{k:>3}  {p.module}:{p.line}  {p.notebook} cell {p.cell} #{p.cell_id}  {p.function}  {p.kind}')
            print(f'     - {p.before}\n     + {p.after}')
        print(', '.join(f'{c.notebook}: {sum(p.notebook == c.notebook for p in numbered.values())} of {len(c.places)}' for c in chapters))
        return 0
    used = [c for c in chapters if any(p.notebook == c.notebook for p in numbered.values())]
    checks = {c.notebook: checks_of(args.root, c, nbs, args.timeout or 900.) for c in used}
    with tempfile.TemporaryDirectory(prefix='break_lines_', ignore_cleanup_errors=True) as tmp, ThreadPoolExecutor(args.jobs) as pool:
        try: return try_all(args, tmp, pool, checks, numbered, reasons)
        finally: Children.end_all()


def try_all(args, tmp, pool, checks, numbered, reasons):
    "Run every check on unbroken code, then try every place and print the outcome; the exit status"
    began, broken = time.monotonic(), []

    def unbroken(check):
        start = time.monotonic()
        with copied(args.root, tmp) as copy: failure = check.run(copy)
        return failure, time.monotonic() - start

    def attempt(place):
        "Name of the check that caught it, and how; two empty strings if none did"
        with copied(args.root, tmp, place) as copy:
            for check in checks[place.notebook]:
                if failure := check.run(copy): return check.name, failure
        return '', ''

    print(f'{len(numbered)} places in {len(checks)} chapters; first every check on unbroken code', flush=True)
    flat = [(notebook, check) for notebook, those in checks.items() for check in those]
    kept = {notebook: [] for notebook in checks}
    for (notebook, check), (failure, seconds) in zip(flat, pool.map(unbroken, [check for _, check in flat])):
        print(f'{check.name}: ' + (f'FAILS UNBROKEN, not used: {failure}' if failure else f'{seconds:.1f} s'), flush=True)
        if failure: broken.append(check.name)
        else: kept[notebook].append(check._replace(seconds=seconds, timeout=args.timeout or max(60., 6*seconds)))
    for notebook in checks: checks[notebook] = sorted(kept[notebook], key=lambda c: c.seconds)
    tried, outcomes = {k: p for k, p in numbered.items() if checks[p.notebook]}, []
    for (k, p), (name, failure) in zip(tried.items(), pool.map(attempt, tried.values())):
        outcomes.append((p, name, reasons.get((p.module, p.before, p.after), '')))
        outcome = f'caught by {name}: {failure.removeprefix(name + "::")[:100]}' if name else 'SURVIVED'
        print(f'{k:>3}  {p.module}:{p.line}  {p.function}, {p.kind}: {outcome}\n     - {p.before}\n     + {p.after}', flush=True)
    lines, bad = summary(outcomes)
    print('', *lines, sep='\n')
    if broken: print('these checks fail unbroken: ' + ', '.join(broken))
    print(f'{time.monotonic() - began:.0f} s')
    return 1 if bad or broken else 0


def stop(*_): sys.exit(143)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, stop)
    try: code = run_cells(*sys.argv[2:]) if sys.argv[1:2] == ['--run-cells'] else main()
    except KeyboardInterrupt:
        print('interrupted', flush=True)
        code = 130
    sys.exit(code)

#!/usr/bin/env python3
"""Break exported lines one at a time, and check that the chapter notices.

    python scripts/break_lines.py                       sixteen places in every chapter that exports something
    python scripts/break_lines.py 00 03 --per-chapter 0 every place in two chapters
    python scripts/break_lines.py 02 --list             only name the places
    python scripts/break_lines.py 02 --only 5 9         only these two of them
    python scripts/break_lines.py --report breaks.md    the table in a file too (.md or .json)

A break is one small change in one `#| export` cell: a sign, a factor, a constant, a comparison, a condition, a dropped term,
statement or guard, an argument. The choice is spread over functions and kinds, takes at most two places a line, and is the same for
the same seed and source. Each is written into a copy of the checkout, into the notebook's cell and into the module made from it,
and the copied chapter is run in a process of its own, on the sample (`--whole`: on the whole data). It is

    caught      when a cell raises, the process dies, or it takes longer than the time-out (six clean runs, at least 60 s)
    survived    when the chapter runs through

A chapter that does not run through unbroken is not tried. A survivor is all right if scripts/break_lines_survivors.txt says why, or
if `--tests` finds a test in tests/test_MODULE.py that catches it. Exit status: 0 if at least 95% are caught by the chapters and every
survivor has its reason, 1 otherwise, 2 for wrong arguments, 130 after Ctrl-C."""
import argparse
import ast
import configparser
import difflib
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
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SHARE = 95          # per cent that the chapters must catch
PER_LINE = 2        # places taken on one source line, at most
MEMORY = 8 * 2**30  # bytes one run may hold

# ---- where a change is worth making

SKIPPED_FUNCTIONS = {'__repr__', '__str__', 'extra_repr'}
# keywords and parameters that change how a thing looks or how long it waits, but no result
APPEARANCE = set('''alpha aspect bins c cmap color colour colors constrained_layout desc disable dpi figsize fontsize fraction height label
    labels layout leave level linestyle linewidth ls lw marker markersize ms ncols nrows rotation seed size stacklevel title titles timeout
    deadline total unit unit_scale vmax vmin width xlabel ylabel zorder'''.split())
SAID = {'print', 'warn', 'warn_explicit'}  # their arguments are words
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
    "Does this expression look like words, a list or a path, with which `+`, `*` and `/` mean no arithmetic?"
    if isinstance(node, ast.Constant): return isinstance(node.value, (str, bytes))
    if isinstance(node, ast.BinOp): return is_text(node.left) or is_text(node.right)
    return isinstance(node, (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp, ast.Dict))


class Finder(ast.NodeVisitor):
    "Walks over the code of a cell and collects changes: kind, function, start and end (in bytes of the code), new text"
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
        word, other = ('and', 'or') if isinstance(node.op, ast.And) else ('or', 'and')
        for i, (left, right) in enumerate(zip(node.values, node.values[1:])):
            self.between('boolean', left, right, word, other)
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
        if name in SAID: return
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

    def quiet(self, node): "Words, and what only leads to words, are not changed"

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
            sys.exit(f'break_lines: {module} is not what cell {no} (#{c["id"]}) of {nb_path.name} says: run nbdev_export')
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
    "Take kinds in turn, from the function that has had least, at most two places a line"
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


# ---- one run, in a process of its own

def run_cells(
    path:str, # of a notebook
    log:str,  # one JSON line when a cell starts, one at the end
):
    "What the child process does: the cells in order, until one raises"
    with suppress(ImportError, ValueError, OSError):
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    from execnb.shell import CaptureShell
    flags = set(settings(Path(path).resolve().parents[1]).get('tst_flags', '').split())
    shell = CaptureShell(mpl_format='png')
    with open(log, 'a', encoding='utf-8') as f:
        def say(**kwargs): print(json.dumps(kwargs), file=f, flush=True)
        for no, c in enumerate(cells_of(path)[1], 1):
            d, code = directives(c['source'])
            if c['cell_type'] != 'code' or not code or d.get('eval', '').lower() == 'false' or flags & d.keys(): continue
            say(cell=no, id=c['id'])
            shell.run(c['source'])
            if shell.exc:
                said = str(shell.exc).strip().splitlines() or ['']
                say(error=f'{type(shell.exc).__name__}: {said[0]}'.rstrip(': '))
                break
        else: say(done=True)
    os._exit(0)  # threads and loaders that a broken chapter left behind are not waited for


def settings(root):
    "The `[DEFAULT]` section of settings.ini"
    config = configparser.ConfigParser(interpolation=None)
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


class Run:
    "A copy of the checkout, with or without a break, and the process that runs a chapter, or a test file, in it"
    running: 'list[Run]' = []

    def __init__(self,
        root:Path,         # the checkout
        tmp:Path,          # where copies go
        notebook:str,      # the chapter
        place:Place=None,  # the break; None: as it is
        env=None, timeout=600.,
        tests:str='',      # run this file of tests instead of the chapter
    ):
        self.place, self.notebook, self.timeout, self.result = place, notebook, timeout, None
        self.dir = Path(tempfile.mkdtemp(dir=tmp))
        ini = settings(root)
        nbs = ini.get('nbs_path', 'nbs')
        ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.git')
        for part in (ini.get('lib_path', 'miniai'), nbs, *(('tests', 'scripts') if tests else ())):
            if (root/part).is_dir(): shutil.copytree(root/part, self.dir/part, ignore=ignore)
        for f in root.iterdir():
            if f.is_file(): shutil.copy2(f, self.dir/f.name)
        if place:
            nb, cells = cells_of(self.dir/nbs/notebook)
            cells[place.cell - 1]['source'] = place.source
            (self.dir/nbs/notebook).write_text(json.dumps(nb), encoding='utf-8')
            (self.dir/place.module).write_text(place.text, encoding='utf-8')
        home = self.dir/'.home'
        (home/'tmp').mkdir(parents=True)
        env = {**env, 'PYTHONPATH': str(self.dir), 'HOME': str(home), 'USERPROFILE': str(home), 'XDG_CACHE_HOME': str(home),
               'TMPDIR': str(home/'tmp')}
        self.log, self.tests = self.dir/'.cells.jsonl', tests
        if tests: args, cwd = ['-m', 'pytest', '-x', '-q', '-rfE', '-p', 'no:cacheprovider', tests], self.dir
        else: args, cwd = [Path(__file__).resolve(), '--run-cells', self.dir/nbs/notebook, self.log], self.dir/nbs
        with open(self.dir/'.output', 'wb') as out:
            self.start = time.monotonic()
            self.proc = subprocess.Popen([sys.executable, *map(str, args)], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out,
                                         stderr=subprocess.STDOUT, start_new_session=True)
        Run.running.append(self)

    def done(self):
        "Has it ended? Then `result` is `('ran' | 'raised' | 'died' | 'timed out', cell number, cell id, words)`, and the copy is gone"
        late = time.monotonic() - self.start > self.timeout
        if self.proc.poll() is None and not late: return False
        self.seconds = time.monotonic() - self.start
        self.kill()
        self.result = self.tested(late) if self.tests else self.ran(late)
        self.remove()
        return True

    def ran(self, late):
        said = [json.loads(s) for s in self.log.read_text(encoding='utf-8').splitlines()] if self.log.exists() else []
        at = next((s for s in reversed(said) if 'cell' in s), {'cell': 0, 'id': '-'})
        last = said[-1] if said else {}
        if 'done' in last and at['cell']: how, words = 'ran', ''
        elif 'error' in last: how, words = 'raised', last['error'].replace(str(self.dir), '.')
        elif late: how, words = 'timed out', f'timed out after {self.timeout:.0f} s'
        else: how, words = 'died', f'the process ended with status {self.proc.returncode}: {self.tail()}'
        return how, at['cell'], at['id'], words

    def tested(self, late):
        if late: return 'timed out', 0, '-', f'{self.tests}, timed out after {self.timeout:.0f} s'
        m = re.search(r'^(?:FAILED|ERROR) (\S+)', (self.dir/'.output').read_text(encoding='utf-8', errors='replace'), re.M)
        if self.proc.returncode == 0: return 'ran', 0, '-', ''
        return 'raised', 0, '-', m[1] if m else f'{self.tests}: {self.tail()}'

    def tail(self):
        text = (self.dir/'.output').read_text(encoding='utf-8', errors='replace').strip().splitlines()
        return text[-1] if text else 'no output'

    def kill(self):
        with suppress(ProcessLookupError, PermissionError): os.killpg(self.proc.pid, signal.SIGKILL)
        self.proc.wait()

    def remove(self):
        if self in Run.running: Run.running.remove(self)
        shutil.rmtree(self.dir, ignore_errors=True)


def run_many(
    waiting:list, # arguments of `Run`, one dict a run
    jobs:int,     # processes at a time
):                # yields the finished runs, in the order of their ends
    waiting = list(waiting)
    while waiting or Run.running:
        while waiting and len(Run.running) < jobs: Run(**waiting.pop(0))
        yield from [r for r in list(Run.running) if r.done()]
        time.sleep(.05)


# ---- words

def shortened(before, after, room=46):
    "The two lines cut down to what differs, with some of the line on both sides"
    blocks = [b for b in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes() if b[0] != 'equal']
    if not blocks: return before, after
    start, ends = blocks[0][1], (len(before) - blocks[-1][2])
    def cut(s):
        a, b = max(0, start - room//2), min(len(s), len(s) - ends + room//2)
        s = ('…' if a else '') + s[a:b] + ('…' if b < len(s) else '')
        return s if len(s) <= 2*room else f'{s[:room]} … {s[-room:]}'
    return cut(before), cut(after)


def known_survivors(
    path:Path, # blocks of four lines: module, `- line before`, `+ line after`, `= reason`; `#` starts a comment, empty lines between
)->dict:       # (module, before, after) -> reason
    "The survivors that somebody has looked at"
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


def outcome(place, result, reason='', test=''):
    "One line of the table, as a dict"
    how, cell, cell_id, words = result
    return dict(file=place.module, line=place.line, notebook=place.notebook, export_cell=place.cell, export_id=place.cell_id,
                function=place.function, kind=place.kind, before=place.before, after=place.after, caught=how != 'ran',
                how=how, cell=cell, cell_id=cell_id, error=words, reason=reason, test=test)


def verdict(o):
    "What came of a break, in words"
    if not o['caught']: return 'SURVIVED'
    where = f'cell {o["cell"]} #{o["cell_id"]}' if o['cell'] else 'before the first cell'
    return f'{where}: {o["error"][:100]}'


def one_line(n, o):
    before, after = shortened(o['before'], o['after'])
    return f'{n:>3}  {o["file"]}:{o["line"]}  {o["kind"]}  {before}  ->  {after}\n       {verdict(o)}'


def summary(outcomes):
    "`caught K of N (P %)`, and what makes it fail, if anything"
    n, k = len(outcomes), sum(o['caught'] for o in outcomes)
    checks = sum(o['error'].startswith('AssertionError') for o in outcomes)
    late = sum(o['how'] == 'timed out' for o in outcomes)
    how = f'{checks} by a check, {k - checks - late} by another error' + f', {late} by the time-out'*bool(late)
    lines = [f'caught {k} of {n} ({100*k/n:.1f} %): {how}'] if n else ['nothing ran']
    for o in outcomes:
        if o['caught']: continue
        why = o['reason'] or (f'the chapter does not notice, but {o["test"]} does' if o['test'] else 'NO REASON GIVEN')
        lines.append(f'survivor {o["file"]}:{o["line"]} ({o["function"]}, {o["kind"]})\n  - {o["before"]}\n  + {o["after"]}\n  = {why}')
    bad = not n or 100*k < SHARE*n or any(not (o['caught'] or o['reason'] or o['test']) for o in outcomes)
    return lines, bad


def write_report(path, outcomes, lines):
    "The table as Markdown or JSON, by the file's ending"
    if path.suffix == '.json': text = json.dumps(dict(summary=lines[0], breaks=outcomes), indent=1)
    else:
        def row(*columns): return f'| {" | ".join(str(c).replace("|", chr(92) + "|") for c in columns)} |'
        rows = [row('file:line', 'kind', 'change', 'failing cell', 'caught by tests', 'reason'), row(*['---']*6)]
        for o in outcomes:
            before, after = shortened(o['before'], o['after'])
            rows.append(row(f'{o["file"]}:{o["line"]}', o['kind'], f'`` {before} `` → `` {after} ``', verdict(o), o['test'], o['reason']))
        text = '\n'.join(['# Broken lines', '', lines[0], '', *rows, '', '```', *lines, '```', ''])
    path.write_text(text, encoding='utf-8')


# ---- the command

def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('chapters', nargs='*', metavar='NN', help='first letters of notebook names; default: all that export')
    parser.add_argument('--per-chapter', type=int, default=16, metavar='N', help='places in each chapter, 0 for all (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='another choice of places (%(default)s)')
    parser.add_argument('--jobs', type=int, default=min(2, os.cpu_count() or 1), help='runs at a time (%(default)s)')
    parser.add_argument('--timeout', type=float, metavar='S', help='seconds for each run, instead of six clean runs and at least 60')
    parser.add_argument('--whole', action='store_true', help='run on the whole data, which MINIAI_DATA must name')
    parser.add_argument('--tests', action='store_true', help='give what survives to tests/test_MODULE.py too')
    parser.add_argument('--list', action='store_true', help='name the places and run nothing')
    parser.add_argument('--only', type=int, nargs='+', metavar='K', help='only these places, by their numbers in --list')
    parser.add_argument('--report', type=Path, metavar='FILE', help='write the table to FILE.md or FILE.json')
    parser.add_argument('--survivors', type=Path, metavar='FILE', help='reasons for survivors (scripts/break_lines_survivors.txt)')
    parser.add_argument('--root', type=Path, default=Path(__file__).resolve().parents[1], help='another checkout than this one')
    args = parser.parse_args(argv)
    if args.per_chapter < 0: parser.error(f'--per-chapter {args.per_chapter}: must be 0 (all) or more')
    if args.jobs < 1: parser.error(f'--jobs {args.jobs}: must be 1 or more')
    if args.timeout is not None and args.timeout <= 0: parser.error(f'--timeout {args.timeout:g}: must be above 0')
    if args.whole and not os.environ.get('MINIAI_DATA'): parser.error('--whole: set MINIAI_DATA to the folder that holds the data')
    if args.report and args.report.suffix not in ('.md', '.json'): parser.error(f'--report {args.report}: must end in .md or .json')
    args.root = args.root.resolve()
    if not (args.root/'settings.ini').exists(): parser.error(f'--root {args.root}: there is no settings.ini')
    args.survivors = args.survivors or args.root/'scripts/break_lines_survivors.txt'
    return args, parser


def environment(whole, tmp):
    "Variables of a run: quiet, one thread, no network but this machine's own, and nothing written outside the copy"
    nowhere = {k: 'http://127.0.0.1:9' for k in ('http_proxy', 'https_proxy', 'all_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY')}
    near = {k: '127.0.0.1,localhost,::1' for k in ('no_proxy', 'NO_PROXY')}
    return {**os.environ, **nowhere, **near, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'MPLBACKEND': 'agg',
            'MINIAI_SAMPLE': '0' if whole else '1', 'MPLCONFIGDIR': str(tmp), 'IPYTHONDIR': str(tmp/'ipython'),
            'PYTHONDONTWRITEBYTECODE': '1', 'PYTHONUSERBASE': site.getuserbase(), 'PYDEVD_DISABLE_FILE_VALIDATION': '1'}


def clean_runs(args, tmp, env, chapters):
    "Run the chapters as they are; the time-out of each, or None in its place if it fails"
    limits, common = {}, dict(root=args.root, tmp=tmp, env=env, timeout=args.timeout or 600.)
    for r in run_many([dict(notebook=c.notebook, **common) for c in chapters], args.jobs):
        how, cell, cell_id, words = r.result
        limits[r.notebook] = args.timeout or max(60., 6*r.seconds) if how == 'ran' else None
        note = f'{r.seconds:.1f} s' if how == 'ran' else f'FAILS UNBROKEN, not tried: cell {cell} #{cell_id}: {words}'
        print(f'{r.notebook}: {note}', flush=True)
    return limits


def give_to_tests(args, tmp, env, outcomes, places):
    "Run tests/test_MODULE.py, unbroken and then on each survivor, and note which test catches it"
    env = {k: v for k, v in env.items() if k != 'MINIAI_SAMPLE'} | {k: v for k, v in os.environ.items() if k == 'MINIAI_SAMPLE'}
    left = [(p, o) for p, o in zip(places, outcomes) if not o['caught']]
    limits = {}
    for notebook, module in sorted({(p.notebook, p.module) for p, _ in left}):
        file = f'tests/test_{Path(module).stem}.py'
        if not (args.root/file).exists():
            print(f'{file}: there is none')
            continue
        r, = run_many([dict(root=args.root, tmp=tmp, notebook=notebook, env=env, tests=file, timeout=args.timeout or 900.)], 1)
        if r.result[0] == 'ran': limits[module] = file, args.timeout or max(60., 6*r.seconds)
        print(f'{file}: {r.seconds:.1f} s' if module in limits else f'{file} FAILS UNBROKEN, not used: {r.result[3]}', flush=True)
    runs = [dict(root=args.root, tmp=tmp, notebook=p.notebook, place=p, env=env, tests=limits[p.module][0], timeout=limits[p.module][1])
            for p, _ in left if p.module in limits]
    for r in run_many(runs, args.jobs):
        o = next(o for p, o in left if p is r.place)
        o['test'] = r.result[3]
        print(f'{o["file"]}:{o["line"]} {o["kind"]}: ' + (f'caught by {o["test"]}' if o['test'] else 'survived the tests'), flush=True)


def main(argv=None):
    args, parser = arguments(argv)
    ini = settings(args.root)
    nbs, lib = args.root/ini.get('nbs_path', 'nbs'), ini.get('lib_path', 'miniai')
    paths = sorted(nbs.glob('[0-9]*.ipynb'))
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
    reasons = known_survivors(args.survivors)
    modules = {c.module for c in chapters}
    for module, before, after in reasons:
        if module in modules and not any((p.module, p.before, p.after) == (module, before, after) for p in every):
            print(f'{args.survivors.name} is out of date: {module} has no such line any more: {before}')
    if args.list:
        for k, p in numbered.items():
            print(f'{k:>3}  {p.module}:{p.line}  {p.notebook} cell {p.cell} #{p.cell_id}  {p.function}  {p.kind}')
            print(f'     - {p.before}\n     + {p.after}')
        print(', '.join(f'{c.notebook}: {sum(p.notebook == c.notebook for p in numbered.values())} of {len(c.places)}' for c in chapters))
        return 0
    with tempfile.TemporaryDirectory(prefix='break_lines_', ignore_cleanup_errors=True) as tmp:
        try: return try_all(args, Path(tmp), numbered, reasons, chapters)
        finally:
            for r in list(Run.running):
                r.kill()
                r.remove()


def try_all(args, tmp, numbered, reasons, chapters):
    "Run every place, print what came of it, and say by the exit status whether it is good enough"
    from tqdm import tqdm
    env, began, tty = environment(args.whole, tmp), time.monotonic(), sys.stderr.isatty()
    used = [c for c in chapters if any(p.notebook == c.notebook for p in numbered.values())]
    data = 'whole data' if args.whole else 'sample'
    print(f'{len(numbered)} places in {len(used)} chapters, on the {data}; first each chapter unbroken', flush=True)
    limits = clean_runs(args, tmp, env, used)
    tried = {k: p for k, p in numbered.items() if limits[p.notebook]}
    common = dict(root=args.root, tmp=tmp, env=env)
    runs = [dict(notebook=p.notebook, place=p, timeout=limits[p.notebook], **common) for p in tried.values()]
    numbers, results = {id(p): k for k, p in tried.items()}, {}
    with tqdm(total=len(runs), disable=not tty, leave=False, unit='break') as bar:
        for r in run_many(runs, args.jobs):
            k = numbers[id(r.place)]
            results[k] = r.result
            state = 'SURVIVED' if r.result[0] == 'ran' else f'caught, {r.result[0]} in cell {r.result[1]}'
            said = f'{len(results)}/{len(runs)}  no. {k}, {r.place.module}:{r.place.line}, {r.place.kind}: {state} ({r.seconds:.1f} s)'
            if not tty: print(said, flush=True)
            bar.update()
    outcomes = [outcome(p, results[k], reasons.get((p.module, p.before, p.after), '')) for k, p in tried.items()]
    if args.tests: give_to_tests(args, tmp, env, outcomes, tried.values())
    print()
    for k, o in zip(tried, outcomes): print(one_line(k, o))
    lines, bad = summary(outcomes)
    print('', *lines, sep='\n')
    if args.report: write_report(args.report, outcomes, lines)
    failed = [n for n, limit in limits.items() if limit is None]
    if failed: print('these chapters fail unbroken: ' + ', '.join(failed))
    print(f'{time.monotonic() - began:.0f} s')
    return 1 if bad or failed else 0


def stop(*_): sys.exit(143)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, stop)
    try: code = run_cells(*sys.argv[2:]) if sys.argv[1:2] == ['--run-cells'] else main()
    except KeyboardInterrupt:
        print('interrupted', flush=True)
        code = 130
    sys.exit(code)

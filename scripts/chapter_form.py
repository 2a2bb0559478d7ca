#!/usr/bin/env python3
"""Measure a chapter by the form that chapters have: sizes of cells, share of tests, width of lines, figures and their alt texts.

    python scripts/chapter_form.py            every chapter
    python scripts/chapter_form.py 02 04      these

It prints one line for each chapter and one for each complaint. tests/test_house.py decides which chapters must have none."""
import ast
import json
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
STORY, EXPORTED, COLUMNS, TESTS, COLLAPSED = 20, 60, 100, 15, 20   # lines, lines, columns, per cent, per cent
CHECK = re.compile(r'\b(assert|assert_\w+\(|test_\w+\(|check_\w+\(|raises\(|expect\w*\()')
HOME_MADE = {   # terms of our own drafts, and the standard ones
    r'puts? out': 'outputs',
    r'(ask|asks|want|wants) (for )?(a|its|their|the) gradients?': 'requires grad',
    r'refus(e|es|ed|al|als|ing)': 'raises',
    r'judg(e|es|ed|ing|ement)': 'evaluate',
    r'whoever|somebody|nobody': 'the caller',
    r'mend(s|ed|ing)?': 'fix',
    r'a number a row': 'one number per example',
}


def text(lines): return lines if isinstance(lines, str) else ''.join(lines)


def directives(source):
    "The `#|` lines at the head of a cell"
    found = []
    for line in source.strip().splitlines():
        if not (m := re.match(r'\s*#\s*\|\s*(.+?)\s*$', line)): break
        found.append(m[1])
    return found


def size(source):
    "Lines of code: neither empty nor only a comment"
    return sum(bool(line.strip()) and not line.strip().startswith('#') for line in source.splitlines())


class Cell:
    "A code cell: what it is for, how large it is, and the figures it shows"
    def __init__(self, cell):
        self.id, self.source, self.outputs = cell['id'], text(cell['source']), cell['outputs']
        self.size, self.directives, meta = size(self.source), directives(self.source), cell['metadata']
        self.collapsed = meta.get('jupyter', {}).get('source_hidden', False) or 'hide-cell' in meta.get('tags', [])
        exported = any(re.match(r'(export|exports|exporti|exec_export)\b', d) for d in self.directives)
        self.kind = 'exported' if exported else 'test' if self.is_test() else 'story'
        self.figures = sum(any(k.startswith('image/') for k in o.get('data', {})) for o in self.outputs)
        self.alt = next((d.partition(':')[2].strip() for d in self.directives if d.startswith('fig-alt:')), '')

    def is_test(self):
        "Is most of it checks? A cell that shows something may have three"
        if self.outputs and len(CHECK.findall(self.source)) <= 3: return False
        plain = '\n'.join('' if re.match(r'\s*[%!]', line) else line for line in self.source.splitlines())
        statements = [n for n in ast.parse(plain).body if not isinstance(n, (ast.Import, ast.ImportFrom))]
        lines = [(len(ast.unparse(n).splitlines()), n) for n in statements]
        checks = sum(k for k, n in lines if not isinstance(n, (ast.ClassDef, ast.Assign)) and CHECK.search(ast.unparse(n)))
        return bool(lines) and checks >= .6 * sum(k for k, _ in lines)


class Chapter:
    "A notebook, measured; each method that ends in `complaints` is empty if all is well"
    def __init__(self, path):
        self.cells = json.loads(Path(path).read_text(encoding='utf-8'))['cells']
        self.code = [Cell(c) for c in self.cells if c['cell_type'] == 'code' and text(c['source']).strip()]
        lines = {'exported': 0, 'story': 0, 'test': 0, 'collapsed': 0}
        for c in self.code: lines['collapsed' if c.kind == 'test' and c.collapsed else c.kind] += c.size
        seen = max(1, lines['exported'] + lines['story'] + lines['test'])
        self.tests, self.collapsed = 100 * lines['test'] / seen, 100 * lines['collapsed'] / seen   # per cent of what one sees

    def long_complaints(self):
        limits = {'story': STORY, 'exported': EXPORTED}
        return [f'cell #{c.id} ({c.kind}) has {c.size} lines: at most {limits[c.kind]}'
                for c in self.code if c.kind in limits and c.size > limits[c.kind]]

    def wide_complaints(self):
        return [f'cell #{c.id}: {len(line)} columns, at most {COLUMNS}: {line.strip()[:60]}'
                for c in self.code for line in c.source.splitlines() if len(line) > COLUMNS]

    def share_complaints(self):
        found = [f'visible test cells hold {self.tests:.1f}% of the code lines: less than {TESTS}%'] if self.tests >= TESTS else []
        if self.collapsed > COLLAPSED: found.append(f'collapsed test cells add {self.collapsed:.1f}% of code lines: at most {COLLAPSED}%')
        return found

    def figure_complaints(self):
        shown, alts = [c for c in self.code if c.figures], [c.alt for c in self.code if c.alt]
        return [f'cell #{c.id} shows a figure: its first line must be `#| fig-alt:` and at least four words, got {c.alt!r}'
                for c in shown if len(c.alt.split()) < 4] + [f'alt text used twice: {a}' for a in sorted(set(alts)) if alts.count(a) > 1]

    def id_complaints(self):
        ids = [c['id'] for c in self.cells]
        return [f'two cells have the id {i}' for i in sorted(set(ids)) if ids.count(i) > 1]

    def term_complaints(self):
        return [f'cell #{c["id"]}: {m[0]!r} is our own term for: {term}' for c in self.cells for pattern, term in HOME_MADE.items()
                for m in re.finditer(rf'\b({pattern})\b', text(c['source']), re.I)]

    def complaints(self):
        return [s for name in dir(self) if name.endswith('_complaints') for s in getattr(self, name)()]


def main():
    paths = sorted(p for p in (root / 'nbs').glob('[0-9]*.ipynb') if not sys.argv[1:] or p.name.startswith(tuple(sys.argv[1:])))
    for p in paths:
        c = Chapter(p)
        print(f'{p.name}: {len(c.code)} code cells, visible tests {c.tests:.1f}%, collapsed tests {c.collapsed:.1f}%, '
              f'{sum(cell.figures for cell in c.code)} figures')
        for complaint in c.complaints(): print(f'    {complaint}')


if __name__ == '__main__': main()

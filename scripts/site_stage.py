#!/usr/bin/env python3
"""Write the pages of the site, as Sphinx reads them, into an empty folder: copies of the notebooks and one page for each module.

    python scripts/site_stage.py FOLDER

Nothing is executed: the outputs are those stored in the notebooks. A copy differs from its notebook in this:
`#|` lines are gone, and cells that held nothing else; `#| fig-alt:` has become the alt text of the cell's figures; cells of
checks are collapsed; links lead to pages of the site, or else to the repository; the first mention of a name of miniai leads
to its API page, "chapter 03" to the chapter. scripts/make_site.sh runs it."""
import ast
import json
import posixpath
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]
nbs = root / 'nbs'
parser = ConfigParser(delimiters=['='])
parser.read(root / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
github = f'https://github.com/{cfg["user"]}/{cfg["repo"]}'
parts = [('By hand', '00', '04'), ('A trainer', '05', '10'), ('Convnets', '11', '16'), ('Scale', '17', '69'), ('Appendices', '70', '99')]
code_or_math = re.compile(r'(^ *```.*?^ *```|^ *~~~.*?^ *~~~|``.+?``|`[^`\n]+`|\$\$.+?\$\$|\$[^$\n]+\$)', re.M | re.S)


def text(lines): return lines if isinstance(lines, str) else ''.join(lines)


def directive(source, name):
    "The value of `#| name: value` or `#| name value`, None if the cell has no such line"
    m = re.search(rf'^#\s*\|\s*{name}\b:?[ \t]*(.*?)[ \t]*$', source, re.M)
    return m and m[1]


def definitions(source):
    "The public functions and classes that a cell of code defines"
    tree = ast.parse('\n'.join('' if re.match(r'\s*[%!?]', line) else line for line in source.splitlines()))
    names = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    tuples = [n for n in tree.body if isinstance(n, ast.Assign) and re.match('namedtuple|NamedTuple', ast.unparse(n.value))]
    names += [t.id for n in tuples for t in n.targets]
    return [n for n in names if not n.startswith('_')]


class Notebook:
    "A notebook of nbs/: its cells, its title, the module it makes"
    def __init__(self, path):
        self.path, self.name = path, path.relative_to(nbs).as_posix()
        self.json = json.loads(path.read_text(encoding='utf-8'))
        self.cells = self.json['cells']
        self.code = [text(c['source']) for c in self.cells if c['cell_type'] == 'code']
        self.title = re.search(r'^# (.+)$', text(self.cells[0]['source']), re.M)[1]
        self.number = path.name[:2] if path.name[:2].isdigit() else ''
        self.module = next((m for m in (directive(s, 'default_exp') for s in self.code) if m), None)
        self.exports = [n for s in self.code if directive(s, 'export') is not None for n in definitions(s)]
        self.label = self.name.removesuffix('.ipynb').replace('/', '-').replace('_', '-')


def all_notebooks():
    "Every notebook, the index first, then by name"
    found = [p for p in nbs.rglob('*.ipynb') if not any(x.startswith(('.', '_')) for x in p.relative_to(nbs).parts)]
    return sorted(map(Notebook, found), key=lambda nb: (nb.name != 'index.ipynb', nb.name))


class Stage:
    def __init__(self, out):
        self.out, self.notebooks = Path(out), all_notebooks()
        self.chapters = {nb.number: nb for nb in self.notebooks if nb.number and '/' not in nb.name}
        self.modules = {nb.module: nb for nb in self.chapters.values() if nb.module}
        self.wrong = []

    # ---- links

    def relink(self, markdown, nb):
        "Links to files become links to pages of the site, or else to the repository; pictures are copied"
        folder = posixpath.dirname('nbs/' + nb.name)
        def moved(m):
            picture, label, link = m[1], m[2], m[3]
            if re.match(r'[a-z]+:', link): return m[0]
            path, _, heading = link.partition('#')
            if heading: heading = '#' + re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
            if not path: return f'[{label}]({heading})'
            full = posixpath.normpath(posixpath.join(folder, path))
            if not (root / full).exists():
                self.wrong.append(f'{nb.name}: the link {link} leads nowhere')
                return m[0]
            if picture:
                copy = posixpath.join('images', posixpath.basename(full))
                (self.out / 'images').mkdir(exist_ok=True)
                shutil.copyfile(root / full, self.out / copy)
                return f'![{label}](/{copy})'
            if any('nbs/' + other.name == full for other in self.notebooks): return f'[{label}]({path}{heading})'
            kind = 'tree' if (root / full).is_dir() else 'blob'
            return f'[{label}]({github}/{kind}/{cfg["branch"]}/{full})'
        return re.sub(r'(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)', moved, markdown)

    def page(self, nb, of): return '../' * of.name.count('/') + nb.name

    def link_chapters(self, markdown, nb):
        "`chapter 03` and `chapters 00 to 02` lead there"
        def linked(m):
            def one(n): return f'[{n[0]}]({self.page(self.chapters[n[0]], nb)})' if n[0] in self.chapters else n[0]
            if re.fullmatch(r'\d\d', m[2]):   # the word is part of the link
                return f'[{m[0]}]({self.page(self.chapters[m[2]], nb)})' if m[2] in self.chapters else m[0]
            return m[1] + re.sub(r'\d\d', one, m[2])
        return re.sub(r'\b((?:[Cc]hapters?|[Aa]ppendi(?:x|ces)) )(\d\d(?:(?:,| to| and|, and) \d\d)*)(?!\d)', linked, markdown)

    def names(self, nb):
        "The names of miniai that mean in this notebook what the package means: its own, and those it imports"
        names = {n: nb.module for n in nb.exports} if nb.module else {}
        for m in re.finditer(r'^\s*from miniai\.(\w+) import ([\w, ]+)', '\n'.join(nb.code), re.M):
            if m[1] in self.modules: names |= {n.strip(): m[1] for n in m[2].split(',') if n.strip() in self.modules[m[1]].exports}
        return names

    def link_names(self, code, names):
        "`` `fit` `` and `` `fit()` `` lead to the API page when they are mentioned for the first time"
        name = code.strip('`').removesuffix('()')
        module = names.pop(name, None)
        return f'{{py:obj}}`{code.strip("`")} <miniai.{module}.{name}>`' if module else code

    def markdown(self, source, nb, names):
        source = self.relink(source, nb)
        lines = []
        for line in re.split(r'(^(?:#|\||>).*\n?)', source, flags=re.M):   # headings, tables and the purpose: no names
            pieces = code_or_math.split(line)
            plain = line[:1] in ('#', '|', '>')
            for i, s in enumerate(pieces):
                if i % 2: pieces[i] = self.link_names(s, names) if not plain and s[0] == '`' and s[1:2] != '`' else s
                elif not s.startswith('#'): pieces[i] = self.outside_links(s, nb)
            lines.append(''.join(pieces))
        return ''.join(lines)

    def outside_links(self, s, nb):
        return ''.join(p if i % 2 else self.link_chapters(p, nb) for i, p in enumerate(re.split(r'(\[[^]]*\]\([^)]*\))', s)))

    # ---- pages

    def top(self, nb):
        "The line below the title: where this notebook is, and what belongs to it"
        here, up = f'{cfg["user"]}/{cfg["repo"]}/blob/{cfg["branch"]}/nbs/{nb.name}', '../' * nb.name.count('/')
        links = [f'[This notebook in the repository](https://github.com/{here})',
                 f'[Open it in Colab](https://colab.research.google.com/github/{here})']
        solution = nbs / 'solutions' / nb.path.name
        if nb.path.parent == nbs and solution.exists(): links.append(f'[Solutions](solutions/{nb.path.name})')
        if nb.path.parent != nbs: links.append(f'[The chapter](../{nb.path.name})')
        if nb.module: links.append(f'[API](api/{nb.module}.md)')
        if not nb.number: links.append('[API](api/index.md)')
        links.append(f'[Notation and terms]({up}notation.md)')
        colab = f'In Colab, run `%pip install git+{github}` first.'
        return '```{rst-class} page-links\n```\n\n' + ' · '.join(links) + '. ' + colab

    def code_cell(self, cell, nb):
        "The cells that replace a cell of code: none if it held only directives"
        source, meta = text(cell['source']), dict(cell['metadata'])
        exported = directive(source, 'export') is not None
        figures = [o for o in cell['outputs'] if any(k.startswith('image/') for k in o.get('data', {}))]
        alt = directive(source, 'fig-alt')
        if directive(source, 'hide') is not None: return []
        source = re.sub(r'^#\s*\|.*\n?', '', source, flags=re.M).strip()
        if not source: return []
        if figures and not alt: self.wrong.append(f'{nb.name}: cell {cell["id"]} shows a figure and has no `#| fig-alt:`')
        hidden = 'hide-cell' in meta.get('tags', []) or meta.get('jupyter', {}).get('source_hidden')
        new = dict(cell, source=source, metadata={})
        if hidden: new['metadata']['tags'] = ['hide-cell']
        if alt and figures: new['metadata']['mystnb'] = {'image': {'alt': alt}}
        names = definitions(source) if exported and nb.module else []
        if not names: return [new]
        labels = '\n'.join(f'(built-{nb.module}-{n})=' for n in names)
        links = ', '.join(f'{{py:obj}}`{n} <miniai.{nb.module}.{n}>`' for n in names)
        note = f'{labels}\n```{{rst-class}} built\n```\n\nPart of `miniai.{nb.module}`: {links}'
        return [dict(cell_type='markdown', id='n' + cell['id'][:7], metadata={}, source=note), new]

    def notebook(self, nb):
        cells, names = [], self.names(nb)
        for c in nb.cells:
            if c['cell_type'] == 'code': cells += self.code_cell(c, nb)
            else: cells.append(dict(c, source=self.markdown(text(c['source']), nb, names)))
        title, _, rest = cells[0]['source'].partition('\n')
        cells[0]['source'] = f'({nb.label})=\n{title}\n\n' + self.top(nb) + '\n' + rest
        if nb.name == 'index.ipynb': cells.append(dict(cell_type='markdown', id='contents', metadata={}, source=self.contents()))
        path = self.out / nb.name
        path.parent.mkdir(exist_ok=True)
        meta = {'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}, 'language_info': {'name': 'python'}}
        path.write_text(json.dumps(dict(nb.json, cells=cells, metadata=meta)), encoding='utf-8')

    def contents(self):
        "The tree of all pages, which gives the sidebar and the order of previous and next"
        def tree(caption, pages): return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(pages) + '\n```\n'
        trees = [(caption, [nb.name for n, nb in self.chapters.items() if low <= n <= high]) for caption, low, high in parts]
        trees += [('Solutions', [nb.name for nb in self.notebooks if nb.name.startswith('solutions/')]),
                  ('Reference', [*(['recipes.ipynb'] if (nbs / 'recipes.ipynb').exists() else []), 'notation.md', 'api/index.md'])]
        return '\n'.join(tree(caption, pages) for caption, pages in trees if pages)

    def api(self):
        folder = self.out / 'api'
        folder.mkdir()
        lines = []
        for module, nb in self.modules.items():
            names = ', '.join(f'{{py:obj}}`{n} <miniai.{module}.{n}>`' for n in nb.exports)
            lines.append(f'| [`miniai.{module}`]({module}.md) | {names} |')
            page = (f'# miniai.{module}\n\nBuilt in chapter [{nb.title}](../{nb.name}).\n\n'
                    f'```{{eval-rst}}\n.. automodule:: miniai.{module}\n```\n')
            (folder / f'{module}.md').write_text(page, encoding='utf-8')
        head = '# API\n\nEvery module is made from the chapter of the same name. Shapes and errors stand beside each argument.\n\n'
        tree = '```{toctree}\n:hidden:\n\n' + '\n'.join(self.modules) + '\n```\n'
        (folder / 'index.md').write_text(head + '| module | names |\n|---|---|\n' + '\n'.join(lines) + '\n\n' + tree, encoding='utf-8')

    def notation(self):
        "docs/notation.md; a two-digit number in a last column of its tables leads to the chapter"
        source = (root / 'docs' / 'notation.md').read_text(encoding='utf-8')
        def linked(m):
            if m[1] in self.chapters: return f'| [{m[1]}]({self.chapters[m[1]].name}) |'
            self.wrong.append(f'notation.md: there is no chapter {m[1]}')
            return m[0]
        (self.out / 'notation.md').write_text(re.sub(r'\| (\d\d) \|$', linked, source, flags=re.M), encoding='utf-8')

    def write(self):
        self.out.mkdir(parents=True, exist_ok=True)
        for nb in self.notebooks: self.notebook(nb)
        self.api()
        self.notation()
        if self.wrong: sys.exit('\n'.join(['site_stage: these must be put right first:', *self.wrong]))


if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit(__doc__)
    Stage(sys.argv[1]).write()

#!/usr/bin/env python3
"""Make README.md from nbs/index.ipynb: its text, its code, and the outputs stored with it.

    python scripts/make_readme.py            write README.md
    python scripts/make_readme.py --check    write nothing; exit status 1 if README.md differs

Links and pictures that the notebook names from its own folder are named from the top of the checkout instead.
Nothing but Python is needed."""
import argparse
import json
import posixpath
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
source, target = root / 'nbs' / 'index.ipynb', root / 'README.md'
head = '<!-- Made from nbs/index.ipynb by scripts/make_readme.py: change the notebook, not this file. -->\n'


def text(lines): return lines if isinstance(lines, str) else ''.join(lines)


def relink(markdown):
    "`[a](b.ipynb)` in nbs/ is `[a](nbs/b.ipynb)` beside it"
    def moved(m):
        link = m[2]
        if re.match(r'[a-z]+:|#|/', link): return m[0]
        return m[1] + posixpath.normpath(posixpath.join('nbs', link)) + m[3]
    return re.sub(r'(\]\()([^)\s]+)(\))', moved, markdown)


def output(out):
    "The text of one stored output; pictures are left to the notebook"
    kind = out['output_type']
    if kind == 'error': sys.exit(f'make_readme: a cell of {source} ended in {out["ename"]}: {out["evalue"]}')
    if kind == 'stream': return text(out['text']) if out['name'] == 'stdout' else ''
    data = out['data']
    return '' if 'image/png' in data or 'text/plain' not in data else text(data['text/plain']) + '\n'


def readme():
    parts = [head]
    for c in json.loads(source.read_text(encoding='utf-8'))['cells']:
        src = text(c['source']).strip()
        if c['cell_type'] == 'markdown': parts.append(relink(src) + '\n')
        if c['cell_type'] != 'code' or re.match(r'#\s*\|\s*hide\b', src): continue
        src = re.sub(r'^#\s*\|.*\n?', '', src, flags=re.M).strip()
        if src: parts.append(f'```python\n{src}\n```\n')
        out = ''.join(map(output, c.get('outputs', []))).rstrip()
        if out: parts.append(f'```text\n{out}\n```\n')
    return '\n'.join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    args = parser.parse_args()
    if args.check:
        if not target.exists() or target.read_text(encoding='utf-8') != readme():
            sys.exit('make_readme: README.md and nbs/index.ipynb disagree: run `python scripts/make_readme.py`')
        print('README.md agrees with nbs/index.ipynb')
    else: target.write_text(readme(), encoding='utf-8')


if __name__ == '__main__': main()

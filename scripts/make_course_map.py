#!/usr/bin/env python3
"""Draw the map of the course, nbs/images/course_map.png: its parts, its chapters and the order in which to read them.

    python scripts/make_course_map.py

Titles and module names are read from the notebooks; only the parts and the planned chapters are named here."""
import json
import re
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

root = Path(__file__).resolve().parents[1]
target = root / 'nbs' / 'images' / 'course_map.png'
AFTER = {'70': '00', '71': '04', '72': '08', '75': '02', '76': '04', '79': '04', '80': '09', '90': '04'}   # the appendices
PARTS = [   # name, what it leads to, color, chapters
    ('By hand', 'from the chain rule to a loop that trains a net', '#0072b2', ['00', '01', '02', '03', '04']),
    ('A trainer', 'extend, watch, save and speed up a training run', '#009e73', ['05', '06', '07', '08', '09', '10']),
    ('Convnets', 'from one convolution to a ResNet', '#cc79a7', ['11', '12', '13', '14', '15', '16']),
    ('Scale', 'one run, many processes', '#56b4e9', ['17']),
    ('Appendices', 'optional, each after the chapter named', '#d55e00',
     [number for number in AFTER if any((root / 'nbs').glob(f'{number}_*.ipynb'))]),
]
TITLES = {'11': 'Convolutions', '12': 'Activations', '13': 'Initialization', '14': 'Normalization', '15': 'ResNet', '16': 'Augmentation',
          '17': 'Many processes'}   # of chapters that may be planned only: dashed
WIDTH, HEIGHT, GAP, ROW, LEFT = 1.38, 1., .27, 1.66, .4   # of a box, between boxes, from part to part, to the first box, in inches
IN_ROW, NEXT = 6, HEIGHT + .15   # boxes in a row, and from row to row of one part


def chapters():
    "Number -> `(title, module)`; the module is empty if the chapter has none, and None if it is planned"
    found = {number: (title, None) for number, title in TITLES.items()}
    for path in (root / 'nbs').glob('[0-9][0-9]_*.ipynb'):
        sources = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
        module = next((m[1] for s in sources if (m := re.search(r'#\|\s*default_exp\s+(\w+)', s))), '')
        found[path.name[:2]] = re.match(r'# \d\d (.+)', sources[0])[1], module
    return found


def main():
    found = chapters()
    more = max(0, len(PARTS[-1][-1]) - 1) // IN_ROW * NEXT   # the appendices, the last part, may take several rows
    width, height = LEFT + IN_ROW * (WIDTH + GAP) - GAP + .1, len(PARTS) * ROW + more + .05
    fig = Figure(figsize=(width, height), dpi=100)
    ax = fig.add_axes([0, 0, 1, 1], xlim=(0, width), ylim=(height, 0))
    ax.axis('off')
    arrow = dict(arrowstyle='-|>', color='#555555', lw=1.4, shrinkA=0, shrinkB=0)
    for i, (part, purpose, color, numbers) in enumerate(PARTS):
        top = i * ROW + .48
        middle, bottom = top + HEIGHT / 2, top + HEIGHT   # of the first row
        heading = ax.annotate(part, (LEFT, top - .14), color=color, fontsize=13, weight='bold')
        ax.annotate(f'   {purpose}', (1, 0), xycoords=heading, fontsize=11, color='#444444', va='bottom')
        for k, number in enumerate(numbers):
            x, y, (title, module) = LEFT + k % IN_ROW * (WIDTH + GAP), top + k // IN_ROW * NEXT, found[number]
            planned = module is None
            ax.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, boxstyle='round,pad=0,rounding_size=.08', ls='--' if planned else '-',
                                        lw=1.3, edgecolor=color, facecolor='white' if planned else color + '1a'))
            middle_x, label = x + WIDTH / 2, dict(ha='center', va='center', color='#666666' if planned else 'black')
            ax.text(middle_x, y + .16, number, fontsize=10, weight='bold', **label)
            ax.text(middle_x, y + .47, textwrap.fill(title, 15), fontsize=10, **label)
            note = [module and f'miniai.{module}', number in AFTER and f'after {AFTER[number]}']
            ax.text(middle_x, y + HEIGHT - .13, ', '.join(filter(None, note)), ha='center', va='center', fontsize=7.5, color='#444444')
            if k and part != 'Appendices': ax.annotate('', (x, middle), (x - GAP, middle), arrowprops=arrow)
        if part != 'Appendices' and i + 1 < len(PARTS) and PARTS[i + 1][0] != 'Appendices':   # on to the next row
            turn, last, side = bottom + .14, LEFT + (len(numbers) - .5) * (WIDTH + GAP) - GAP / 2, LEFT / 3
            ax.plot([last, last, side, side], [bottom, turn, turn, middle + ROW], color='#555555', lw=1.4)
            ax.annotate('', (LEFT, middle + ROW), (side, middle + ROW), arrowprops=arrow)
    target.parent.mkdir(exist_ok=True)
    fig.savefig(target, metadata={'Software': None})
    print(f'{target.name}: {target.stat().st_size / 1024:.0f} KB')


if __name__ == '__main__': main()

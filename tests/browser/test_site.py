"The site: every page in a headless Chromium, from file:// and over http."
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from chromium import chromium, need, player, plays, screenshot

root = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root / 'scripts'))
import site_stage  # noqa: E402

notebooks = site_stage.all_notebooks()
modules = [nb.module for nb in notebooks if nb.module]


def build(folder):
    command = ['sh', root / 'scripts/make_site.sh', folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'VENV': sys.prefix})


def page_of(nb): return nb.name.replace('.ipynb', '.html')


def finish(process):
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said


@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b


@pytest.fixture(scope='module')
def site(browser, tmp_path_factory):
    "`(the folder of the site, a second build that is under way)`; MINIAI_SITE names a site that was just built"
    need('npm', shutil.which('npm') or (Path(sys.prefix) / 'share').glob('mathjax-*'))
    folder = tmp_path_factory.mktemp('site')
    if given := os.environ.get('MINIAI_SITE'): first = Path(given).resolve()
    else:
        first = folder / 'first'
        finish(build(first))
    return first, folder / 'second', build(folder / 'second')


@pytest.fixture(scope='module')
def folder(site): return site[0]


look = """async () => {
    if (window.MathJax && MathJax.startup) await MathJax.startup.promise
    const article = document.querySelector('article'), copy = article.cloneNode(true)
    copy.querySelectorAll('pre, code, script, style, mjx-container, .sig').forEach(e => e.remove())
    const images = [...article.querySelectorAll('img')]
    images.forEach(i => i.loading = 'eager')
    await Promise.all(images.map(i => i.decode().catch(() => 0)))
    const drawn = e => e.querySelector('svg [data-c], svg path, svg text, svg rect')
    return {
        text: copy.innerText,
        width: Math.max(document.documentElement.scrollWidth, document.querySelector('.content').scrollWidth),   // .content scrolls
        formulas: [...article.querySelectorAll('mjx-container')].filter(drawn).length,
        wrong: article.querySelectorAll('mjx-merror, [data-mjx-error]').length,
        images: images.map(i => ({src: i.src.split('/').pop(), alt: i.alt, width: i.naturalWidth})),
        collapsed: article.querySelectorAll('details.hide').length,
        buttons: article.querySelectorAll('button.copybtn').length,
    }
}"""


@pytest.fixture(scope='module')
def pages(browser, folder):
    "What a phone of 390 pixels shows of each page, from file://, without a network"
    context = browser.new_context(viewport=dict(width=390, height=844), offline=True)
    requests, errors, found = [], [], {}
    context.on('request', lambda r: requests.append(r.url))
    for path in sorted(folder.rglob('*.html')):
        name = path.relative_to(folder).as_posix()
        page = context.new_page()
        page.on('pageerror', lambda e, name=name: errors.append(f'{name}: {e}'))
        page.on('requestfailed', lambda r, name=name: errors.append(f'{name}: {r.url} failed'))
        page.goto(path.as_uri())
        found[name] = page.evaluate(look)
        if name in seen: screenshot(page, f'{dashed(name)}_390')
        page.close()
    context.close()
    return found, requests, errors


lists = ('genindex.html', 'py-modindex.html', 'search.html')
seen = ('index.html', '03_cross_entropy.html', '08_callbacks.html', 'notation.html', 'api/losses.html', 'solutions/03_cross_entropy.html')


def dashed(name): return name.replace('/', '-').removesuffix('.html')


def prose_of(nb):
    "The prose of a notebook, without code, and the formulas that its cells print"
    parts = [site_stage.text(c['source']) for c in nb.cells if c['cell_type'] == 'markdown']
    parts += [site_stage.text(o['data']['text/latex']) for c in nb.cells for o in c.get('outputs', []) if 'text/latex' in o.get('data', {})]
    source = '\n\n'.join(parts)
    return re.sub(r'^ *```.*?^ *```|`[^`\n]+`', '', source, flags=re.M | re.S)


def test_every_notebook_and_module_has_a_page(pages):
    wanted = [page_of(nb) for nb in notebooks] + [f'api/{m}.html' for m in modules] + ['notation.html', 'api/index.html']
    assert sorted(pages[0]) == sorted([*wanted, *lists])


def test_no_request_leaves_the_machine(pages, folder):
    _, requests, errors = pages
    assert requests and [r for r in requests if not r.startswith((folder.as_uri(), 'data:'))] == []
    assert errors == []


def test_every_formula_is_a_picture(pages):
    found, *_ = pages
    sources = {page_of(nb): prose_of(nb) for nb in notebooks}
    sources['notation.html'] = re.sub(r'`[^`\n]+`', '', (root / 'docs/notation.md').read_text(encoding='utf-8'))
    wanted = {name: len(re.findall(r'\$\$.+?\$\$|\$[^$]+\$', s, re.S)) for name, s in sources.items()}
    assert {name: p['formulas'] for name, p in found.items() if p['formulas'] != wanted.get(name, 0)} == {}
    assert sum(wanted.values()) > 300 and not any(p['wrong'] for p in found.values())


def test_no_formula_is_left_as_source(pages):
    marks = re.compile(r'.{0,20}(?:\$|\\[a-zA-Z]+|\\\(|\{py:).{0,20}')
    assert {name: m[0] for name, p in pages[0].items() if (m := marks.search(p['text']))} == {}


def test_a_phone_need_not_scroll_sideways(pages): assert {name: p['width'] for name, p in pages[0].items() if p['width'] > 390} == {}


def test_every_figure_is_there_with_an_alt_text_of_its_own(pages):
    images = [(name, i) for name, p in pages[0].items() if name not in lists for i in p['images']]
    stored = sum(any(k.startswith('image/') for k in o.get('data', {})) for nb in notebooks for c in nb.cells for o in c.get('outputs', []))
    assert len(images) >= stored > 30 and [(n, i) for n, i in images if not i['width']] == []
    alts = [i['alt'] for _, i in images]
    assert [a for a in alts if len(a.split()) < 4 or re.search(r'\.(png|svg|jpe?g|gif)$|_images', a)] == []
    assert sorted({a for a in alts if alts.count(a) > 1}) == []


def test_checks_are_collapsed_and_code_can_be_copied(pages):
    for nb in notebooks:
        page = pages[0][page_of(nb)]
        meta = [c['metadata'] for c in nb.cells]
        hidden = [m for m in meta if 'hide-cell' in m.get('tags', []) or m.get('jupyter', {}).get('source_hidden')]
        assert page['collapsed'] == len(hidden), nb.name
        shown = [s for s in nb.code if site_stage.directive(s, 'hide') is None and re.sub(r'^#\s*\|.*\n?', '', s, flags=re.M).strip()]
        assert page['buttons'] >= len(shown), nb.name


def test_every_internal_link_resolves(folder):
    html = {p: p.read_text(encoding='utf-8') for p in folder.rglob('*.html')}
    ids = {p: set(re.findall(r'\bid="([^"]+)"', s)) for p, s in html.items()}
    broken, n = [], 0
    for page, source in html.items():
        for href in re.findall(r'<(?:a|link|img|script)\b[^>]*?\b(?:href|src)="([^"]+)"', source):
            url = urlparse(href)
            if url.scheme or url.netloc: continue
            n += 1
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            if target.is_dir(): target /= 'index.html'
            if not target.exists() or url.fragment and target in ids and unquote(url.fragment) not in ids[target]:
                broken.append(f'{page.relative_to(folder)}: {href}')
    assert n > 1000 and sorted(set(broken)) == []


def test_chapters_lead_on_and_back_and_out(folder):
    numbered = [nb for nb in notebooks if nb.number and '/' not in nb.name]
    for before, nb, after in zip([None, *numbered], numbered, [*numbered[1:], None]):
        html = (folder / page_of(nb)).read_text(encoding='utf-8')
        for which, other in ('prev', before), ('next', after):
            if other: assert f'rel="{which}" title="{other.title}" href="{other.name.replace(".ipynb", ".html")}"' in html
        where = f'{site_stage.cfg["user"]}/{site_stage.cfg["repo"]}/blob/{site_stage.cfg["branch"]}/nbs/{nb.name}'
        for link in f'https://github.com/{where}', f'https://colab.research.google.com/github/{where}', 'notation.html':
            assert f'href="{link}"' in html, f'{nb.name} has no link to {link}'


@pytest.mark.parametrize('module', modules)
def test_api(module, folder):
    m = import_module('miniai.' + module)
    html = (folder / 'api' / f'{module}.html').read_text(encoding='utf-8')
    chapter = next(nb for nb in notebooks if nb.module == module)
    for name in [n for n in m.__all__ if callable(getattr(m, n))]:
        assert f'id="miniai.{module}.{name}"' in html, name
        anchor = re.sub(r'[^a-z0-9]+', '-', f'built-{module}-{name}'.lower()).strip('-')
        assert f'href="../{chapter.name.replace(".ipynb", ".html")}#{anchor}"' in html, f'{name}: no link to where it is built'
    from fastcore.docments import docments
    for name in [n for n in m.__all__ if callable(getattr(m, n)) and not isinstance(getattr(m, n), type)]:
        for arg, said in docments(getattr(m, name), full=True).items():
            if arg != 'return' and said['docment']: assert f'<strong>{arg}</strong>' in html, f'{name}: {arg} is not described'


def search(browser, url, allowed):
    context, requests = browser.new_context(), []
    context.on('request', lambda r: requests.append(r.url))
    page = context.new_page()
    page.goto(f'{url}/search.html?q=logsumexp')
    page.wait_for_selector('#search-results li a', timeout=20_000)
    page.wait_for_function('document.querySelector(".search-summary")?.innerText.includes("matching")', timeout=20_000)
    hits = page.eval_on_selector_all('#search-results li a', 'all => all.map(a => a.getAttribute("href"))')
    excerpts = page.locator('#search-results p.context').count()
    context.close()
    assert [r for r in requests if not r.startswith(allowed)] == []
    assert any('03_cross_entropy.html' in h for h in hits) and any('api/losses.html' in h for h in hits), hits
    return excerpts


def test_search_from_a_file(browser, folder): search(browser, folder.as_uri(), 'file://')


def test_search_over_http(browser, folder):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): "Print nothing"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    try: assert search(browser, url, url) > 0, 'no excerpts below the hits'
    finally:
        server.shutdown()
        server.server_close()


def test_light_and_dark(browser, folder):
    colour = 'e => getComputedStyle(e).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(Number).reduce((a, b) => a + b)/765'
    for scheme in 'light', 'dark':
        context = browser.new_context(viewport=dict(width=1400, height=1000), color_scheme=scheme)
        page = context.new_page()
        for name in seen:
            page.goto((folder / name).as_uri())
            got = page.evaluate(look)
            assert got['width'] <= 1400
            ground = page.eval_on_selector('body', colour)
            assert ground > .9 if scheme == 'light' else ground < .2
            screenshot(page, f'{dashed(name)}_{scheme}')
            for image in page.query_selector_all('.cell_output img'): assert image.evaluate(colour) == 1, 'a figure without a white ground'
            if page.locator('.cell_output img').count():
                page.locator('.cell_output img').first.scroll_into_view_if_needed()
                screenshot(page, f'{dashed(name)}_figure_{scheme}')
        context.close()


@pytest.mark.parametrize('name', ['01_forward_backward', '02_module', '03_cross_entropy', '75_backward_player'])
@pytest.mark.parametrize('width', [390, 1280])
def test_the_player_steps_on_the_site(browser, folder, name, width):
    context = browser.new_context(viewport=dict(width=width, height=900), offline=True)
    page = context.new_page()
    page.goto((folder / f'{name}.html').as_uri())
    assert page.locator(player).count() > 0 and plays(page)
    screenshot(page, f'{name}_player_{width}')
    context.close()


def test_two_builds_are_identical(site):
    first, second, process = site
    finish(process)
    files = [{p.relative_to(f): p.read_bytes() for p in f.rglob('*') if p.is_file()} for f in (first, second)]
    assert sorted(files[0]) == sorted(files[1])
    assert [str(p) for p in files[0] if files[0][p] != files[1][p]] == []

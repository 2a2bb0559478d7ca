"Notebooks in the JupyterLab that readers use, run from first cell to last in a headless Chromium, on the sample."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
from chromium import chromium, player, plays, screenshot

root = Path(__file__).resolve().parents[2]
# MINIAI_LAB names others, such as "00 01 02"
wanted = os.environ.get('MINIAI_LAB', '03 07').split()
notebooks = sorted(p.name for p in (root / 'nbs').glob('*.ipynb') if p.name[:2] in wanted)


@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b


python3 = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
watched = """\
import time
from miniai.data import mnist
from miniai.learner import Callback, Learner
from miniai.losses import CrossEntropyLoss
from miniai.metrics import Accuracy, MetricsCB
from miniai.module import Linear, ReLU, Sequential
from miniai.progress import ProgressCB
from miniai.training import SGD, Dataset, get_dls

data = mnist(sample=True)
dls = get_dls(Dataset(*data.train), Dataset(*data.valid), bs=64)
model = Sequential(Linear(784, 50), ReLU(), Linear(50, 10))""", """\
class Slow(Callback):
    "A batch that takes a tenth of a second, as that of a larger net does"
    def after_batch(self, learn): time.sleep(.1)

learn = Learner(model, dls, CrossEntropyLoss(), SGD, lr=.1, cbs=[MetricsCB(Accuracy()), ProgressCB(), Slow()])
records = learn.fit(2)"""


@pytest.fixture(scope='module')
def lab(browser, tmp_path_factory):
    "The address of a JupyterLab with folders of its own, on a copy of the notebooks"
    folder = tmp_path_factory.mktemp('lab')
    shutil.copytree(root / 'nbs', folder / 'nbs')
    settings = folder / 'settings/@jupyterlab'
    for name, text in {'notebook-extension/tracker': '{"windowingMode": "none", "recordTiming": false}',
                       'apputils-extension/notification': '{"fetchNews": "false", "checkForUpdates": false}'}.items():
        path = settings / f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True)
        path.write_text(text)
    env = {k: v for k, v in os.environ.items() if k not in ('CI', 'MPLBACKEND', 'MINIAI_DATA')}   # as a reader has it
    env |= dict(OMP_NUM_THREADS='1', MINIAI_SAMPLE='1', PYTHONPATH=str(root), JUPYTERLAB_SETTINGS_DIR=str(folder / 'settings'))
    env['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{env["PATH"]}'
    for name in 'JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTERLAB_WORKSPACES_DIR', 'IPYTHONDIR':
        env[name] = str(folder / name)
    log = open(folder / 'log', 'w+')
    (folder / 'nbs/watched.ipynb').write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=python3, cells=[
        dict(cell_type='code', id=f'cell{i}', metadata={}, source=s, outputs=[], execution_count=None) for i, s in enumerate(watched)])))
    args = [sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--expose-app-in-browser', '--ip=127.0.0.1', '--allow-root',
            '--ServerApp.port_retries=50', '--IdentityProvider.token=', f'--ServerApp.root_dir={folder / "nbs"}']
    server = subprocess.Popen(args, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        stop, url = time.monotonic() + 60, None
        while not url and time.monotonic() < stop and server.poll() is None:
            time.sleep(0.2)
            if m := re.search(r'(http://127\.0\.0\.1:\d+)/lab', Path(log.name).read_text()):
                try: url = urlopen(m[1] + '/api').status == 200 and m[1]
                except OSError: pass
        assert url, Path(log.name).read_text()
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(15)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)
        log.close()


start = """async () => {
    const app = window.jupyterapp
    await app.restored
    window.panel = () => app.shell.currentWidget
    const until = async (what, ready) => {
        for (let i = 0; i < 600 && !ready(); i++) await new Promise(r => setTimeout(r, 100))
        if (!ready()) throw new Error('waited in vain for ' + what)
    }
    await until('the notebook', () => panel()?.content?.model && panel().sessionContext)
    await panel().context.ready
    await until('the kernel', () => panel().sessionContext.session?.kernel?.status === 'idle')
    await app.commands.execute('notebook:clear-all-cells-outputs').catch(() => 0)
    await app.commands.execute('notebook:clear-all-outputs').catch(() => 0)
    window.finished = false
    window.failure = ''
    app.commands.execute('notebook:run-all-cells').catch(e => { failure = String(e) }).finally(() => { finished = true })
}"""

model = """() => [...panel().content.model.cells].filter(c => c.type === 'code').map(c => ({
    source: c.sharedModel.getSource(), count: c.executionCount, outputs: c.outputs.toJSON()}))"""

display = """() => {   // the progress display of the last cell: table and bar, and the picture of the curve
    const outputs = [...panel().content.model.cells].at(-1).outputs.toJSON()
    const found = kind => [outputs.find(o => o.data?.[kind])?.data[kind] ?? ''].flat().join('')
    return {text: found('text/plain'), curve: found('image/png')}
}"""


@contextmanager
def opened(browser, lab, name):
    "A page with the notebook, which has begun to run all its cells"
    context = browser.new_context(viewport=dict(width=1300, height=900))
    page, requests = context.new_page(), []
    page.on('request', lambda r: requests.append(r.url))
    page.goto(f'{lab}/lab/tree/{name}?reset')   # without the notebooks of the test before
    page.wait_for_function('window.jupyterapp', timeout=60_000)
    page.evaluate(start)
    try: yield page
    finally:
        page.evaluate("jupyterapp.commands.execute('kernelmenu:shutdown').catch(() => 0)")
        context.close()
    assert [r for r in requests if not r.startswith((lab, 'data:', 'blob:', 'ws:' + lab[5:]))] == []


def wait(page, name, meanwhile=lambda: None):
    stop = time.monotonic() + 240
    while not page.evaluate('finished'):
        assert time.monotonic() < stop, f'{name} runs for more than 240 s'
        meanwhile()
        time.sleep(0.25)


def check(page):
    "Every cell ran, without an error and without a word on stderr; returns all outputs"
    cells = [c for c in page.evaluate(model) if c['source'].strip()]
    assert cells and page.evaluate('failure') == ''
    assert page.evaluate('panel().sessionContext.session.kernel.status') == 'idle'
    for c in cells:
        for o in c['outputs']:
            assert o['output_type'] != 'error', f'{o["ename"]}: {o["evalue"]}\n{c["source"]}'
            assert o.get('name') != 'stderr', f'on stderr: {o["text"]}\n{c["source"]}'
        assert c['count'], f'did not run:\n{c["source"]}'
    return [o for c in cells for o in c['outputs']]


@pytest.mark.parametrize('name', notebooks)
def test_runs_from_first_cell_to_last(browser, lab, name):
    with opened(browser, lab, name) as page:
        wait(page, name)
        screenshot(page, f'lab_{name[:2]}')
        assert any('image/png' in o.get('data', {}) for o in check(page)) or name.startswith(('70', '75', '80', 'index'))


def test_the_player_untrusted_and_trusted(browser, lab):
    "A notebook from someone else is untrusted: a still picture instead of the frame. Once it has run, the player steps"
    name = '75_backward_player.ipynb'
    context = browser.new_context(viewport=dict(width=1300, height=900))
    page = context.new_page()
    page.goto(f'{lab}/lab/tree/{name}?reset')
    picture = page.locator('.jp-OutputArea img[alt^="Values and gradients"]')
    picture.first.wait_for(timeout=60_000)
    picture.first.scroll_into_view_if_needed()
    assert page.locator(player).count() == 0
    assert picture.first.evaluate('i => i.decode().then(() => i.naturalWidth)') > 300 and picture.first.is_visible()
    screenshot(page, 'lab_player_untrusted')
    context.close()
    with opened(browser, lab, name) as page:
        wait(page, name)
        check(page)
        assert page.locator(player).count() > 0
        assert plays(page)
        screenshot(page, 'lab_player_trusted')


def test_the_progress_display_keeps_up(browser, lab):
    "Bar, table and curve follow a run of two epochs with batches of a tenth of a second"
    with opened(browser, lab, 'watched.ipynb') as page:
        seen, shot = [], []   # (epoch, batches done, picture); epochs with a screenshot
        def look():
            now = page.evaluate(display)
            if not (m := re.search(r'epoch (\d)/2: +\d+%\|.*?\| (\d+)/(\d+) \[', now['text'])): return
            seen.append((m[1], int(m[2]), now['curve']))
            if int(m[2]) > 30 and m[1] not in shot:
                shot.append(m[1])
                screenshot(page, f'lab_watched_{m[1]}')
        wait(page, 'watched.ipynb', look)
        screenshot(page, 'lab_watched_end')
        outputs = check(page)
        now = page.evaluate(display)
    assert {epoch for epoch, *_ in seen} == {'1', '2'}
    assert max(done for _, done, _ in seen) > 60
    pictures = {epoch: {curve for e, _, curve in seen if e == epoch and curve} for epoch in '12'}
    assert len(pictures['1']) >= 2 and len(pictures['2']) >= 2, f'the curve was drawn {[len(p) for p in pictures.values()]} times'
    assert '%|' not in now['text'] and len(now['text'].splitlines()) == 4 and now['curve'] not in pictures['1']
    assert len(outputs) == 2

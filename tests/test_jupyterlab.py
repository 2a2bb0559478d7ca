"Notebooks in the JupyterLab that readers use, run from first cell to last in a headless Chromium, on the sample."
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from browser import chromium, screenshot

root = Path(__file__).resolve().parents[1]
# MINIAI_LAB names others, such as "00 01 02"
wanted = os.environ.get('MINIAI_LAB', '03 08').split()
notebooks = sorted(p.name for p in (root / 'nbs').glob('*.ipynb') if p.name[:2] in wanted)
pytestmark = pytest.mark.browser


@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b


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
    args = [sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--expose-app-in-browser', '--ip=127.0.0.1', '--ServerApp.port_retries=50',
            '--IdentityProvider.token=', '--ServerApp.open_browser=False', '--allow-root', f'--ServerApp.root_dir={folder / "nbs"}']
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
    await panel().sessionContext.ready
    await until('the kernel', () => panel().sessionContext.session?.kernel?.status === 'idle')
    await app.commands.execute('notebook:clear-all-cells-outputs').catch(() => 0)
    await app.commands.execute('notebook:clear-all-outputs').catch(() => 0)
    window.finished = false
    window.failure = ''
    app.commands.execute('notebook:run-all-cells').catch(e => { failure = String(e) }).finally(() => { finished = true })
}"""

model = """() => [...panel().content.model.cells].filter(c => c.type === 'code').map(c => ({
    source: c.sharedModel.getSource(), count: c.executionCount, outputs: c.outputs.toJSON()}))"""

progress = """() => {   // what the display shows now: batches done, and batches on the horizontal axis of the curve
    for (const c of panel().content.model.cells) for (const o of c.type === 'code' ? c.outputs.toJSON() : []) {
        const html = [o.data?.['text/html'] ?? ''].flat().join('')
        if (html.includes('<progress')) return html
    }
    return ''
}"""


@pytest.mark.parametrize('name', notebooks)
def test_runs_from_first_cell_to_last(browser, lab, name):
    context = browser.new_context(viewport=dict(width=1300, height=900))
    page, requests = context.new_page(), []
    page.on('request', lambda r: requests.append(r.url))
    page.goto(f'{lab}/lab/tree/{name}')
    page.wait_for_function('window.jupyterapp', timeout=60_000)
    page.evaluate(start)
    stages, stop = 0, time.monotonic() + 280
    while not page.evaluate('finished'):
        assert time.monotonic() < stop, f'{name} runs for more than 280 s'
        if stages < 2 and page.evaluate(progress):   # the bar and the curve of a run, while it runs
            stages += 1
            page.evaluate("document.querySelector('progress')?.scrollIntoView({block: 'center'})")
            screenshot(page, f'lab_{name[:2]}_{stages}')
        time.sleep(0.5)
    cells = [c for c in page.evaluate(model) if c['source'].strip()]
    screenshot(page, f'lab_{name[:2]}_end')
    assert cells and page.evaluate('failure') == ''
    assert page.evaluate('panel().sessionContext.session.kernel.status') == 'idle'
    for c in cells:
        for o in c['outputs']:
            assert o['output_type'] != 'error', f'{o["ename"]}: {o["evalue"]}\n{c["source"]}'
            assert o.get('name') != 'stderr', f'on stderr: {o["text"]}\n{c["source"]}'
        assert c['count'], f'did not run:\n{c["source"]}'
    assert any('image/png' in o.get('data', {}) for c in cells for o in c['outputs'])
    assert [r for r in requests if not r.startswith((lab, 'data:', 'blob:', 'ws:' + lab[5:]))] == []
    page.evaluate("jupyterapp.commands.execute('kernelmenu:shutdown').catch(() => 0)")
    context.close()

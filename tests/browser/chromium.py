"""A headless Chromium for the tests in this folder, which `scripts/run_tests.py --browser` runs.

Without playwright or a Chromium these tests are skipped, and named as skipped; with MINIAI_BROWSER=1, as in .ci/run, they fail."""
import os
import shutil
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

shots = os.environ.get('MINIAI_SHOTS')   # a folder for screenshots, to be looked at
places = ('chromium', 'chromium-browser', 'google-chrome', '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome')


def need(what, there):
    if there: return
    message = f'{what} is missing: install it (.ci/run installs Debian\'s `chromium` and `npm`), or run without `--browser`'
    (pytest.fail if os.environ.get('MINIAI_BROWSER') == '1' else pytest.skip)(message)


@contextmanager
def chromium():
    "A Chromium with a fresh profile, which asks nothing of the network by itself"
    try: sync_api = import_module('playwright.sync_api')
    except ImportError: need('the package playwright', False)
    path = next((p for p in map(shutil.which, places) if p), None)
    need('Chromium', path)
    args = ['--disable-background-networking', '--disable-component-update', '--no-first-run']
    if os.getuid() == 0: args.append('--no-sandbox')
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=args)
        try: yield browser
        finally: browser.close()


def screenshot(page, name):
    if not shots: return
    Path(shots).mkdir(parents=True, exist_ok=True)
    page.screenshot(path=Path(shots) / f'{name}.png')

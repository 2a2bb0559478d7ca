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


player = 'iframe[title^="A backward pass"]'


def plays(page):
    "The first player on a page steps forward and back by keyboard; the title of its first backward step"
    frame = page.locator(player).first
    frame.scroll_into_view_if_needed()
    inside = frame.content_frame
    position = inside.locator('input[type=range]')
    position.wait_for(timeout=20_000)
    inside.locator('h1').click()
    last = int(position.get_attribute('max'))
    for key, at in (('ArrowRight', 1), ('End', last), ('ArrowLeft', last - 1), ('Home', 0)):
        page.keyboard.press(key)
        assert int(position.input_value()) == at, f'{key} leads to step {position.input_value()}'
    for _ in range(last):
        page.keyboard.press('ArrowRight')
        if (title := inside.locator('h1').inner_text()).startswith('Backward'): return title

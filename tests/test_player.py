"The backward-pass player: its numbers are autograd's, its file is small and closed, and it works in a browser without a mouse."
# ruff: noqa: E501, I001 (JavaScript in strings, lists of cases)
import base64
import html
import json
import os
import re
import shutil
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import nn, tensor
from torch.testing import assert_close

from miniai import player
from miniai.losses import CrossEntropyLoss
from miniai.module import Flatten, Linear, Module, MSELoss, ReLU, Residual, Sequential
from miniai.player import RULES, play, record


def normal(*shape, seed=0, **kwargs): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **kwargs)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make()


def two_layers(): return Sequential(Linear(3, 4), ReLU(), Linear(4, 2)), MSELoss(), normal(2, 3), normal(2, 2, seed=1)
def residual():
    return (Sequential(Linear(3, 3), Residual(Sequential(Linear(3, 3), ReLU())), Linear(3, 2, bias=False)), CrossEntropyLoss(), normal(2, 3),
            tensor([0, 1]))
def from_x(): return Residual(Linear(3, 3)), MSELoss(reduction='sum'), normal(4, 3), normal(4, 3, seed=1)
def one_example(): return Sequential(Flatten(), Linear(4, 1)), MSELoss(), normal(1, 2, 2), normal(1, 1, seed=1)
def frozen():
    net = Sequential(Linear(2, 2), ReLU(), Linear(2, 2))
    net[0].weight.requires_grad_(False)
    return net, CrossEntropyLoss(reduction='sum'), normal(2, 2), tensor([1, 1])
def shared():
    lin = Linear(2, 2)
    return Sequential(lin, ReLU(), lin), MSELoss(), normal(3, 2), normal(3, 2, seed=1)
def double(): return Sequential(Linear(3, 2), ReLU()).double(), MSELoss(), normal(2, 3).double(), normal(2, 2, seed=1).double()
def twins(): return nn.Sequential(nn.Linear(3, 2), nn.Sigmoid()), F.cross_entropy, normal(2, 3), tensor([0, 1])


def by_hand():   # no layer of ours: broadcasting, a constant factor, a product of a value with itself
    scale = normal(3, seed=2)
    return Linear(3, 3), lambda out, y: ((out * scale + out)**2 * out.sum(0) / 7 - y).mean(), normal(2, 3), normal(2, 3, seed=1)


NETS = [two_layers, residual, from_x, one_example, frozen, shared, double, twins]
nets = pytest.mark.parametrize('net', NETS, ids=lambda f: f.__name__)


@nets
def test_gradients_of_leaves_equal_autograd(net):
    model, loss_func, x, y = seeded(net)
    got = record(model, loss_func, x, y)
    assert all(p.grad is None for p in model.parameters()), 'record must not touch .grad'
    x = x.clone().requires_grad_()
    loss = loss_func(model(x), y)
    loss.backward()
    names = {**{name: p for name, p in zip(player.parameter_names(model).values(), model.parameters())}, 'x': x}
    leaves = {q.name: q for q in got.leaves}
    for name, p in names.items():
        assert_close(leaves[name].value, p.detach(), rtol=0, atol=0)
        if p.requires_grad: assert_close(leaves[name].grad, p.grad, rtol=0, atol=0)
        else: assert leaves[name].grad is None and leaves[name].kind == 'constant'
    assert_close(got.ops[-1].out.value, loss.detach(), rtol=0, atol=0)
    assert got.ops[-1].out.grad == 1 and got.ops[-1].out.name == 'loss' and 'out' in [op.out.name for op in got.ops]


@nets
def test_what_arrives_adds_up_and_what_is_sent_arrives(net):
    got = record(*seeded(net))
    quantities = [*got.leaves, *(op.out for op in got.ops)]
    for q in quantities:
        if q.arrived: assert_close(q.grad, sum(g for _, g in q.arrived))
    sent = sum(g is not None for op in got.ops for g in op.outgoing)
    assert sent == sum(len(q.arrived) for q in quantities)
    for i, op in enumerate(got.backward):   # gradients come from operations that were visited before
        assert all(source in got.backward[:i] for source, _ in op.out.arrived)
    assert sorted(map(id, got.backward)) == sorted(map(id, got.ops)) and got.backward[0] is got.ops[-1]


def test_values_in_between_equal_retained_ones():
    model, loss_func, x, y = seeded(residual)
    got = {op.out.name: op.out for op in record(model, loss_func, x, y).ops}
    h1 = model[0](x); h2 = model[1].layer[0](h1); h3 = model[1].layer[1](h2); h4 = h1 + h3; out = model[2](h4)
    for h in (h1, h2, h3, h4, out): h.retain_grad()
    loss_func(out, y).backward()
    for name, h in dict(h1=h1, h2=h2, h3=h3, h4=h4, out=out).items():
        assert_close(got[name].value, h.detach(), rtol=0, atol=0)
        assert_close(got[name].grad, h.grad, rtol=0, atol=0)
    assert [source.label() for source, _ in got['h1'].arrived] == ['Add (h4)', 'Linear (h2)']


def page_data(p): return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', p.html, re.S)[1])


def test_page_holds_these_numbers():
    model, loss_func, x, y = seeded(residual)
    p = play(model, loss_func, x, y)
    loss_func(model(x), y).backward()
    tensors = {t['name']: t for t in page_data(p)['tensors']}
    for name, q in zip(('w1', 'b1', 'w2', 'b2', 'w3'), model.parameters()):
        for key, want in ((name, q.detach()), (f'∂L/∂{name}', q.grad)):
            assert tensors[key]['shape'].replace('\xa0', ' ') == str(tuple(want.shape))
            assert tensor(tensors[key]['rows']).reshape(want.shape).tolist() == want.tolist(), 'all nine digits'
    (step,) = [s for s in page_data(p)['steps'] if s['title'] == 'Linear sends gradients to x, w1 and b1']
    a, plus, b, equals, total = step['rows'][0]['items']
    rows = [tensor(page_data(p)['tensors'][i]['rows']) for i in (a, b, total)]
    assert (plus, equals) == ('+', '=') and torch.allclose(rows[0] + rows[1], rows[2])


def test_a_leaf_that_is_used_twice_has_a_step_of_its_own():
    for net, name in ((from_x, 'x'), (shared, 'w1')):
        titles = [s['title'] for s in page_data(play(*seeded(net)))['steps']]
        assert titles.count(f'The gradients at {name} are added') == 1
    assert not [s for s in page_data(play(*seeded(residual)))['steps'] if 'are added' in s['title']]


def test_what_the_steps_say():
    steps = page_data(play(*seeded(residual)))['steps']
    say = {s['title']: s['say'] for s in steps}
    assert say['The backward pass starts with 1'].startswith('L is the loss.')
    assert say['CrossEntropyLoss sends gradients to out'].endswith('y is given and stays as it is: it gets no gradient.')
    assert say['Linear sends gradients to x, w1 and b1'].startswith('h1 is used twice; its effects on the loss add up.')
    (last,) = [s for s in steps if s['title'] == 'Linear sends gradients to x, w1 and b1']
    assert [r['note'] for r in last['rows'][1:]] == ['Every column of h1 uses x: each number is a sum over columns.',
        'Every example uses w1: each number is a sum over the examples.', 'Every example uses b1: each number is a sum over the examples.']
    tensors = page_data(play(*seeded(residual)))['tensors']
    assert [t['name'] for t in tensors if t.get('plain')] == ['y'], 'labels have no colour'
    names = {tensors[i]['name'] for r in last['rows'] for i in r['items'] if isinstance(i, int)}
    assert {'grad', 'grad.T', 'local derivative w1', 'local derivative x'} <= names


@pytest.mark.parametrize('text,want', [('x @ y.T + z', ['x', '@', 'y.T', '+', 'z']), ('grad.T @ x', ['grad.T', '@', 'x']), ('(grad * y).sum(0)', ['grad', '*', 'y', '.sum(0)']),
                                       ('grad.sum(0)', ['grad', '.sum(0)']), ('grad * (2*x)', ['grad', '*', '2 * x']), ('x - y', ['x - y']), ('x.sum()', ['x.sum()']), ('grad', ['grad'])])
def test_pieces(text, want): assert player.pieces(text) == want


def test_numbers_without_a_json_form_are_written_as_text():
    p = play(Sequential(Linear(2, 2), ReLU()), lambda out, y: (out / 0).sum(), normal(1, 2), tensor(0))
    assert {v for t in page_data(p)['tensors'] for row in t['rows'] for v in row if isinstance(v, str)} & {'inf', 'nan'}
    assert 'NaN' not in re.search(r'id="data">(.*?)</script>', p.html)[1]


# ---- formulas

w = normal(3, 3, seed=5, requires_grad=True)
v = normal(3, seed=6, requires_grad=True)
KINDS = {
    'Linear': lambda x: Linear(3, 2)(x), 'ReLU': lambda x: ReLU()(x), 'Relu': torch.relu, 'ClampMin': lambda x: x.clamp_min(0),
    'MSELoss': lambda x: MSELoss()(x, x.detach() + 1), 'MseLoss': lambda x: F.mse_loss(x, x.detach() + 1),
    'CrossEntropyLoss': lambda x: CrossEntropyLoss()(x, tensor([0, 2])), 'NllLoss': lambda x: F.cross_entropy(x, tensor([0, 2])),
    'LogSoftmax': lambda x: x.log_softmax(-1), 'Flatten': lambda x: Flatten()(x.reshape(2, 3, 1)), 'Add': lambda x: x + v, 'Sub': lambda x: x - v,
    'Mul': lambda x: x * v, 'Div': lambda x: v / x, 'Pow': lambda x: x**3, 'Matmul': lambda x: x @ w, 'Addmm': lambda x: F.linear(x, w, v),
    'Mean': lambda x: x.mean(), 'Sum': lambda x: x.sum(), 'Neg': lambda x: -x, 'Rsub': lambda x: 2 - x, 'Exp': torch.exp,
    'Log': lambda x: x.abs().log(), 'Sigmoid': torch.sigmoid, 'Tanh': torch.tanh, 'T': lambda x: x.T,
}


@pytest.mark.parametrize('kind', KINDS)
def test_formula_fits(kind):
    "Value, gradient and local derivative of each rule; a weighted loss makes every incoming gradient different"
    got = record(KINDS[kind], lambda out, y: (out * normal(*out.shape, seed=9)).sum(), normal(2, 3), tensor(0), w=w, v=v)
    (op,) = [op for op in got.ops if op.kind == kind][:1]
    assert not re.fullmatch(r'\w+\(\w+(, [\w.-]+)*\)', player.value_formula(op)) or kind in ('Relu', 'ReLU', 'ClampMin', 'Sigmoid', 'Tanh')
    for i, g in enumerate(op.outgoing):
        if g is None: continue
        text = player.gradient_formula(op, i)
        assert re.search(r'\bgrad\b', text) and 'rule' not in text and 'bwd' not in text and 'shape of' not in text, text
        found = player.pieces(player.gradient_text(op, i))
        assert len(found) > 1 or text in ('grad', 'grad.T', 'grad.reshape_as(x)', 'grad.reshape_as(h1)') or kind == 'LogSoftmax', 'the local derivative stands by itself'
        assert all(player.formula(p, op) for p in found if p not in ('@', '*', '+', '.sum(0)'))


def test_every_rule_is_tested(): assert set(KINDS) == set(RULES)


def test_variants_of_a_rule():
    labels = tensor([0, 2])
    def texts(model, loss_func, y=labels):
        op = record(model, loss_func, normal(2, 3), y).ops[-1]
        return player.value_formula(op), player.gradient_formula(op, 0)
    assert texts(lambda x: x + 0, MSELoss('sum'), normal(2, 3, seed=1)) == ('((out - y)**2).sum()', 'grad * (2*(out - y))')
    assert texts(lambda x: x + 0, CrossEntropyLoss('sum'))[1] == 'grad * (softmax(out) - one_hot(y))'
    assert texts(lambda x: x + 0, CrossEntropyLoss())[1] == 'grad * ((softmax(out) - one_hot(y)) / 2)'
    smooth = texts(lambda x: x + 0, CrossEntropyLoss(label_smoothing=.1))
    assert 'one_hot' not in ''.join(smooth) and smooth[1] == 'bwd of this layer', 'no formula fits, so none is shown'


def test_a_wrong_bwd_gets_no_formula():
    class Wrong(Linear):
        def bwd(self, grad, out, x, weight, bias): return grad @ weight, 2 * grad.T @ x, grad.sum(0)
    Wrong.__name__ = 'Linear'
    model, loss_func, x, y = seeded(two_layers)
    op = record(Sequential(Wrong(3, 2)), loss_func, x, y).ops[0]
    assert [player.gradient_formula(op, i) for i in range(3)] == ['grad @ w1', 'bwd of this layer', 'grad.sum(0)']


def test_selected_places_and_unknown_operations():
    got = record(lambda x: x[:, 1:].cumsum(1)[:, 1], lambda out, y: out.sum(), normal(2, 3), tensor(0))
    texts = [player.value_formula(op) for op in got.ops]
    assert 'x[:, 1:]' in texts and 'h2[:, 1]' in texts and 'cumsum(h1, 1)' in texts
    assert player.gradient_formula(got.ops[1], 0) == 'rule of autograd for Cumsum'


# ---- what is refused, what is left behind

@pytest.mark.parametrize('model,loss_func,x,y,says', [
    (Linear(2, 2), MSELoss(), torch.ones(5, 2), torch.zeros(5, 2), 'x has 5 examples; use 1 to 4'),
    (Linear(2, 2), lambda out, y: out.sum(), torch.ones(0, 2), torch.zeros(0), 'x has 0 examples'),
    (Linear(9, 2), MSELoss(), torch.ones(2, 9), torch.zeros(2, 2), r'x has shape \(2, 9\); at most 6 by 6'),
    (Sequential(Linear(2, 9), Linear(9, 1)), MSELoss(), torch.ones(2, 2), torch.zeros(2, 1), r'w1 has shape \(9, 2\)'),
    (Linear(2, 2), lambda out, y: out, torch.ones(2, 2), None, r'the loss has shape \(2, 2\)'),
    (Linear(2, 2), lambda out, y: out.sum().detach(), torch.ones(2, 2), None, 'requires_grad=False'),
    (lambda x: x.unbind(1)[1], lambda out, y: out.sum(), torch.ones(2, 2), None, 'UnbindBackward0 has several outputs'),
])
def test_errors_name_the_rule(model, loss_func, x, y, says):
    with pytest.raises(ValueError, match='play: .*' + says): play(model, loss_func, x, y)


def test_names_of_results_are_taken():
    with pytest.raises(ValueError, match=r"names \['h1'\] are taken"):
        play(lambda x: x @ w, lambda out, y: out.sum(), normal(2, 3), tensor(0), h1=w)


def test_nothing_is_left_behind():
    model, loss_func, x, y = seeded(two_layers)
    before = x.clone()
    with player.Calls() as calls: model(x)
    n = len(calls.of)
    play(model, loss_func, x, y)
    model(x)
    with pytest.raises(ZeroDivisionError): record(lambda x: 1 / 0, loss_func, x, y)
    model(x)
    assert n == len(calls.of) and not x.requires_grad and torch.equal(x, before)
    with torch.no_grad(): play(model, loss_func, x, y)


# ---- the file

def largest(): return Sequential(Linear(6, 6), ReLU(), Residual(Linear(6, 6)), Linear(6, 6)), CrossEntropyLoss(), normal(4, 6) / 900, tensor([0, 1, 2, 5])


@pytest.mark.parametrize('net', [*NETS, largest], ids=lambda f: f.__name__)
def test_one_small_closed_file(net, tmp_path):
    p = seeded(lambda: play(*net()))
    p.save(tmp_path / 'a.html')
    text = (tmp_path / 'a.html').read_text(encoding='utf-8')
    assert text == p.html and (tmp_path / 'a.html').stat().st_size <= 60_000
    assert not re.search(r'://|url\((?!#)|@import|<link|\bsrc=|\bfetch\(|\bimport\(', text)
    first = text[:text.index('<script')]
    assert '<svg' in first and all(name in first for name in ('data-n="x"', 'data-n="loss"')), 'step 0 needs no script'
    assert seeded(lambda: play(*net())).html == text, 'the same pass gives the same file'


def test_a_file_that_would_be_too_large(tmp_path):
    def many(x):
        for _ in range(40): x = (x * 1.1).tanh() + x
        return x
    p = play(many, lambda out, y: out.sum(), normal(4, 6), tensor(0))
    with pytest.raises(ValueError, match=r'at most 60000'): p.save(tmp_path / 'a.html')
    assert not (tmp_path / 'a.html').exists()


def test_names_cannot_break_the_page():
    class Evil(Module):
        def forward(self, x): return x * 1
    Evil.__name__ = '</script><b>'
    Evil.bwd = lambda self, grad, out, x: grad
    Evil2 = type('</script><b>', (Module,), dict(forward=lambda self, x: x * 1, bwd=lambda self, grad, out, x: grad * 1))
    p = play(Evil2(), lambda out, y: out.sum(), normal(1, 2), tensor(0))
    assert '</script><b>' not in p.html and p.html.count('</script>') == 2


def test_the_notebook_output_has_a_frame_and_a_still_picture():
    p = seeded(lambda: play(*residual()))
    out = p._repr_html_()
    frame = re.search(r'<iframe sandbox="allow-scripts" title="[^"]+" style="[^"]+" srcdoc="([^"]*)"', out)
    assert html.unescape(frame[1]) == p.html
    still = base64.b64decode(re.search(r'<img [^>]*src="data:image/svg\+xml;base64,([^"]+)"', out)[1]).decode()
    texts = [t.text for t in ElementTree.fromstring(still).iter('{http://www.w3.org/2000/svg}text')]
    for q in [*p.recorded.leaves, *(op.out for op in p.recorded.ops)]:
        numbers = [*q.value.flatten().tolist(), *([] if q.grad is None else q.grad.flatten().tolist())]
        assert set(map(player.number_text, numbers)) <= set(texts), q.name
    assert repr(p) == 'Player: a backward pass of 6 operations'


@pytest.mark.parametrize('v,text', [(0., '0'), (-0., '0'), (1., '1'), (-12.345, '−12.3'), (.00123456, '0.00123'), (-1.26e-7, '−1.26e−7'),
                                    (123456., '1.23e5'), (-12345., '−12345'), (-7.69e-4, '−7.69e−4'), (.14, '0.140'), (.0100001, '0.0100'), (9.5e-4, '9.50e−4'), (123.4, '123'), (1234.5, '1.23e3'), (12., '12'), (float('inf'), 'inf'), (float('nan'), 'nan')])
def test_number_text(v, text): assert player.number_text(v) == text


# ---- in the browser

chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='module')
def browser():
    try: from playwright.sync_api import sync_playwright
    except ImportError: sync_playwright = None
    if not chromium or sync_playwright is None:
        missing = 'the browser tests need Chromium and the package playwright'
        if os.environ.get('CI') == 'true': pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as pw:
        b = pw.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-background-networking'])
        yield b
        b.close()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('players')
    for net in (residual, shared, from_x, twins, by_hand, largest): seeded(lambda net=net: play(*net())).save(folder / f'{net.__name__}.html')
    return folder


@pytest.fixture
def open_page(browser, files):
    "Open a player; at the end there was no error and no request but the file itself"
    contexts, errors, requests = [], [], []
    def go(name='residual', **options):
        contexts.append(browser.new_context(**{'viewport': dict(width=1000, height=700), **options}))
        page = contexts[-1].new_page()
        page.on('pageerror', lambda e: errors.append(str(e)))
        page.on('console', lambda m: errors.append(m.text))
        page.on('request', lambda r: requests.append(r.url))
        page.goto((files / f'{name}.html').as_uri())
        return page
    yield go
    for c in contexts: c.close()
    assert errors == [] and [r for r in requests if not r.startswith('file://')] == []


def state(page): return page.evaluate('''() => ({at: +document.querySelector('input').value, title: document.querySelector('h1').lastChild.textContent,
    live: document.querySelector('#live').textContent, tables: document.querySelectorAll('table').length, said: document.querySelector('output').textContent})''')


def test_every_step_by_keyboard(open_page):
    page, p = open_page(), seeded(lambda: play(*residual()))
    steps = page_data(p)['steps']
    for i, step in enumerate(steps):
        s = state(page)
        assert (s['at'], s['title'], s['said']) == (i, step['title'], f'{i} of {len(steps) - 1}') and step['say'] in s['live']
        assert s['tables'] == sum(isinstance(item, int) for row in step['rows'] for item in row['items'])
        page.keyboard.press('ArrowRight')
    assert state(page)['at'] == len(steps) - 1, 'the last step has no next one'
    for key, at in (('Home', 0), ('ArrowLeft', 0), ('End', len(steps) - 1), ('ArrowLeft', len(steps) - 2)):
        page.keyboard.press(key)
        assert state(page)['at'] == at
    page.locator('input').focus()
    for key, at in (('Home', 0), ('ArrowRight', 1), ('ArrowUp', 0), ('ArrowDown', 1)):
        page.keyboard.press(key)
        assert state(page)['at'] == at, f'{key} on the slider moves one step'


def test_numbers_on_the_page_are_those_of_the_still_picture(open_page):
    "The script and Python write a number alike"
    page = open_page('residual')
    values = [0, 1, -12.345, .00123456, 1e-4, -1.26e-7, 123.456, -5, .1, 1e-3, 999, 1e-12, 1000, -12345, 999.6, 1e5, .00099999, 1234.5, -0.000769, 2.5e20]
    assert page.evaluate('values => values.map(numberText)', values) == list(map(player.number_text, values))


every_sum = '''() => [...document.querySelectorAll('td[tabindex]')].map(td => {
    td.focus()
    const line = td.closest('.row').nextSibling
    return [line.className, line.textContent, td.textContent, td.closest('.row').querySelectorAll('.used').length, document.querySelector('#live').textContent] })'''


@pytest.mark.parametrize('name', ['residual', 'shared', 'from_x', 'twins', 'by_hand', 'largest'])
def test_each_number_shows_the_sum_it_comes_from(open_page, name):
    page, seen, signs = open_page(name), 0, set()
    for step in range(int(page.locator('input').get_attribute('max')) + 1):
        for kind, line, number, used, live in page.evaluate(every_sum):
            place, _, rest = line.partition(': ')
            terms, _, total = rest.replace('−', '-').replace('·', '*').rpartition(' = ')
            sizes = [abs(eval(term)) for term in terms.split(' + ')]
            assert kind == 'how' and live == line and re.fullmatch(r'Row \d, column \d', place) and number.replace('−', '-') == total
            assert abs(eval(terms) - float(total)) <= .012*(sum(sizes) + abs(float(total))), (step, line)
            assert used <= 1 + terms.count('*') + len(sizes), 'what is marked is what is written'
            signs |= {sign for sign in ('*', ' + ') if sign in terms}
            seen += 1
        page.keyboard.press('ArrowRight')
    assert seen > 20 and signs == {'*', ' + '}


def test_the_sum_of_products_by_hand_and_by_keyboard(open_page):
    page, (op, *_) = open_page(), record(*seeded(residual)).ops
    page.locator('input').fill('13')
    x, grad = op.ins[0].value, op.out.grad.T
    row = page.locator('.row').nth(2)
    row.locator('table').nth(2).locator('td').nth(5).click()                 # row 2, column 3
    factor = lambda v: f'({n})' if (n := player.number_text(v))[0] == '−' else n   # noqa: E731
    want = ' + '.join(f'{factor(g)}·{factor(v)}' for g, v in zip(grad[1].tolist(), x[:, 2].tolist()))
    line = row.locator('xpath=following-sibling::p').first
    assert line.text_content() == f'Row 2, column 3: {want} = {player.number_text((grad @ x)[1, 2].item())}' and row.locator('.used').count() == 5
    page.keyboard.press('ArrowUp')
    assert line.text_content().startswith('Row 2, column 2: ')
    for _ in range(9): page.keyboard.press('ArrowDown')
    assert line.text_content().startswith('Row 3, column 3: ') and 'Row 3, column 3' in page.locator('#live').text_content()
    page.keyboard.press('ArrowRight')
    assert state(page)['at'] == 14, 'left and right still step'


def test_mouse_and_slider(open_page):
    page = open_page()
    for name, at in (('Step forward', 1), ('Last step', 14), ('Step back', 13), ('First step', 0)):
        page.get_by_role('button', name=name).click()
        assert state(page)['at'] == at
    assert page.get_by_role('button', name='First step').is_disabled() and page.get_by_role('button', name='Step back').is_disabled()
    page.locator('input').fill('7')
    assert state(page)['title'] == 'The backward pass starts with 1'


def test_space_plays_and_reduced_motion_steps(open_page):
    page = open_page()
    page.keyboard.press('Space')
    page.get_by_role('button', name='Pause').wait_for()
    page.keyboard.press('Space')
    page.get_by_role('button', name='Play').wait_for()
    assert state(page)['at'] == 0
    calm = open_page(reduced_motion='reduce')
    calm.keyboard.press('Space')
    assert state(calm)['at'] == 1 and calm.get_by_role('button', name='Play').count() == 1
    assert calm.evaluate("getComputedStyle(document.querySelector('.graph rect')).transitionDuration") == '0s'


def test_accessibility_tree_at_three_steps(open_page):
    page = open_page()
    tree = page.locator('body').aria_snapshot()
    assert 'group "A forward and a backward pass, step by step"' in tree and 'slider "Step": "0"' in tree.replace("step 0 of 14, Start: What goes in", '0')
    assert 'img "Graph of 6 operations: Linear to h1' in tree and 'heading "Start What goes in" [level=1]' in tree
    assert 'table "w1 (3, 3)"' in tree.replace('\xa0', ' ')
    page.keyboard.press('ArrowRight')
    tree = page.locator('body').aria_snapshot().replace('\xa0', ' ')
    assert 'heading "h1 = x @ w1.T + b1" [level=2]' in tree and 'table "h1 (2, 3)"' in tree and 'Linear takes x, w1 and b1 and computes h1' in tree
    page.keyboard.press('End')
    page.keyboard.press('ArrowLeft')
    tree = page.locator('body').aria_snapshot().replace('\xa0', ' ')
    for text in ('table "from Add (h4) (2, 3)"', 'table "from Linear (h2) (2, 3)"', 'table "∂L/∂h1 (2, 3)"', 'heading "∂L/∂w1 = grad.T @ x"',
                 'h1 is used twice; its effects on the loss add up. So the gradients from Add (h4) and Linear (h2) are added'): assert text in tree
    grad = record(*seeded(residual)).ops[0].out.grad
    row = 'row "' + ' '.join(map(player.number_text, grad[0].tolist())) + '"'
    assert row in tree and page.locator('#live').get_attribute('aria-live') == 'polite'
    assert page.locator('input').get_attribute('aria-valuetext') == 'step 13 of 14, Backward pass: Linear sends gradients to x, w1 and b1'


fits = '''() => {
  const out = [], inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1
  for (const g of document.querySelectorAll('.graph g')) for (const t of g.querySelectorAll('text'))
    if (!inside(t.getBoundingClientRect(), g.querySelector('rect').getBoundingClientRect())) out.push('box ' + t.textContent)
  const view = document.querySelector('.graph svg').getBoundingClientRect()
  for (const r of document.querySelectorAll('.graph rect, .graph path.edge'))
    if (!inside(r.getBoundingClientRect(), view)) out.push('graph ' + r.parentNode.textContent)
  const all = [...document.querySelectorAll('.graph g')].map(g => g.querySelector('rect').getBoundingClientRect())
  all.forEach((a, i) => all.slice(i + 1).forEach(b => { if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) out.push('overlap') }))
  for (const e of document.querySelectorAll('td, h1, h2, p, figcaption, button, output'))
    if (e.scrollWidth > e.clientWidth + 1 && e.clientWidth || e.getBoundingClientRect().right > innerWidth) out.push(e.tagName + ' ' + e.textContent)
  if (document.documentElement.scrollWidth > innerWidth) out.push('page is wider than the window')
  return out }'''


@pytest.mark.parametrize('width', [390, 1000])
@pytest.mark.parametrize('name', ['residual', 'shared', 'from_x', 'twins', 'largest'])
def test_nothing_is_cut_off(open_page, name, width):
    page = open_page(name, viewport=dict(width=width, height=800))
    last = int(page.locator('input').get_attribute('max'))
    for i in range(last + 1):
        assert page.evaluate(fits) == [], f'step {i}'
        page.keyboard.press('ArrowRight')


contrasts = '''() => {
  const ctx = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
  const paint = colors => { for (const c of colors) { ctx.fillStyle = c; ctx.fillRect(0, 0, 1, 1) } return [...ctx.getImageData(0, 0, 1, 1).data].slice(0, 3) }
  const light = c => c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0)
  const page = getComputedStyle(document.body).backgroundColor
  return [page, Math.min(...[...document.querySelectorAll('h1, h1 small, h2, p, small, figcaption, td, output')].map(e => {
    const s = getComputedStyle(e), back = paint([page, s.backgroundColor]), text = paint([page, s.backgroundColor, s.color])
    const [a, b] = [light(back), light(text)].sort((p, q) => q - p)
    return (a + .05) / (b + .05) }))] }'''


@pytest.mark.parametrize('mode', ['light', 'dark'])
def test_colours_can_be_read(open_page, mode):
    page = open_page(color_scheme=mode)
    for i in range(15):
        back, contrast = page.evaluate(contrasts)
        assert back == {'light': 'rgb(255, 255, 255)', 'dark': 'rgb(20, 22, 26)'}[mode] and contrast >= 4.5, (i, contrast)
        page.keyboard.press('ArrowRight')


def with_inf(): return Sequential(Linear(2, 2), ReLU()), lambda out, y: (out / 0).sum(), normal(1, 2), tensor(0)


apart = '''() => {
  const out = [], view = document.querySelector('svg').getBoundingClientRect(), boxes = [...document.querySelectorAll('g rect')].map(e => e.getBoundingClientRect())
  const titles = [...document.querySelectorAll('g > text:first-of-type')].map(e => e.getBoundingClientRect()), all = [...boxes, ...titles]
  for (const b of all) if (b.left < view.left || b.right > view.right || b.top < view.top || b.bottom > view.bottom) out.push('outside')
  all.forEach((a, i) => all.slice(i + 1).forEach(b => { if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1) out.push('overlap') }))
  return [out, Math.max(...boxes.map(b => b.right)) - view.left] }'''


@pytest.mark.parametrize('net', [*NETS, largest, with_inf], ids=lambda f: f.__name__)
def test_the_still_picture_is_laid_out(browser, net):
    svg = player.picture_svg(record(*seeded(net)))
    page = browser.new_page(viewport=dict(width=1000, height=700))
    page.set_content(f'<body style="margin:0">{svg}</body>')
    problems, right = page.evaluate(apart)
    page.close()
    assert problems == [] and right > 300, 'several tensors stand side by side'
    strengths = {float(s) for s in re.findall('opacity="(.*?)"', svg)}
    assert strengths <= {1.} | {k/100 for k in range(61)} and .6 in strengths


def test_the_frame_runs_in_a_sandbox(browser):
    p = seeded(lambda: play(*residual()))
    page = browser.new_page()
    page.set_content(f'<body style="margin:0">{p._repr_html_()}</body>')
    frame = page.frame_locator('iframe')
    frame.get_by_role('button', name='Step forward').click()
    assert frame.locator('output').text_content() == '1 of 14'
    assert page.evaluate('''() => { const i = document.querySelector('img').getBoundingClientRect(), f = document.querySelector('iframe').getBoundingClientRect()
        return f.width >= i.width && f.height >= i.height && f.height >= 640 && document.querySelector('img').naturalWidth > 0 }'''), 'the frame covers the picture'
    assert page.evaluate('document.styleSheets.length') == 0, 'no style leaks into the notebook'
    page.close()

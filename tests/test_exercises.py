# ruff: noqa: E501
"Chapter 76's checkers: what they read, what they reject and how fast, what they call right, and what they say."
import copy
import math
import pickle
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from miniai.exercises import Formula, Verdict, check_derivative, check_gradient
from miniai.module import check_twin

SWISH = 'x*sigmoid(x)'
LSE = 'log(exp(x) + exp(y))'

RIGHT = [
    ('2*x', 'x**2'), ('x + x', 'x**2'), ('2·x', 'x²'), ('2⋅x', 'x²'), ('1÷x', 'ln(x)'), ('π', 'π*x'), ('1 if x ≥ 0 else 0', 'relu(x)'), ('1 - (x ≤ 0)', 'relu(x)'), ('x*x*3', 'x**3'), ('3*x**2', 'x**3'), ('0', '2 + 0*x'), ('2', '2*x'), ('+1', 'x'),
    ('sigmoid(x)*(1 - sigmoid(x))', '1/(1 + exp(-x))'), ('σ(x) - σ(x)**2', 'sigmoid(x)'), ('1/(2 + exp(x) + exp(-x))', 'sigmoid(x)'),
    ('1 - tanh(x)**2', 'tanh(x)'), ('x > 0', 'relu(x)'), ('x >= 0', 'max(0, x)'), ('1 if x > 0 else 0', 'relu(x)'), ('where(x > 0, 1, 0)', 'relu(x)'),
    ('(1 + sign(x))/2', 'relu(x)'), ('1 - (x < 0)', 'relu(x)'), ('1 - (x <= 0)', 'relu(x)'), ('0.1 + 0.9*(x > 0)', 'max(x, 0.1*x)'),
    ('σ(x) + x*σ(x)*(1 - σ(x))', SWISH), ('sigmoid(x)*(1 + x - x*sigmoid(x))', SWISH), ('1/(1 + exp(-x))', 'log(1 + exp(x))'),
    ('sigmoid(x)', 'softplus(x)'), ('sign(x)', 'abs(x)'), ('x < 0', 'min(x, 0)'), ('cos(x)', 'sin(x)'), ('−sin(x)', 'cos(x)'),
    ('1 + tan(x)**2', 'tan(x)'), ('cosh(x)', 'sinh(x)'), ('sinh(x)', 'cosh(x)'), ('exp(x)', 'e**x'), ('exp(x)', 'exp(x)'), ('1/x', 'ln(x)'),
    ('1/(2*sqrt(x))', 'sqrt(x)'), ('-1/x**2', '1/x'), ('pi', 'pi*x'), ('e*x**(e - 1)', 'x**e'), ('minimum(x, 0)*2', 'where(x < 0, x**2, 0)'),
    ('maximum(x, 0)*2', 'x**2 if x > 0 else 0')]


@pytest.mark.parametrize('answer,of', RIGHT)
def test_right_in_any_style(answer, of):
    v = check_derivative(answer, of=of)
    assert v and v.message.startswith('Right at all '), v


@pytest.mark.parametrize('answer,of', [('out*(1 - out)', '1/(1 + exp(-x))'), ('1 - out**2', 'tanh(x)'), ('out', 'exp(x)'), ('1 - exp(-out)', 'log(1 + exp(x))'),])
def test_out_is_the_value_of_the_function(answer, of):
    v = check_derivative(answer, of=of)
    assert v, v
    text, proved = v.layer.latex()
    assert 'out' in text and proved


def test_out_is_a_variable_of_a_slope_only():
    with pytest.raises(ValueError, match="'out', 'x'"): Formula('out + x', 'out', 'y')


@pytest.mark.parametrize('answer,of,says', [
    ('σ(2*x) + x*σ(2*x)*(1 - σ(2*x))', 'x*sigmoid(2*x)', True), ('cos(3*x + 1)', 'sin(3*x + 1)', False), ('cos(x**2)', 'sin(x**2)', True), ('exp(sin(x))', 'exp(sin(x))', True),
    ('2*(2*x + 1)', '(2*x + 1)**2', False), ('σ(2*x)', 'x*sigmoid(2*x)', False), ('2*cos(x**2)', 'sin(x**2)', False)])
def test_a_forgotten_inner_derivative(answer, of, says):
    v = check_derivative(answer, of=of)
    assert not v and ('Is the inner derivative there?' in v.message) == says, v


@pytest.mark.parametrize('answer,wrt', [('sigmoid(x - y)', 'x'), ('1/(1 + exp(y - x))', 'x'), ('sigmoid(y - x)', 'y')])
def test_two_variables(answer, wrt): assert check_derivative(answer, of=LSE, wrt=wrt)


@pytest.mark.parametrize('answer,of,says', [
    ('x', 'x**2', 'at x = -2 it gives -2, but the slope there is -4. It is 1/2 times the right one.'),
    ('-2*x', 'x**2', 'Only the sign is wrong.'), ('-4*x', 'x**2', 'It is -2 times'), ('0.123*x', 'x**2', 'It is 0.0615 times'),
    ('x**2', 'x**2', 'This is the function, not its derivative.'), ('3*x**2 + 1e-3', 'x**3', 'It is 0.001 too large.'),
    ('3*x**2 - 1e-6', 'x**3', 'It is -1e-06 too large.'), ('2*x*(1 + 1e-6)', 'x**2', 'It is 1.000001 times'), ('1', 'relu(x)', 'For x > 0 it is right.'),
    ('0', 'relu(x)', 'For x < 0 it is right.'), ('0', 'x**2', 'Not right: at x = -2 it gives 0'),
    ('5', '2 + 0*x', 'Not right: at x = -2 it gives 5, but the slope there is 0.'), ('x/abs(x)', 'abs(x)', 'at x = 0 it gives nan'),
    ('max(0, x)/x', 'relu(x)', 'Right on paper, but at x = 0 it gives nan'), ('abs(x - 1)/(x - 1)', 'abs(x - 1)', 'at x = 1 it gives nan'),
    ('exp(-x)/(1 + exp(-x))**2', 'sigmoid(x)', 'at x = -100 it gives nan in float32. It should be 0. exp(100) is infinite there, and inf/inf is nan: divide by it, and join the exponents.'),
    ('cosh(x)/cosh(x)*2*x', 'x**2', 'at x = -100 it gives nan in float32. It should be -200.'),
    ('exp(x)/(1 + exp(x))', 'log(1 + exp(x))', 'at x = 100 it gives nan'), ('1/x', 'relu(x)', 'Not right'),
    ('log(x)', 'x**2', 'at x = -2 it gives nan'), ('1/x + (x > 20)', 'log(x)', 'Not right'), ('sqrt(x**2)/x*2*abs(x)', 'x**2', 'at x = 0 it gives nan')])
def test_wrong_and_why(answer, of, says):
    v = check_derivative(answer, of=of)
    assert not v and says in v.message, v


def test_two_variables_wrong():
    v = check_derivative('sigmoid(y - x)', of=LSE)
    assert not v and 'at x = -2, y = 1 it gives 0.952574, but the slope there is 0.0474259' in v.message
    v = check_derivative('exp(x)/(exp(x) + exp(y))', of=LSE)
    assert not v and 'Right on paper, but at x = 100, y = -100' in v.message
    v = check_derivative('exp(x - log(exp(x) + exp(y)))', of=LSE)       # finite, but inaccurate
    assert not v and 'It should be 0.5. exp(±100) is out of the range of float32.' in v.message


def test_the_first_counterexample_is_easy_and_no_kink():
    assert 'at x = -1 ' in check_derivative('2*x*(x < -1.5) + 2*x*(x > -0.9)', of='x**2').message
    assert 'at x = 0.5 ' in check_derivative('2*x + (x > 0)', of='x**2').message
    assert 'at x = -1 ' in check_derivative('-1', of='abs(x + 2)').message         # -2 is a kink


@pytest.mark.parametrize('answer', [None, ''])
def test_not_answered(answer):
    v = check_derivative(answer)
    assert not v and v.message == repr(v) == 'not answered yet' and v.layer is None


# ---- what is no formula: `(text, a word of the message)`

deep, wide = '('*99 + 'x' + ')'*99, '+'.join(['x']*100)
BAD = [
    ('2x', 'write * between'), ('x(x + 1)', 'write * between'), ('2(x)', 'write * between'), ('(x)(x)', 'write * between'), ('3 sin(x)', 'write * between'),
    ('sin x', 'brackets'), ('sin', 'sin(x)'), ('x^2', '**'), ('y = 2*x', 'without ='), ('x := 2', 'without ='), ('|x|', 'abs'), ('x | 1', 'only'),
    ('2*x)', 'bracket'), ('2*', 'missing'), ('2*t', "'t' is unknown here; the variables are x"), ('f(x)', 'f() is not known; there are exp, log, sqrt,'), ('foo(x)', 'foo() is not known'), ('pm(x)', 'pm() is not known'), ('  ', 'missing'),
    ('exp(x, 2)', 'takes 1'), ('exp(x=2)', 'takes 1'), ('exp(*x)', 'only'), ('exp()', 'takes 1'), ('max(x)', 'takes 2'), ('where(x > 0, 1)', 'takes 3'),
    ('x.exp()', 'write exp()'), ('torch.exp(x)', 'write exp()'), ('x.__class__', 'no dots'), ('().__class__.__bases__[0]', 'only'),
    ('__import__("os").system("echo hi")', 'dots'), ('eval("1")', 'not known'), ('exec("import os")', 'not known'), ('open("/etc/passwd")', 'not known'),
    ('print(x)', 'not known'), ('globals()', 'not known'), ('getattr(x, "y")', 'not known'), ('lambda: x', 'without lambda'), ('1 for x > 0, 0 else', 'cases'), ('{1 if x > 0, 0 otherwise', 'cases'), ('tanh²(x)', 'tanh(x)**2'), ('(lambda: x)()', 'write *'),
    ('[x for x in (1,)]', 'only'), ('{x}', 'only'), ('[x][0]', 'only'), ('x[0]', 'only'), ('f"{x}"', 'only'), ('"x"', 'only'), ('b"x"', 'only'), ('True', 'only'),
    ('None', 'only'), ('...', 'only'), ('1j', 'only'), ('x and 1', 'only < <='), ('not x', 'only'), ('~x', 'only'), ('x // 2', 'only'), ('x % 2', 'only'),
    ('x @ x', 'only'), ('x << 2', 'only'), ('x == 0', 'only < <='), ('0 < x < 1', 'once'), ('x is x', 'only < <='), ('0,5*x', 'a decimal point, not a comma'), ('await x', ''),
    ('yield x', ''), ('import os', ''), ('x; x', ''), ('x\nx', ''), ('\x00', ''), ('\ud800', ''), ('x\\', ''), ('"', ''), ('é', 'unknown'),
    ('9**9**9', 'exponents'), ('x**65', 'exponents'), ('x**-65', 'exponents'), ('((x**9)**9)**9', 'exponents'), ('2*x + 1/(((x + 1)**20)**20)', 'exponents'),
    ('x**(8*9)', 'exponents'), ('1e999', 'too large'), ('1e10*x', 'too large'), ('9'*150, 'too large'), ('0x' + 'f'*150, 'too large'), ('1/0', '1/0'), ('0*x + 0/0', '1/0'),
    ('log(-1)', '1/0'), ('exp(exp(9))', 'too large'), ('50000*50000', 'too large'), ('x*'*150 + 'x', 'at most 200'), ('x'*10**6, 'at most 200'),
    ('y*(1 - y)', "'y' is unknown here; the variables are x, out; out is the value of the function"), ('1 if x>0, 0 if x<0', 'write cases as 1 if x > 0 else 0'), ('1 if x > 0', 'cases'), ('0 if x<0, else 1', 'cases'),
    ('0.1x if x > 0 else 1', 'write * between'), ('2 if x > 0 else (', 'missing'), ('1, x>0; 0, x<=0', 'cases'), ('1, x>0', 'cases'), ('x > 0 ? 1 : 0.1', 'cases'), ('x > = 0', 'write >= or <='), ('x => 0', 'write >= or <='),
    ('H(x)', 'write (x > 0), which counts as 1 or 0, for H(x)'), ('u(x)', '(x > 0)'), ('θ(x)', '(x > 0)'), ('s(2*x)', 'write sigmoid(x) for s(x)'), ('heaviside(x)', '(x > 0)'), ('step(x)', '(x > 0)'),
    ('1 - tanh x ** 2', 'tanh(x) needs its brackets'), ('sigmoid x', 'sigmoid(x) needs its brackets'), ('sin 2x', 'sin(x) needs its brackets'), ('sinx', 'sin(x) needs its brackets'), ('two x', 'write * between'), ('x 2', 'write * between'),
    ('sech(x)**2', 'write 1/cosh(x) for sech(x)'), ('sech²(x)', 'write 1/cosh(x) for sech(x)'), ('Exp(x)', 'write exp in lower case'), ('Tanh(x)', 'write tanh in lower case'), ('Sigmoid', 'lower case'), ('sigma(x)', 'write sigmoid(x) for sigma(x)'),
    ('1/(1+e⁻ˣ)', 'write ** for a power, such as e**(-x)'), ('√x', 'write sqrt(x)'), ('0,1 if x > 0 else 1', 'a decimal point, not a comma'), ('np.max(x, 0)', 'write max()'), ('x(x)', 'write *'), ('e(x)', 'write *'),
    ('exp '*45, 'exp(x) needs its brackets'), ('x '*99, 'write *'), ('if '*60, 'cases'), ('1 '*99, 'write *'), ('='*199, ''), ('<'*199, ''), (' '*199 + '|', 'abs'), ('-'*190 + 'x', '50 levels'), (wide, '50 levels'), ('exp('*49 + 'x + x' + ')'*49, ''), ('('*195, ''), ('-'*60 + 'x', '50 levels'), (deep + 'y', '')]


@pytest.mark.parametrize('text,says', BAD, ids=lambda t: repr(t)[:30])
def test_unreadable(text, says):
    start = time.perf_counter()
    with pytest.raises(ValueError) as e: check_derivative(text)
    assert time.perf_counter() - start < .1
    assert type(e.value) is ValueError and says in str(e.value) and len(str(e.value)) < 300


def test_limits_are_sharp():
    "50 levels, 200 characters, exponents of 64 in all and numbers of 1e9 are allowed"
    for text in '-'*50 + 'x', 'x' + ' '*199, 'x + 0*((x/9)**8)**8', 'x + 0*1e9': assert not check_derivative(text, of='x**2')
    for text in '-'*51 + 'x', 'x' + ' '*200, 'x + 0*((x/9)**8)**8.1', 'x + 0*1.001e9':
        with pytest.raises(ValueError): check_derivative(text, of='x**2')


@pytest.mark.parametrize('answer', [2, 2., True, b'2*x', ['2*x'], object(), float('nan'), torch.ones(1)], ids=lambda a: type(a).__name__)
def test_not_text(answer):
    with pytest.raises(ValueError, match='give the formula as text'): check_derivative(answer)


HOSTILE = '''
import ast, builtins, sys, time
sys.modules['sympy'] = None                                # an import of sympy fails
from miniai.exercises import check_derivative
texts = ast.literal_eval(sys.stdin.read())
check_derivative('2*x')
ran = []
for name in 'eval', 'exec', 'open', 'print', 'globals':
    setattr(builtins, name, lambda *a, name=name, **k: ran.append(name))
slow, wrong = [], []
for t in texts:
    start = time.perf_counter()
    try: check_derivative(t); wrong.append(t)
    except ValueError: pass
    if time.perf_counter() - start > .1: slow.append(t)
sys.stdout.write(repr((len(texts), ran, slow, wrong)))
'''


def test_nothing_runs_and_sympy_is_not_needed(tmp_path):
    texts = [t for t, _ in BAD]
    run = subprocess.run([sys.executable, '-c', HOSTILE], input=repr(texts), capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == repr((len(texts), [], [], [])) and len(texts) >= 40


def test_sympy_is_imported_for_latex_only():
    code = ('import sys; from miniai.exercises import check_derivative as c; v = c("2*x"); c("x"); assert v and "sympy" not in sys.modules; '
            'assert v.layer.latex() == ("2 x", True) and "sympy" in sys.modules')
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('of,wrt', [('x**2', 'y'), ('3', 'x'), ('a + b + c + x', 'x'), ('2x', 'x'), ('log(-1 - x**2)', 'x'), ('where(x > 0, sqrt(-x), 1)*(x > 99)', 'q')])
def test_unusable_functions(of, wrt):
    with pytest.raises(ValueError): check_derivative('2*x', of=of, wrt=wrt)


# ---- the layer

@pytest.mark.parametrize('of,answer,twin', [(SWISH, 'σ(x) + x*σ(x)*(1 - σ(x))', nn.SiLU()), ('tanh(x)', '1 - tanh(x)**2', nn.Tanh()), ('relu(x)', 'x > 0', nn.ReLU()),
                                            ('max(x, 0.2*x)', '1 if x > 0 else .2', nn.LeakyReLU(.2)), ('softplus(x)', 'sigmoid(x)', nn.Softplus(threshold=99))])
def test_the_layer_is_a_twin(of, answer, twin):
    layer = check_derivative(answer, of=of).layer
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for m in layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)): check_twin(m, twin, x)
    assert layer(x.float()).dtype == torch.float32


def test_a_wrong_formula_has_a_layer_with_the_wrong_gradient():
    v, x = check_derivative('x', of='x**2'), torch.tensor([3.], requires_grad=True)
    v.layer(x).backward()
    assert not v and x.grad.item() == 3 and v.layer(x).item() == 9
    flat = check_derivative('2', of='2*x').layer
    x = torch.ones(2, 3, requires_grad=True)
    flat(x).sum().backward()
    assert_close(x.grad, torch.full((2, 3), 2.))


@pytest.mark.parametrize('answer,of,latex,proved', [
    ('x*x*3', 'x**3', '3 x^{2}', True), ('0.5*x', '0.25*x**2', r'\frac{x}{2}', True), ('1 - tanh(x)**2', 'tanh(x)', None, True), ('x', 'x**2', 'x', False),
    ('σ(x)*(1 - σ(x))', '1/(1 + exp(-x))', None, True), ('e**x', 'exp(x)', 'e^{x}', True), ('pi', 'pi*x', r'\pi', True), ('sign(x)', 'abs(x)', None, True),
    ('sigmoid(x - y)', LSE, None, True), ('sigmoid(x)', 'softplus(x)', None, True), ('1 if x > 0 else 0', 'relu(x)', None, None),
    ('max(x, 0)', 'x**2', None, False), ('min(x, 0)', 'x**2', None, False), ('x <= 0', 'x**2', None, False)])
def test_latex_and_proof(answer, of, latex, proved):
    got = check_derivative(answer, of=of).layer.latex()
    assert (latex is None or got[0] == latex) and (proved is None or got[1] == proved)


def test_tables_agree():
    "Each operator gives the same number for tensors and for symbols"
    sympy = pytest.importorskip('sympy')
    from miniai.exercises import _ARGS, _TORCH, _sympy_table
    table = _sympy_table()
    assert set(table) == set(_TORCH)
    for a, b, c in (.7, .3, .2), (.3, .7, .2), (.5, .5, 1.):
        for key, op in _TORCH.items():
            args = (a, b, c)[:_ARGS.get(key, 1 if key in ('neg', 'pos') else 2)]
            want = table[key](*map(sympy.Rational, map(str, args)))
            assert_close(op(*(torch.tensor(v, dtype=torch.float64) for v in args)).item(), float(want)), key


# ---- matrix gradients

def matmul_b(g, a, b): return a.T @ g


@pytest.mark.parametrize('answer', ['(x > 0) + 7*(1 - (x > 0) - (x < 0))', 'max(x, 0)/x', '(x > 0) - 1e9*(1 - (x > 0) - (x < 0))'])
def test_a_kink_needs_a_value_between_the_slopes(answer):
    v = check_derivative(answer, of='max(x, 0)')
    assert not v and 'at x = 0 it gives' in v.message and 'between the slopes on both sides' in v.message
    for right in 'x > 0', 'x >= 0', '(1 + sign(x))/2': assert check_derivative(right, of='max(x, 0)')


def test_gradient_right_at_odd_shapes():
    for n, m, k in (5, 3, 2), (1, 3, 1), (4, 1, 2): assert check_gradient(matmul_b, torch.matmul, (n, m), (m, k), wrt=1)
    assert check_gradient(lambda g, a, b: g @ b.T, torch.matmul, (5, 3), (3, 2))
    assert check_gradient(lambda g, x: (g.expand(6, 4)/6).numpy(), lambda x: x.mean(0), (6, 4))


@pytest.mark.parametrize('like', [lambda t: t.float(), lambda t: t.tolist(), lambda t: t.float().numpy()], ids=['float32', 'list', 'array'])
def test_gradient_in_another_form(like):
    assert check_gradient(lambda g, a, b: like(a.T @ g), torch.matmul, (5, 3), (3, 2), wrt=1)
    assert not check_gradient(lambda g, a, b: like(a.T @ g + 1e-3), torch.matmul, (5, 3), (3, 2), wrt=1)


@pytest.mark.parametrize('answer,says', [
    (lambda g, a, b: None, 'not answered yet'), (lambda g, a, b: g.T @ a, 'of shape (3, 2) has this shape, but yours has (2, 3).'), (lambda g, a, b: -a.T @ g, 'Only the sign is wrong.'),
    (lambda g, a, b: 5*a.T @ g, 'Only a constant factor is wrong.'), (lambda g, a, b: a.T @ g + 1e-5, 'it gives -0.5273798526, but it should be -0.5273898526.'), (lambda g, a, b: 0*b, 'at index (2, 0) it gives -0, but it should be -4.54.'),
    (lambda g, a, b: b*math.nan, 'gives nan'),
    (lambda g, a, b: a @ g, 'Your function raises RuntimeError: mat1 and mat2 shapes cannot be multiplied (5x3 and 5x2). Here grad has the shape (5, 2), the arguments have [(5, 3), (3, 2)].'),
    (lambda g, a, b: 1/0, 'raises ZeroDivisionError'), (lambda g, a: g, 'raises TypeError'), (lambda g, a, b: 'a.T @ g', "returns 'a.T @ g', not a tensor"), (lambda g, a, b: b.add_(1)*g.zero_(), 'raises RuntimeError'),
    (lambda g, a, b: {}, 'returns {}, not a tensor')])
def test_gradient_wrong(answer, says):
    v = check_gradient(answer, torch.matmul, (5, 3), (3, 2), wrt=1)
    assert not v and says in v.message


def test_gradient_of_softmax_without_keepdim():
    def answer(g, x):
        p = x.softmax(1)
        return p*(g - (g*p).sum(1))
    v = check_gradient(answer, lambda x: x.softmax(1), (6, 4))
    assert not v and v.message.startswith('Your function raises RuntimeError: The size of tensor a (4) must match')


def test_gradient_and_answer_do_not_share_tensors():
    assert check_gradient(lambda g, a, b: a.t_() @ g, torch.matmul, (5, 3), (3, 2), wrt=1)


def test_verdict_is_true_only_if_right():
    assert Verdict(True, 'a') and not Verdict(False, 'b') and repr(Verdict(0, 'c')) == 'c' and Verdict([], '').right is False
    assert isinstance(check_derivative('2*x').layer, Formula)

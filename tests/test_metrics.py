"""Metrics against torchmetrics and NumPy: dtypes, ties, absent classes, pixels, single scores, any
batch size, states; no update waits for the device. Then `MetricsCB` in fits and resumed fits."""
import copy
import io
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from miniai import metrics
from miniai.learner import Callback, Learner
from miniai.losses import CrossEntropyLoss
from miniai.metrics import (
    F1,
    Accuracy,
    ClassScore,
    ConfusionMatrix,
    FBeta,
    Mean,
    Metric,
    MetricsCB,
    Precision,
    Recall,
    TopK,
)
from miniai.module import Linear, ReLU, Sequential
from miniai.training import DataLoader, Dataset, accuracy, get_dls

tm = pytest.importorskip('torchmetrics.classification')
AVERAGES = 'micro', 'macro', 'weighted', None
SCORES = Accuracy, Precision, Recall, F1


def over(metric, *tensors, size=64):
    "The metric over these examples in batches of `size`, reset first"
    metric.reset()
    for batch in zip(*(t.split(size) for t in tensors)): metric.update(*batch)
    return metric.compute()


def rows(n=203, c=7, seed=0, absent=(), unpredicted=(), ties=False, dtype=torch.float32):
    "Logits and labels, about half of them right; some classes never a label, some never predicted"
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(c, (n,), generator=g)
    for k in absent: labels[labels == k] = (k + 1) % c
    scores = torch.randn(n, c, generator=g) + F.one_hot(labels, c)
    if ties: scores = scores.round()
    for k in unpredicted: scores[:, k] = -100
    return scores.to(dtype), labels


def twin(ours, c):
    "The same metric of torchmetrics"
    kwargs = dict(num_classes=c, validate_args=False, ignore_index=ours.ignore_index)
    kind = type(ours)
    if kind is ConfusionMatrix: return tm.MulticlassConfusionMatrix(**kwargs)
    if kind is TopK: return tm.MulticlassAccuracy(average='micro', top_k=ours.k, **kwargs)
    kwargs['average'] = ours.average
    if kind is FBeta: return tm.MulticlassFBetaScore(beta=float(ours.beta), **kwargs)
    return {Accuracy: tm.MulticlassAccuracy, Precision: tm.MulticlassPrecision,
            Recall: tm.MulticlassRecall, F1: tm.MulticlassF1Score}[kind](**kwargs)


def family(c, **options):
    "One of each, with every average"
    every = [kind(average, **options) for kind in SCORES for average in AVERAGES]
    every += [FBeta(b, average, **options) for b in (.5, 2, 3) for average in AVERAGES]
    every += [ConfusionMatrix(**options), ConfusionMatrix(c, **options)]
    return every + [TopK(k, **options) for k in range(1, c + 1) if k < 8 or k == c]


def agree(scores, labels, size=64, **options):
    c = scores.shape[1]
    for ours in family(c, **options):
        got, want = (over(m, scores, labels, size=size) for m in (ours, twin(ours, c)))
        where = f'{ours.name}, average {getattr(ours, "average", None)}'
        assert got.shape == want.shape, where
        text = f'{where}: {got}, expected {want}'
        assert_close(got.double(), want.double(), rtol=1e-6, atol=1e-7, msg=text)
        assert got.dtype == (torch.int64 if type(ours) is ConfusionMatrix else torch.float64), where


KINDS = [dict(), dict(c=2), dict(c=3, n=1), dict(c=40), dict(n=2), dict(absent=(0, 6)),
         dict(unpredicted=(0, 3)), dict(absent=(2, 3), unpredicted=(3, 4)), dict(absent=range(6)),
         dict(unpredicted=range(1, 7)), dict(ties=True), dict(c=40, ties=True),
         dict(ties=True, absent=(1,), unpredicted=(1, 2))]


@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize('size', [64, 29, 1000])
def test_torchmetrics(kind, size): agree(*rows(**kind), size=size)


@pytest.mark.parametrize('seed', range(8))
def test_random_tables(seed):
    g = torch.Generator().manual_seed(seed)
    c, n = (torch.randint(low, high, (), generator=g).item() for low, high in ((2, 9), (1, 150)))
    absent = (0,) if seed % 3 == 0 else ()
    agree(*rows(n, c, seed, ties=seed % 2 == 1, absent=absent), size=1 + 5*seed)


# ---- pixels, padding, one score each

@pytest.mark.parametrize('size', [1, 4, 9])
@pytest.mark.parametrize('shape', [(5,), (3, 4), (2, 3, 2)], ids=str)
def test_positions_are_examples(shape, size):
    g = torch.Generator().manual_seed(len(shape))
    scores = torch.randn(9, 4, *shape, generator=g)
    labels = torch.randint(4, (9, *shape), generator=g)
    agree(scores, labels, size=size)
    flat = scores.movedim(1, -1).reshape(-1, 4), labels.flatten()
    for ours in family(4):
        assert torch.equal(over(ours, scores, labels, size=size), over(ours, *flat))


@pytest.mark.parametrize('ignore', [-100, 0, 2, 255, -1])
def test_ignored_labels(ignore):
    scores, labels = rows(c=5)
    labels[torch.rand(203, generator=torch.Generator().manual_seed(3)) < .3] = ignore
    scores[(labels == ignore).nonzero()[0]] = torch.nan            # ignored, too
    clean, kept = scores.nan_to_num(0), labels != ignore
    agree(clean, labels, ignore_index=ignore)
    for ours in family(5, ignore_index=ignore):
        assert torch.equal(over(ours, scores, labels), over(ours, clean[kept], labels[kept]))
        with pytest.raises(ValueError, match='no examples were counted'):
            over(ours, scores, torch.full_like(labels, ignore))
    if ignore != -100:
        with pytest.raises(ValueError, match='labels are out of range, must be 0 to 4'):
            over(Accuracy(ignore_index=ignore), clean[:5], torch.tensor([0, 1, -100, 5, 3]))


def test_padding_is_ignored_as_in_cross_entropy():
    logits, labels = torch.eye(3)[None].repeat(2, 1, 1), torch.tensor([[0, 1, 2], [0, 2, -100]])
    assert over(Accuracy(), logits, labels, size=1).item() == 4/5
    assert over(TopK(2), logits, labels, size=1).item() >= 4/5


BINARY = {Accuracy: tm.BinaryAccuracy, Precision: tm.BinaryPrecision, Recall: tm.BinaryRecall,
          F1: tm.BinaryF1Score}


@pytest.mark.parametrize('threshold', [.5, .25, .9])
@pytest.mark.parametrize('shape', [(), (1,), (6, 5)], ids=str)
def test_one_score_per_example(shape, threshold):
    g = torch.Generator().manual_seed(1)
    scores = torch.rand(97, *shape, generator=g)
    labels = torch.randint(2, (97, *shape), generator=g)
    scores.view(-1)[:7] = threshold                                # not above it
    args = scores, labels
    for ours, theirs in BINARY.items():
        average = 'micro' if ours is Accuracy else 'binary'
        got = over(ours(average, threshold=threshold), *args)
        assert_close(got.float(), over(theirs(threshold=threshold), *args), rtol=1e-6, atol=0)
        assert_close(got.float(), over(theirs(threshold=threshold), *args, size=10))
        for other in labels.float(), labels.bool(), labels.double():
            assert torch.equal(over(ours(average, threshold=threshold), scores, other), got)
    got = over(ConfusionMatrix(threshold=threshold), *args)
    assert torch.equal(got, over(tm.BinaryConfusionMatrix(threshold=threshold), *args))
    fbeta = over(tm.BinaryFBetaScore(beta=2., threshold=threshold), *args)
    assert_close(over(FBeta(2, 'binary', threshold=threshold), *args).float(), fbeta)


@pytest.mark.parametrize('name', 'float16 bfloat16 float64 int64 bool'.split())
def test_types_of_single_scores(name):
    dtype = getattr(torch, name)
    scores = torch.tensor([-2., -1, 0, 1, 2, 3]).to(dtype)
    for threshold in (.5,) if dtype == torch.bool else (-1.5, -.5, 0, .5, 2):
        metric = ConfusionMatrix(threshold=threshold)
        table = over(metric, scores, labels := torch.tensor([0., 1, 0, 1, 0, 1]))
        above = scores > threshold
        assert table.tolist() == [[(~above & (labels == i)).sum(), (above & (labels == i)).sum()]
                                  for i in (0, 1)]


def test_logits_and_probabilities_of_one_model():
    logits, labels = torch.randn(50), torch.randint(2, (50,)).float()
    by_logit = over(F1('binary', threshold=0), logits, labels)
    assert torch.equal(by_logit, over(F1('binary', threshold=.5), logits.sigmoid(), labels))
    two = torch.stack([torch.zeros(50), logits], 1)
    assert torch.equal(by_logit, over(F1('binary'), two, labels.long()))


def test_labels_between_the_classes():
    scores = torch.zeros(8)
    labels = torch.tensor([0, 1, .7, torch.nan, torch.inf, -1, 2, 1])
    with pytest.raises(ValueError, match='5 of 8 labels are out of range, must be 0 to 1'):
        over(Accuracy(threshold=0), scores, labels)
    with pytest.raises(ValueError, match='1 of 8 examples have NaN logits'):
        over(Accuracy(threshold=0), scores.index_fill(0, torch.tensor(3), torch.nan), labels*0 == 0)


@pytest.mark.parametrize('preds,targs', [((4, 1), (4,)), ((4,), (4, 1)), ((4, 2), (4,)), ((), ())])
def test_shapes_of_single_scores(preds, targs):
    with pytest.raises((ValueError, IndexError)):
        Accuracy(threshold=0).update(torch.zeros(preds), torch.zeros(targs))


def test_binary_needs_two_classes():
    with pytest.raises(RuntimeError, match='must match'): over(F1('binary'), *rows(c=5))


@pytest.mark.parametrize('name', 'float16 bfloat16 float64 int64 int32'.split())
def test_types_of_scores(name):
    dtype = getattr(torch, name)
    scores, labels = rows(ties=not dtype.is_floating_point)
    scores = scores.to(dtype)
    if dtype.is_floating_point: agree(scores, labels)
    for ours in family(7):
        if type(ours) is not TopK: # which of equal scores torch.topk takes depends on their type
            assert torch.equal(over(ours, scores, labels), over(ours, scores.double(), labels))


LABELS = 'int8 uint8 int16 int32 bool uint16 uint32 uint64'.split()


@pytest.mark.parametrize('dtype', [getattr(torch, name) for name in LABELS])
def test_types_of_labels(dtype):
    c = 2 if dtype == torch.bool else 7
    scores, labels = rows(c=c)
    for ours in family(c):
        assert torch.equal(over(ours, scores, labels.to(dtype)), over(ours, scores, labels))


EXTREME = [(torch.uint8, 255), (torch.int8, -128), (torch.int8, 7), (torch.int64, 2**63 - 1),
           (torch.int64, -2**63), (torch.int32, 2**31 - 1), (torch.uint64, 2**64 - 1),
           (torch.int16, -1)]


@pytest.mark.parametrize('dtype,value', EXTREME)
def test_extreme_labels(dtype, value):
    scores, labels = rows()
    labels = labels.to(dtype)
    labels[-1] = torch.tensor(value, dtype=dtype)
    for ours in family(7):
        with pytest.raises(ValueError, match='1 of 203 labels are out of range, must be 0 to 6'):
            over(ours, scores, labels)


def test_any_batch_size():
    "One batch, batches of every size, an empty batch between them: equal bit for bit"
    scores, labels = rows(31)
    for ours in family(7):
        want = over(ours, scores, labels, size=31)
        for size in (1, 2, 3, 7, 15, 16, 30):
            assert torch.equal(over(ours, scores, labels, size=size), want)
        ours.update(scores[:0], labels[:0])
        assert torch.equal(ours.compute(), want)


def test_examples_in_any_order_and_at_any_scale():
    scores, labels = rows()
    order = torch.randperm(203, generator=torch.Generator().manual_seed(1))
    for ours in family(7):
        want = over(ours, scores, labels)
        assert torch.equal(over(ours, scores[order], labels[order]), want)
        assert torch.equal(over(ours, (2*scores).contiguous(), labels), want)
        wide = torch.empty(203, 14)[:, ::2].copy_(scores)       # not contiguous
        assert torch.equal(over(ours, wide, labels), want)


def test_micro_is_accuracy():
    scores, labels = rows(absent=(0,), unpredicted=(3,))
    share = (scores.numpy().argmax(1) == labels.numpy()).mean()
    mean = Mean(lambda p, t: (p.argmax(1) == t).double().mean(), 'share')
    for metric in (*(kind('micro') for kind in SCORES), Recall('weighted'), TopK(1), mean):
        assert over(metric, scores, labels).item() == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize('beta', [0, .1, 1, 7, float('inf')])
def test_fbeta_is_a_weighted_harmonic_mean(beta):
    scores, labels = rows()
    p, r, f = (over(m, scores, labels) for m in (Precision(None), Recall(None), FBeta(beta, None)))
    share = 1/(1 + beta**2)
    assert_close(f, 1/(share/p + (1 - share)/r), rtol=1e-12, atol=0)


# ---- Mean

@pytest.mark.parametrize('size', [1, 10, 64, 203])
def test_mean_of_a_function(size):
    from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError
    p, t = torch.randn(2, 203, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gap = p.numpy() - t.numpy()
    for func, theirs, want in ((F.l1_loss, MeanAbsoluteError, np.abs(gap).mean()),
                               (F.mse_loss, MeanSquaredError, (gap**2).mean())):
        got = over(Mean(func), p, t, size=size)
        assert_close(got, torch.as_tensor(want), rtol=1e-13, atol=0)
        flat = theirs()
        want = over(flat, p.reshape(-1), t.reshape(-1), size=3*size)
        assert_close(got.float(), want.float(), rtol=1e-6, atol=0)


def test_mean_of_values():
    from torchmetrics.aggregation import MeanMetric
    ours, theirs = Mean(), MeanMetric()
    values = [(1.5, 4), (torch.tensor(-2.), 1), (7, 2.5),
              (torch.tensor(.25, dtype=torch.float64), torch.tensor(3))]
    for value, weight in values:
        ours.update(value, weight)
        theirs.update(value, weight)
    ours.update(3.)
    theirs.update(3.)
    assert_close(ours.compute().float(), theirs.compute(), rtol=1e-6, atol=0)
    assert ours.compute().dtype == torch.float64 and ours.compute().shape == ()


def test_mean_of_targets_that_are_no_tensor():
    first = lambda p, t: (p[0] - torch.tensor(t)).abs().mean()
    metric = Mean(first, 'first')
    metric.update([torch.tensor([1., 2.])], [1., 0.])
    metric.update([torch.tensor([5.])], [1.])
    assert metric.compute().item() == 2


def test_weight_of_a_batch():
    "`n` where the targets do not tell it: a dict of two, or a list of parts"
    metric = Mean(lambda p, t: p.mean() + t['shift'], 'shifted')
    metric.update(torch.zeros(30), {'shift': 1., 'other': 2.}, n=30)
    metric.update(torch.zeros(10), {'shift': 5., 'other': 2.}, n=10)
    assert metric.compute().item() == 2
    metric.update(torch.zeros(2), {'shift': 2., 'other': 2.})       # `len` of the dict
    assert metric.sums[1].item() == 42


def test_names_of_functions():
    class CharErrorRate(nn.L1Loss): pass
    got = [Mean(f).name for f in (None, F.l1_loss, nn.L1Loss(), CharErrorRate())]
    assert got == ['mean', 'l1_loss', 'l1_loss', 'char_error_rate']
    with pytest.raises(ValueError, match="reduction='sum'"): Mean(nn.L1Loss(reduction='sum'))


class OnMps(torch.Tensor): device = torch.device('mps')


def test_apple_devices_have_no_float64():
    metric = Mean()
    metric.update(torch.tensor(1.).as_subclass(OnMps))
    assert metric.sums.dtype == torch.float32
    metric.reset()
    metric.update(torch.tensor(1.))
    assert metric.sums.dtype == torch.float64


def test_many_small_values():
    "A thousand values after a thousand million examples: float64 loses nothing visible"
    metric = Mean()
    metric.update(.1, 10**9)
    for _ in range(1000): metric.update(.1)
    assert metric.compute().item() == pytest.approx(.1, rel=1e-15)


# ---- bad examples, counted

@pytest.mark.parametrize('seed', range(4))
def test_every_bad_example_is_counted(seed):
    g = torch.Generator().manual_seed(seed)
    scores, labels = rows(97, 5, seed)
    bad = torch.rand(97, generator=g) < .2
    nan = torch.rand(97, 5, generator=g) < .05
    wild = torch.where(torch.rand(97, generator=g) < .5, -3, 9)
    spoiled = scores.masked_fill(nan, torch.nan)
    for ours in family(5):
        with pytest.raises(ValueError, match=f'{ours.name}: {bad.sum()} of 97 lab'):
            over(ours, scores, labels.where(~bad, wild), size=10)
        n = nan.any(1).sum()
        with pytest.raises(ValueError, match=f'{ours.name}: {n} of 97 examples have NaN'):
            over(ours, spoiled, labels, size=10)
        with pytest.raises(ValueError, match=f'{bad.sum()} of 97 labels'):
            over(ours, spoiled, labels.where(~bad, wild), size=10)
        over(ours, scores, labels)                                 # reset clears the count


def test_infinite_scores_are_scores():
    scores = torch.tensor([[torch.inf, 0, 1], [-torch.inf, 0, 1], [-torch.inf]*3])
    agree(scores, torch.tensor([0, 1, 0]))


def test_mean_counts_examples_that_are_not_finite():
    p, t = torch.zeros(50), torch.zeros(50)
    p[7], p[49], p[31] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(ValueError, match='mse: 18 of 50 examples are in batches whose'):
        over(Mean(F.mse_loss, 'mse'), p, t, size=8)                # 8 + 8 + a last batch of 2


SHAPES = [((4, 3), (4, 1)), ((4, 3), (3,)), ((4,), (4,)), ((4, 1), (4,)), ((4, 3, 2), (4, 3)),
          ((4, 3, 2), (4,)), ((4, 3, 2), (4, 2, 1)), ((4, 3), ()), ((3,), ())]


@pytest.mark.parametrize('preds,targs', SHAPES)
def test_shapes(preds, targs):
    text = 'preds has shape .* and targs .*; must be .n,c.*threshold'
    for ours in family(3):
        with pytest.raises(ValueError, match=f'{ours.name}: {text}'):
            ours.update(torch.zeros(preds), torch.zeros(targs, dtype=torch.int64))
        assert ours.sums is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_float_labels(dtype):
    with pytest.raises(ValueError, match='must be integers'):
        Accuracy().update(torch.zeros(4, 3), torch.zeros(4, dtype=dtype))


def test_another_number_of_classes():
    metric = F1()
    over(metric, *rows(c=7))
    for c in 5, 9:
        with pytest.raises(ValueError, match=f'f1: preds has {c} classes, must have 7'):
            metric.update(*rows(c=c))
    assert metric.sums.sum() == 203
    with pytest.raises(ValueError, match='preds has 5 classes, must have 4'):
        ConfusionMatrix(4).update(*rows(c=5))


def test_mean_shapes():
    for p, t in ((8, 1), (8,)), ((8,), (8, 1)), ((8, 1, 2), (8, 2)):
        with pytest.raises(ValueError, match=r'mse_loss: outputs .*would broadcast.*squeeze'):
            Mean(F.mse_loss).update(torch.zeros(p), torch.zeros(t))
    with pytest.raises(ValueError, match=r'the value has shape \(8,\), must be 0-d'):
        Mean(lambda p, t: p - t, 'gap').update(torch.zeros(8), torch.zeros(8))
    Mean(F.cross_entropy).update(torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64))


def test_names():
    for name in 'top 5', '', '5', 'a-b', '<lambda>':
        with pytest.raises(ValueError, match='is not a valid name'): Metric(name)
    with pytest.raises(ValueError, match="'<lambda>' is not a valid name"): Mean(lambda p, t: 0.)
    got = Accuracy(name='a'), Precision(name='p'), Recall(name='r'), F1(name='f'), TopK(3, 't')
    assert [m.name for m in got] == list('aprft')
    got = *(kind() for kind in SCORES), FBeta(2), TopK(5), ConfusionMatrix()
    assert [m.name for m in got] == 'accuracy precision recall f1 fbeta top5 confusion'.split()
    assert FBeta(2, name='f2').name == 'f2' and ConfusionMatrix(3, 'mixups').name == 'mixups'


def test_arguments():
    with pytest.raises(ValueError, match="f1: average is 'mean', must be .*macro"): F1('mean')
    for beta in -1, float('nan'):
        with pytest.raises(ValueError, match=f'fbeta: beta is {beta}, must be 0'): FBeta(beta)
    for k in 0, 9:
        with pytest.raises((IndexError, RuntimeError)): TopK(k).update(*rows())


def test_a_score_of_ones_own():
    class Jaccard(ClassScore):
        def denominator(self, hits, predicted, labelled): return predicted + labelled - hits
    scores, labels = rows(absent=(2,), unpredicted=(2,))
    for average in AVERAGES:
        theirs = tm.MulticlassJaccardIndex(7, average=average)
        assert_close(over(Jaccard(average), scores, labels).float(), over(theirs, scores, labels))
    assert Jaccard().name == 'jaccard'


def test_top_k_in_the_table():
    lenient = TopK(2)                                              # label 2 is not in the top two
    over(lenient, torch.tensor([[3., 2., 1.]]*3), torch.arange(3))
    assert ConfusionMatrix.compute(lenient).tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    same = torch.zeros(20, 20), torch.arange(20)                   # 1 and 7 of 20 equal logits
    assert [over(m, *same).item() for m in (TopK(1), TopK(7), Accuracy())] == [.05, .35, .05]


# ---- no wait for the device

class NoSync(TorchDispatchMode):
    "Raises at any call that reads a number, or whose shape depends on one; counts the others"
    WAITS = {'_local_scalar_dense', 'is_nonzero', 'equal', 'item', 'nonzero', 'masked_select',
             'unique_dim', '_unique2', 'bincount'}
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        puts = args[1] if name in ('index', 'index_put_') else ()
        masks = any(i is not None and i.dtype == torch.bool for i in puts)
        assert name not in self.WAITS and not masks, f'{name} waits for the device'
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_trap():
    x = torch.arange(3)
    for ask in (lambda: x[0].item(), lambda: bool(x.any()), lambda: float(x[1]), lambda: x[x > 1],
                lambda: torch.bincount(x), lambda: int(x.sum()), lambda: x.nonzero()):
        with pytest.raises(AssertionError, match='waits'), NoSync(): ask()


def test_updates_do_not_wait():
    scores, labels = rows()
    cases = [(m, (scores, labels)) for m in (*family(7), Mean(F.cross_entropy))]
    cases += [(Mean(F.mse_loss), (scores, scores)), (Mean(), (scores.mean(), torch.tensor(3)))]
    cases += [(Accuracy(threshold=0), (scores, (scores > 0).float()))]
    for metric, batch in cases:
        with NoSync() as watch:
            for _ in range(2): metric.update(*batch)
        assert watch.calls <= 2*20
        metric.compute()
        metric.update(*(b.to('meta') for b in batch))               # where there are no numbers
        assert metric.sums.device.type == 'meta'


def test_no_graph_is_kept():
    scores, labels = rows()
    scores.requires_grad_()
    for metric in (*family(7), Mean(F.cross_entropy)):
        metric.update(scores, labels)
        assert not metric.sums.requires_grad and not metric.compute().requires_grad


def test_inputs_are_left_alone():
    scores, labels = rows()
    before = scores.clone(), labels.clone()
    for metric in (*family(7), Mean(F.cross_entropy)): over(metric, scores, labels)
    assert torch.equal(scores, before[0]) and torch.equal(labels, before[1])


# ---- states and copies

def test_saved_and_continued():
    scores, labels = rows()
    for metric in (*family(7), Mean(F.cross_entropy)):
        want = over(metric, scores, labels)
        for k in 0, 1, 2, 3:
            metric.reset()
            batches = list(zip(scores.split(64), labels.split(64)))
            for batch in batches[:k]: metric.update(*batch)
            file = io.BytesIO()
            torch.save(metric.state_dict(), file)
            file.seek(0)
            others = copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))
            metric.reset()
            metric.load_state_dict(torch.load(file, weights_only=True))
            for m in (metric, *others):
                for batch in batches[k:]: m.update(*batch)
                assert torch.equal(m.compute(), want)


def test_states_are_copies():
    scores, labels = rows()
    for metric in (*family(7), Mean(F.cross_entropy)):
        metric.update(scores, labels)
        want, state = metric.compute(), metric.state_dict()
        state['sums'].zero_()
        metric.compute().zero_()
        assert torch.equal(metric.compute(), want)
        metric.load_state_dict(mine := metric.state_dict())
        metric.update(scores, labels)
        assert not torch.equal(mine['sums'], metric.sums)


def test_foreign_states():
    "A state of other sums ends in an error, not in a wrong number"
    for metric, other in (Mean(), F1()), (F1(), Mean()), (Mean(), F1(threshold=0)):
        batches = {Mean: (1.,), F1: rows()}
        other.update(*(rows()[0][:, 0], rows()[1] > 2) if getattr(other, 'threshold', None) == 0
                     else batches[type(other)])
        with pytest.raises(KeyError): metric.load_state_dict({'tp': other.sums})
        metric.load_state_dict(other.state_dict())
        with pytest.raises((RuntimeError, IndexError, ValueError, TypeError)):
            metric.update(*batches[type(metric)])
            metric.compute()


@pytest.mark.parametrize('make', [Mean, Accuracy, F1, ConfusionMatrix, lambda: TopK(2)])
def test_nothing_counted(make):
    metric = make()
    for _ in range(2):
        with pytest.raises(ValueError, match=f'{metric.name}: no examples were counted'):
            metric.compute()
        assert metric.state_dict() == {}
        metric.update(*((1.,) if make is Mean else rows()))
        metric.compute()
        metric.reset()


def test_beyond_float32():
    metric = Accuracy()
    metric.load_state_dict({'sums': torch.tensor([[2**60, 0, 0], [0, 5, 0], [0, 0, 0]])})
    metric.update(torch.tensor([[1., 0.]]*3), torch.tensor([0, 0, 1]))
    assert metric.sums.tolist() == [[2**60 + 2, 0, 0], [1, 5, 0], [0, 0, 0]]


# ---- the picture

def picture(c=4, classes=None, ax=None, kind=F1):
    "A metric, the axes of its picture, all drawn with warnings as errors"
    metric, spread = kind(), torch.arange(c).repeat_interleave(torch.arange(c) + 2)
    metric.update(torch.eye(c)[spread.roll(1)], spread)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ax = metric.show(classes, ax)
        ax.figure.savefig(io.BytesIO())
    return ConfusionMatrix.compute(metric), ax


@pytest.mark.parametrize('kind', [ConfusionMatrix, F1, lambda: TopK(2)])
def test_the_picture(kind):
    plt = pytest.importorskip('matplotlib.pyplot')
    table, ax = picture(kind=kind)
    shown = ax.images[0].get_array()
    assert isinstance(ax, plt.Axes)                                # a Figure would be shown twice
    assert isinstance(shown, np.ndarray)
    assert shown.tolist() == table.clone().fill_diagonal_(0).tolist()
    assert [int(t.get_text()) for t in ax.texts] == table.flatten().tolist()
    assert [t.get_position() for t in ax.texts[:5]] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)]
    assert {(t.get_ha(), t.get_va()) for t in ax.texts} == {('center', 'center')}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('predicted class', 'label')
    for axis in ax.xaxis, ax.yaxis:
        assert [t.get_text() for t in axis.get_ticklabels()] == list('0123')
        assert axis.get_ticklocs().tolist() == [0, 1, 2, 3]
    assert len(ax.figure.axes) == 2                                # with the colour bar
    plt.close('all')


def test_colours_of_the_numbers():
    plt = pytest.importorskip('matplotlib.pyplot')
    counts = torch.tensor([[50, 10, 6], [7, 50, 0], [1, 2, 50]])
    ax = metrics.show_confusion(counts)
    assert [t.get_color() for t in ax.texts] == ['C0', 'w', 'k', 'w', 'C0', 'k', 'k', 'k', 'C0']
    assert counts.diagonal().tolist() == [50]*3                    # not changed
    assert ax.images[0].get_clim() == (0, 10)
    assert metrics.show_confusion(torch.eye(3, dtype=torch.int64)*5).images[0].get_clim() == (0, 1)
    plt.close('all')


@pytest.mark.parametrize('c,texts', [(2, 4), (30, 900), (31, 0), (100, 0)])
def test_names_and_sizes(c, texts):
    plt = pytest.importorskip('matplotlib.pyplot')
    _, ax = picture(c, [f'no. {i}' for i in range(c)])
    assert len(ax.texts) == texts
    assert ax.get_xticklabels()[1].get_text() == ax.get_yticklabels()[1].get_text() == 'no. 1'
    assert 2 < ax.figure.get_figwidth() < 13 and 1.5 < ax.figure.get_figheight() < 12
    plt.close('all')


def test_axes_of_a_figure_without_pyplot():
    code = """
import sys, torch
from matplotlib.figure import Figure
from miniai.metrics import ConfusionMatrix
metric, ax = ConfusionMatrix(), Figure().subplots()
metric.update(torch.eye(3), torch.arange(3))
assert metric.show(classes=list('abc'), ax=ax) is ax
ax.figure.savefig(sys.argv[1], format='png')
print([m for m in ('matplotlib.pyplot', 'IPython', 'torchmetrics') if m in sys.modules])"""
    command = [sys.executable, '-W', 'error', '-c', code, '/dev/null']
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout == '[]\n', run.stderr


# ---- MetricsCB

class Stop(Exception): "Ends a run"


class Save(Callback):
    "Keeps what a checkpoint would hold, after a batch of epoch 2, and ends the run"
    order = 1000
    def __init__(self, at): self.at = at

    def after_batch(self, learn):
        if not learn.training or (learn.epoch, learn.batch_idx) != (2, self.at): return
        parts = [o.state_dict() for o in (learn.model, learn.opt, learn, *learn.cbs)]
        torch.save(parts, file := io.BytesIO())
        self.saved = file.getvalue()
        raise Stop


KIND = {'ours': (Sequential, Linear, ReLU, CrossEntropyLoss),
        'torch': (nn.Sequential, nn.Linear, nn.ReLU, nn.CrossEntropyLoss)}
X = torch.randn(150, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > .5).long()


def learner(engine='torch', cbs=()):
    "100 training and 50 validation examples of three classes, in batches of 16 and 32"
    torch.manual_seed(1)
    net, line, relu, loss = KIND[engine]
    dls = get_dls(Dataset(X[:100], Y[:100]), Dataset(X[100:], Y[100:]), 16,
                  torch.Generator().manual_seed(1))
    return Learner(net(line(5, 8), relu(), line(8, 3)), dls, loss(), lr=.2, cbs=cbs)


def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]


def resumed(make, at=3):
    "A full run, and one that was stopped in the middle of an epoch and resumed by new objects"
    straight, other, save = make(), make(), Save(at)
    straight.fit(3, progress=False)
    with pytest.raises(Stop): make().fit(3, cbs=[save], progress=False)
    parts = torch.load(io.BytesIO(save.saved), weights_only=True)
    objects = other.model, other.create_opt(), other, *other.cbs
    for o, state in zip(objects, parts, strict=True): o.load_state_dict(state)
    other.fit(3, progress=False)
    a, b = ([{k: v for k, v in r.items() if k != 'seconds'} for r in l.records]
            for l in (straight, other))
    assert a == b
    return straight


class Watched(Accuracy):
    "Its inputs are detached, and no graph is made"
    def update(self, preds, targs):
        assert not preds.requires_grad and not torch.is_grad_enabled()
        super().update(preds, targs)


class TwoSums:
    "The interface of torchmetrics: no name, several results, sums saved only if set to, a device"
    def __init__(self): self.saved, self.at, self.n = False, None, 0
    def update(self, preds, targs): self.n += len(targs)
    def compute(self): return {'n': self.n, 'twice': torch.tensor([2.*self.n]), 'eye': torch.eye(2)}
    def reset(self): self.n = 0
    def persistent(self, mode): self.saved = mode
    def to(self, device): self.at = device
    def state_dict(self): return {'n': self.n}
    def load_state_dict(self, state): self.n = state['n']


@pytest.mark.parametrize('engine', ['ours', 'torch'])
def test_records(engine):
    confusion, plain = ConfusionMatrix(), learner(engine)
    cb = MetricsCB(Watched(name='accuracy'), confusion, TwoSums(), F.cross_entropy, train=True,
                   plain=accuracy, best2=TopK(2))
    learn = learner(engine, [cb])
    records = learn.fit(2, progress=False)
    names = ['loss', 'accuracy', 'n', 'twice', 'cross_entropy', 'plain', 'best2']
    columns = [f'{kind}_{k}' for kind in ('train', 'valid') for k in names]
    assert [*records[0]] == ['epoch', *columns, 'seconds']
    r, scores = records[1], learn.predict(X[100:])
    assert type(r['valid_accuracy']) is float
    assert r['valid_accuracy'] == (scores.argmax(1) == Y[100:]).double().mean().item()
    assert r['valid_best2'] == (scores.topk(2).indices == Y[100:, None]).sum().item()/50
    for a, b in ('plain', 'accuracy'), ('cross_entropy', 'loss'):
        for kind in 'train', 'valid': assert_close(r[f'{kind}_{a}'], r[f'{kind}_{b}'])
    assert [r['valid_n'], r['valid_twice'], r['train_n']] == [50, 100, 100]
    assert confusion.compute().sum() == 50                          # a table stays in its metric
    assert [m['two_sums'].saved for m in (cb.train, cb.valid)] == [True, False]
    assert cb.train['two_sums'].at == cb.valid['two_sums'].at == torch.device('cpu')
    plain.fit(2, progress=False)
    assert_close(weights(learn), weights(plain), rtol=0, atol=0)
    measured = learn.evaluate(DataLoader(Dataset(X[100:], Y[100:]), 7))
    assert_close([measured['accuracy'], measured['best2']], [r['valid_accuracy'], r['valid_best2']])
    valid_only = learner(engine, [MetricsCB(Accuracy())]).fit(1, progress=False)[0]
    assert 'train_accuracy' not in valid_only


@pytest.mark.parametrize('engine', ['ours', 'torch'])
@pytest.mark.parametrize('at', [0, 3, 6])
def test_a_run_resumed_in_the_middle_of_an_epoch(engine, at):
    every = lambda: MetricsCB(Accuracy(), F1(), TwoSums(), margin=lambda p, t: p.std(), train=True)
    straight = resumed(lambda: learner(engine, [every()]), at)
    assert straight.records[-1]['train_n'] == 100


def test_torchmetrics_go_straight_in():
    from torchmetrics import ConfusionMatrix as Table
    from torchmetrics import MetricCollection
    def make():
        table = Table('multiclass', num_classes=3)
        collection = MetricCollection({'f1': tm.MulticlassF1Score(3), 'table': table})
        every = Accuracy(), tm.MulticlassAccuracy(3, average='micro'), collection, F.cross_entropy
        auroc = tm.MulticlassAUROC(3, thresholds=10)
        return learner(cbs=[MetricsCB(*every, train=True, best=TopK(2), auroc=auroc)])
    r = resumed(make).records[-1]
    for kind in 'train', 'valid':
        assert_close(r[f'{kind}_multiclass_accuracy'], r[f'{kind}_accuracy'])
        assert_close(r[f'{kind}_cross_entropy'], r[f'{kind}_loss'])
    assert 0 < r['valid_f1'] <= 1 and .5 < r['valid_auroc'] <= 1 and 'valid_table' not in r


def test_torchmetrics_alone_and_with_a_name():
    a, b = (learner(cbs=[MetricsCB(**{'right': m})]).fit(2, progress=False)
            for m in (Accuracy(), tm.MulticlassAccuracy(3, average='micro')))
    assert_close([r['valid_right'] for r in a], [r['valid_right'] for r in b])


def test_scores_of_one_class():
    "A binary classifier with one output, in ours, torchmetrics' and a function's way"
    y = (X[:, :1] > 0).float()
    dls = get_dls(Dataset(X[:100], y[:100]), Dataset(X[100:], y[100:]), 16)
    share = lambda p, t: ((p > 0) == (t > .5)).float().mean()
    every = Accuracy(threshold=0), F1('binary', threshold=0), tm.BinaryF1Score()
    cb = MetricsCB(*every, share=share)
    learn = Learner(nn.Linear(5, 1), dls, nn.BCEWithLogitsLoss(), lr=1., cbs=[cb])
    r = learn.fit(3, progress=False)[-1]
    assert r['valid_accuracy'] == r['valid_share'] > .8
    assert_close(r['valid_f1'], r['valid_binary_f1_score'], rtol=1e-6, atol=0)


class Columns(Learner):
    "Batches that are dicts, with targets that are a dict, too"
    def inputs(self): return {'input': self.batch['x']}
    def targets(self): return {'y': self.batch['y'], 'w': self.batch['w']}
    def n_examples(self): return len(self.batch['x'])


def test_batches_that_are_dicts():
    "`Mean` weighs a batch with `n_examples()`: 50 in batches of 20, 20 and 10"
    pairs = zip(X[:50].split(20), Y[:50].split(20))
    data = [{'x': x, 'y': y, 'w': torch.ones(len(x))} for x, y in pairs]
    loss = lambda p, t: F.cross_entropy(p, t['y'])
    right = lambda p, t: (p.argmax(1) == t['y']).float().mean()
    cb = MetricsCB(right=right, same=loss)
    learn = Columns(nn.Linear(5, 3), (data, data), loss, lr=.5, cbs=[cb])
    r = learn.fit(2, progress=False)[-1]
    share = (learn.model(X[:50]).argmax(1) == Y[:50]).double().mean().item()
    assert_close(r['valid_right'], share)
    assert_close(r['valid_same'], r['valid_loss'])


def test_outputs_that_are_a_tuple():
    class Pair(nn.Linear):
        def forward(self, x): return super().forward(x), x
    class Second:
        def reset(self): self.n = 0
        def update(self, preds, targs): self.n += len(preds[1])
        def compute(self): return self.n
    loss = lambda p, t: F.cross_entropy(p[0], t)
    learn = learner(cbs=[MetricsCB(Second(), Mean(lambda p, t: p[0].mean(), 'first'))])
    learn.model, learn.loss_func = Pair(5, 3), loss
    r = learn.fit(1, progress=False)[0]
    assert r['valid_second'] == 50 and 'valid_first' in r


def test_pixels_in_a_fit():
    x = torch.randn(40, 1, 6, 5, generator=torch.Generator().manual_seed(3))
    y = (x[:, 0] > 0).long()
    dls = get_dls(Dataset(x, y), Dataset(x, y), 16)
    cb = MetricsCB(Accuracy(), tm.MulticlassAccuracy(2, average='micro'))
    learn = Learner(nn.Conv2d(1, 2, 1), dls, nn.CrossEntropyLoss(), lr=.5, cbs=[cb])
    r = learn.fit(3, progress=False)[-1]
    assert r['valid_accuracy'] == (learn.predict(x).argmax(1) == y).double().mean().item() > .8
    assert_close(r['valid_accuracy'], r['valid_multiclass_accuracy'])


def test_names_in_the_record():
    with pytest.raises(TypeError, match='Accuracy is a class; pass Accuracy'): MetricsCB(Accuracy)
    for make in (lambda: MetricsCB(Accuracy(), accuracy),
                 lambda: MetricsCB(accuracy, accuracy=TopK(1)),
                 lambda: MetricsCB(loss=Accuracy())):
        with pytest.raises(ValueError, match='two columns have the name (accuracy|loss)'): make()
    with pytest.raises(ValueError, match='<lambda>'): MetricsCB(lambda p, t: 0.)
    with pytest.raises(KeyError, match='accuracy'):
        MetricsCB(Accuracy(), train=True).load_state_dict({'top3': {}})
    assert MetricsCB(Accuracy()).state_dict() == {}
    assert MetricsCB(Accuracy(), train=True).state_dict() == {'accuracy': {}}


def test_a_model_without_parameters():
    learn = learner(cbs=[MetricsCB(Accuracy(), tm.MulticlassAccuracy(3, average='micro'))])
    learn.model = nn.Identity()
    got = learn.evaluate(DataLoader(Dataset(F.one_hot(Y, 3).float(), Y), 16))
    assert got['accuracy'] == got['multiclass_accuracy'] == 1


def test_errors_of_metrics_name_the_place():
    learn = learner(cbs=[MetricsCB(Accuracy())])
    learn.dls = learn.dls[0], DataLoader(Dataset(X, Y.roll(1) + 1), 32)
    learn.loss_func = lambda p, t: p.square().mean()
    with pytest.raises(ValueError, match='accuracy: .* labels are out of range'):
        learn.fit(1, progress=False)


def test_importing_the_module_imports_nothing_that_draws():
    heavy = 'matplotlib', 'IPython', 'tensorboard', 'torchmetrics', 'pandas'
    code = f'import sys, miniai.metrics; print([m for m in {heavy} if m in sys.modules])'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.stdout == '[]\n'

"""Pictures: what is read from a file, and how a photo becomes an image like those of MNIST."""
import numpy as np
import pytest
import torch
from PIL import Image

from miniai.cli import probabilities, train_net
from miniai.data import mnist
from miniai.photos import centre_ink, crop_to_ink, find_ink, otsu, prepare_image, read_image


@pytest.fixture(scope='module')
def net():
    "A network trained on the sample"
    return train_net(mnist(sample=True), progress=False)[0]


def bytes_of(x): return (x.view(28, 28)*256).byte().numpy()


def as_photo(x, rng, scale=10, noise=8):
    "Black on white, larger, off centre, on paper that is brighter on one side"
    size = 28*scale + 40
    ink = np.zeros((size, size))
    top, left = rng.integers(0, 41, 2)
    large = Image.fromarray(bytes_of(x)).resize((28*scale,)*2, Image.Resampling.BICUBIC)
    ink[top:top + 28*scale, left:left + 28*scale] = np.asarray(large)/255
    y, x = np.mgrid[-1:1:size*1j, -1:1:size*1j]
    paper = 185 + rng.uniform(-25, 25)*x + rng.uniform(-25, 25)*y - 12*(x*x + y*y)
    return Image.fromarray((paper*(1 - .75*ink) + rng.normal(0, noise, ink.shape)).clip(0, 255).astype(np.uint8))


def on_page(x, size, page=(2000, 1500), dark=True, noise=0, seed=0):
    "A small digit somewhere on a large page"
    rng = np.random.default_rng(seed)
    ink = np.zeros(page[::-1])
    top, left = (rng.integers(0, n - size) for n in page[::-1])
    ink[top:top + size, left:left + size] = np.asarray(Image.fromarray(bytes_of(x)).resize((size, size), Image.Resampling.BICUBIC))/255
    grey = 250*(1 - ink) if dark else 10 + 240*ink
    return Image.fromarray((grey + rng.normal(0, noise, grey.shape)).clip(0, 255).astype(np.uint8))


def on_grey(x, ground, ink=255, side=28):
    "A digit of 28x28 pixels, or enlarged, on grey"
    grey = ground + (ink - ground)*(bytes_of(x)/255)
    return Image.fromarray(grey.round().astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


KINDS = {'as_is': lambda x, rng: Image.fromarray(bytes_of(x)), 'inverted': lambda x, rng: on_grey(x, 255, 0),
         'large': lambda x, rng: on_grey(x, 255, 0, 280).convert('RGB'), 'photo.png': as_photo, 'photo.jpg': as_photo,
         'noisy': lambda x, rng: as_photo(x, rng, noise=25),
         'grey 20': lambda x, rng: on_grey(x, 20), 'grey 60': lambda x, rng: on_grey(x, 60), 'grey 180': lambda x, rng: on_grey(x, 180),
         'dark on grey 60': lambda x, rng: on_grey(x, 60, 0), 'dark on grey 120': lambda x, rng: on_grey(x, 120, 0),
         'grey, enlarged': lambda x, rng: on_grey(x, 60, 255, 280),
         'page 140': lambda x, rng: on_page(x, 140), 'page 60': lambda x, rng: on_page(x, 60, seed=1),
         'page 140, noise': lambda x, rng: on_page(x, 140, noise=10, seed=2),
         'page 140, bright on dark': lambda x, rng: on_page(x, 140, dark=False), 'long page': lambda x, rng: on_page(x, 100, (3000, 300))}


@pytest.mark.parametrize('kind', KINDS)
def test_reads_digits(net, tmp_path, kind):
    "Nearly as well as the data set's own images"
    x, y = mnist(sample=True).test
    rng = np.random.default_rng(0)
    name = tmp_path/f'd.{"jpg" if "jpg" in kind else "png"}'
    found = []
    for k in range(40):
        KINDS[kind](x[k], rng).save(name)
        found.append(probabilities(net, prepare_image(read_image(name))[None]).argmax().item())
    assert (np.array(found) == y[:40].numpy()).mean() >= .9


def test_prepared_images():
    x = mnist(sample=True).test.x
    rng = np.random.default_rng(1)
    photos = [as_photo(t, rng) for t in x[:10]]
    torch.testing.assert_close(prepare_image(Image.fromarray(bytes_of(x[0]))), x[0], rtol=0, atol=0)  # already in the right form
    prepared = torch.stack([prepare_image(im) for im in photos])
    assert prepared.dtype == torch.float32 and prepared.shape == (10, 784) and prepared.max() == 255/256 and prepared.min() == 0
    assert ((prepared*256).round() == prepared*256).all() and (prepared - x[:10]).abs().mean() < .03
    for side in 20, 28:
        for im in photos:
            inked = (prepare_image(im, side).view(28, 28) > .5).nonzero()
            assert (inked.amax(0) - inked.amin(0) + 1).max() in (side - 1, side, side + 1)
    faint = Image.fromarray((200 + rng.normal(0, 12, (200, 150))).astype(np.uint8))
    pale = Image.fromarray(np.uint8(200 - 8*(np.asarray(photos[0]) < 90)))
    shades = [Image.new('L', (28, 28), grey) for grey in (0, 1, 127, 128, 255)]
    for img in Image.new('L', (200, 150), 230), faint, pale, Image.new('L', (1, 1)), *shades:
        with pytest.raises(ValueError, match='nothing is written'): prepare_image(img)


def test_steps_of_preparing():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:90j, -1:1:120j]
    paper = 180 + 30*x - 20*y - 15*x*x + 10*x*y - 5*y*y
    written = np.zeros((90, 120)); written[30:60, 50:58] = 100
    for sign in 1, -1:  # bright ink, dark ink
        ink, noise = find_ink(paper + sign*written)
        assert abs(ink - written).max() < .01 and noise < .01
        ink, noise = find_ink(paper + sign*written + rng.normal(0, 5, paper.shape))
        assert abs(ink - written).mean() < 5 and 4.5 < noise < 5.5
    low, high = rng.normal(10, 2, 5000), rng.normal(60, 5, 300)
    assert low.max() < otsu(np.concatenate([low, high])) <= high.min() + .3
    some, tried = rng.uniform(0, 100, 1000)**2/100, np.linspace(1, 99, 393)  # no peaks: the smallest variance within the groups
    within = [(some <= c).sum()*some[some <= c].var() + (some > c).sum()*some[some > c].var() for c in tried]
    assert abs(otsu(some) - tried[np.argmin(within)]) < 2
    spots = np.argwhere(centre_ink(np.ones((60, 15))) > 127)
    assert (spots.min(0).tolist(), spots.max(0).tolist()) == ([4, 12], [23, 16])
    heavy = np.zeros((40, 40)); heavy[:, :4] = heavy[:4] = heavy[30:] = 1
    spots = np.argwhere(centre_ink(heavy) > 127)
    assert (spots.max(0) - spots.min(0) + 1).tolist() == [20, 20] and centre_ink(heavy).max() == 255
    far = np.ones((100, 100))*.02; far[:3, :3] = 1; far[-1] = 1; far[-1, -30:] = 5  # a heavy edge: the digit still stays inside
    assert centre_ink(far, side=28).shape == (28, 28)
    assert centre_ink(np.ones((300, 2))).sum(0).argmax() in (13, 14)  # a thin line: one pixel wide, not zero


def test_ways_to_store_a_picture(tmp_path):
    x, y = mnist(sample=True).test
    seven = bytes_of(x[y == 7][0])
    def written(img, name='p.png', **kw):
        img.save(tmp_path/name, **kw)
        return np.asarray(read_image(tmp_path/name)).astype(int)
    for mode in 'L', 'RGB', 'RGBA', 'P': assert (written(Image.fromarray(seven).convert(mode)) == seven).all()
    assert (written(Image.fromarray(seven.astype(np.uint16)*257)) == seven).all()
    clear = Image.merge('LA', (Image.new('L', (28, 28), 0), Image.fromarray(seven)))  # black ink on a transparent ground
    assert abs(written(clear) - (255 - seven.astype(int))).max() <= 1
    turned = Image.Exif(); turned[0x112] = 6  # held upright: rotate by 90 degrees
    assert (written(Image.fromarray(np.rot90(seven)), exif=turned) == seven).all()
    (tmp_path/'text.png').write_text('hello')
    (tmp_path/'half.png').write_bytes((tmp_path/'p.png').read_bytes()[:100])
    Image.new('L', (9, 9)).save(tmp_path/'p.gif')
    Image.new('1', (10_000, 10_000)).save(tmp_path/'huge.png')
    for name in 'text.png', 'half.png', 'p.gif', 'huge.png':
        with pytest.raises(ValueError, match='not a readable PNG or JPEG'): read_image(tmp_path/name)
    for name in 'nothing.png', '.':
        with pytest.raises(ValueError, match='no such file'): read_image(tmp_path/name)


def test_cut_out_of_a_page():
    "At full resolution, with a margin of half the size of what is written, and not beyond the page"
    page = np.full((1500, 2000), 250, np.uint8); page[600:700, 1000:1060] = 20
    page[100:120, 100:120] = 200  # a pale spot, less than half as dark
    img = crop_to_ink(Image.fromarray(page))
    cut = np.asarray(img)
    rows, cols = (np.flatnonzero((cut < 100).any(d)) for d in (1, 0))
    assert (len(rows), len(cols)) == (100, 60)  # nothing is scaled
    k = 5  # the page is looked at with every fifth pixel
    for margin in rows[0], cut.shape[0] - 1 - rows[-1], cols[0], cut.shape[1] - 1 - cols[-1]: assert 50 + k <= margin <= 50 + 4*k
    assert (np.asarray(crop_to_ink(Image.fromarray(page), 200)) < 100).sum() == 6000  # looked for on a smaller copy
    small = page[595:705, 995:1065]
    assert crop_to_ink(Image.fromarray(small)).size == (70, 110)  # the margin ends at the edge
    corner = np.full((100, 100), 250, np.uint8); corner[:20, :10] = 20
    assert crop_to_ink(Image.fromarray(corner)).size == (22, 32)

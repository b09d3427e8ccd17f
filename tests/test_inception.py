"""Inception: its weights are checked, the protocol is torch-fidelity's number for number, and what cannot be compared is refused."""

import shutil
import urllib.error

import pytest
import torch
from PIL import Image
from torch import nn

from diffcourse import inception
from diffcourse.data import Images
from diffcourse.evaluation import fd, to_bytes
from diffcourse.inception import fid, inception_features, load_features
from diffcourse.pictures import pictures

STAND_IN = "diffcourse-test"


@pytest.fixture
def no_internet(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCOURSE_HOME", str(tmp_path / "home"))


@pytest.fixture
def weights(tmp_path, monkeypatch):
    "A small extractor in the place of Inception: its file, which is checked like Inception's."
    from torch_fidelity import registry
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class StandIn(FeatureExtractorBase):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
            super().__init__(name, features_list)
            self.look = nn.Conv2d(3, 8, 4, 4)
            if feature_extractor_weights_path:
                self.load_state_dict(torch.load(feature_extractor_weights_path))

        @staticmethod
        def get_provided_features_list():
            return ("16",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "16"

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            seen = self.look(x.float() / 127.5 - 1).relu()
            return (torch.cat([seen.mean((2, 3)), seen.amax((2, 3))], 1),)

    if STAND_IN not in registry.FEATURE_EXTRACTORS_REGISTRY:
        registry.register_feature_extractor(STAND_IN, StandIn)
    torch.manual_seed(0)
    file = tmp_path / "w.pth"
    torch.save(StandIn(STAND_IN, ["16"]).state_dict(), file)
    for name, value in (("EXTRACTOR", STAND_IN), ("LAYER", "16"), ("INCEPTION", inception._sha256(file)[:8])):
        monkeypatch.setattr(inception, name, value)
    return file


def crowd(seed, n=1000, tint=0.0, channels=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, 1, 1, generator=g) + 0.5 * torch.randn(n, channels, 8, 8, generator=g) - 0.5
    return (x + tint).clamp(-1, 1)


def save(x, folder):
    folder.mkdir()
    for k, image in enumerate(to_bytes(x).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image.squeeze()).save(folder / f"{k:05}.png", compress_level=0)
    return folder


# -- the weights --------------------------------------------------------------

def test_inception_without_internet(no_internet):
    with pytest.raises(ConnectionError, match="weights=…"):
        inception.inception_weights()


def test_without_weights_the_error_comes_before_the_reference_is_read(no_internet, monkeypatch):
    monkeypatch.setattr(inception, "_features", lambda *a: pytest.fail("long work"))
    with pytest.raises(ConnectionError, match="weights=…"):
        fid(crowd(0), "faces32")


def test_inception_with_other_weights(no_internet, tmp_path):
    file = tmp_path / "w.pth"
    with pytest.raises(FileNotFoundError, match="no weights"):
        inception.inception_weights(file)
    file.write_bytes(b"something")
    with pytest.raises(ValueError, match="6726825d"):
        inception.inception_weights(file)


def test_inception_from_a_file(monkeypatch, tmp_path):
    "The whole way with random weights: what stands in the file is what computes."
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    kind, seed = theirs.FeatureExtractorInceptionV3, torch.manual_seed(0)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: {})
    with monkeypatch.context() as m:
        m.setattr(kind, "load_state_dict", lambda *a, **k: None)
        net = kind("x", ["2048"])
    torch.save(net.state_dict(), tmp_path / "w.pth")
    monkeypatch.setattr(inception, "INCEPTION", inception._sha256(tmp_path / "w.pth")[:8])
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    found = inception_features(x, tmp_path / "w.pth", batch=2, cache=False)
    assert found.values.shape == (3, 2048) and found.shape == (3, 32, 32)
    assert torch.allclose(found.values, net(to_bytes(x))[0], atol=1e-5)


# -- the protocol -------------------------------------------------------------

def test_all_numbers_are_torch_fidelitys(weights, tmp_path):
    from torch_fidelity import calculate_metrics

    x, real = crowd(0, 1000, 0.1), crowd(1, 1100)
    folders = [save(v, tmp_path / name) for v, name in ((x, "made"), (real, "real"))]
    theirs = calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), feature_extractor=STAND_IN, feature_extractor_weights_path=str(weights),
        fid=True, kid=True, prc=True, kid_subset_size=300, kid_subsets=20, cuda=False, cache=False, save_cpu_ram=True, verbose=False)
    for pair in (folders, (x, real)):  # folders, and the tensors they were saved from
        ours = fid(*pair, weights, subset=300, subsets=20, cache=False)
        assert ours.fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4) and ours.fid > 0.01
        assert ours.kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
        assert ours.kid_spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)
        assert ours.precision == pytest.approx(theirs["precision"], abs=2e-3) and 0 < ours.precision < 1
        assert ours.recall == pytest.approx(theirs["recall"], abs=2e-3)
    assert ours.kid_error == pytest.approx(ours.kid_spread * (300 / 700) ** 0.5)
    said = str(ours)
    assert f"FID {ours.fid:.2f} of 1,000 images against 1,100 of" in said and "1/n" in said and "KID has no such bias" in said


def test_size_is_torch_fidelitys_too(weights, tmp_path):
    from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset, prepare_input_from_id

    g = torch.Generator().manual_seed(0)
    folder = save(torch.rand(5, 3, 17, 23, generator=g) * 2 - 1, tmp_path / "wide")
    data = prepare_input_from_id(1, input1=str(folder), samples_resize_and_crop=8, verbose=False)
    net = create_feature_extractor(STAND_IN, ["16"], cuda=False, verbose=False, feature_extractor_weights_path=str(weights))
    theirs = get_featuresdict_from_dataset(data, net, 2, False, True, False)["16"]
    ours = inception_features(folder, weights, size=8, cache=False)
    assert torch.allclose(ours.values, theirs, rtol=1e-5, atol=1e-6) and ours.shape == (3, 8, 8)  # batches round


def test_fid_is_biased_like_one_over_n_and_kid_is_not(weights):
    "The sentence that is printed: of crowds of one law, at n and at 4 n."
    real, x = (inception_features(crowd(s, 8000), weights, cache=False).values for s in (5, 6))
    few, many = ([fd(part, real) for part in x.split(n)] for n in (1000, 4000))
    ratio = sum(few) / len(few) / (sum(many) / len(many))
    assert ratio == pytest.approx((1 / 1000 + 1 / 8000) / (1 / 4000 + 1 / 8000), rel=0.4)
    kids = torch.tensor([inception._kid(part, real, 200, 10)[0] for part in x.split(1000)])
    assert abs(kids.mean()) < 3 * kids.std() / len(kids) ** 0.5


@pytest.mark.parametrize("subset", [40, 100, 190])
def test_the_error_of_kid_is_the_scatter_of_repetitions(subset):
    g = torch.Generator().manual_seed(subset)
    rows = []
    for _ in range(60):
        a, b = torch.randn(2, 200, 8, generator=g)
        rows.append(inception._kid(a + 0.5, b, subset, 40))
    value, spread, error = torch.tensor(rows).double().T
    assert 0.7 < error.mean() / value.std() < 1.5
    assert subset == 100 or not 0.7 < spread.mean() / value.std() < 1.5, "the deviation over subsets is no error"


@pytest.mark.parametrize("given, said", [(dict(subsets=1), "subsets = 1"), (dict(batch=0), "batch = 0"), (dict(subset=1000), "no error bar"), (dict(size=0), "size = 0")])
def test_options_that_make_no_sense(given, said, weights):
    with pytest.raises(ValueError, match=said):
        fid(crowd(0), crowd(1), weights, **given)


def test_subsets():
    assert inception._subset_size(None, 1000) == 500 and inception._subset_size(None, 50_000) == 1000
    for wrong in (1000, 2000):
        with pytest.raises(ValueError, match="no error bar. Take fewer, 500"):
            inception._subset_size(wrong, 1000)


# -- features that are kept ---------------------------------------------------

def test_a_reference_is_looked_at_once(weights, tmp_path, monkeypatch, capsys):
    looked, extract = [], inception._extract
    monkeypatch.setattr(inception, "_extract", lambda images, *a: looked.append(images.name) or extract(images, *a))
    real = Images(crowd(1), name="real faces")
    first = fid(crowd(0), real, weights, subsets=2)
    assert looked == ["real faces", "a tensor"]
    (file,) = (tmp_path / "home" / "features").glob("*")
    assert file.name.startswith(f"real-faces-{first.reference_hash[:12]}-") and str(file) in capsys.readouterr().out
    assert fid(crowd(0), save(real.x, tmp_path / "real"), weights, subsets=2, cache=tmp_path / "other").fid == pytest.approx(first.fid, rel=1e-5)
    looked.clear()
    assert fid(crowd(0), real, weights, subsets=2) == fid(crowd(0), file, weights, subsets=2) == first
    assert looked == ["a tensor"] * 2


def test_features_of_another_protocol(weights, tmp_path, monkeypatch):
    made = inception_features(crowd(1), weights, cache=False)
    made.save(tmp_path / "f.safetensors")
    monkeypatch.setattr(inception, "LAYER", "64")
    with pytest.raises(ValueError, match="of another protocol: layer 16, here it is 64"):
        fid(crowd(0), tmp_path / "f.safetensors", weights)


@pytest.mark.parametrize("spoil", [lambda raw: raw[:-100], lambda raw: raw[:5], lambda raw: b"", lambda raw: b"\x80\x04pickled"])
def test_features_that_are_cut_off(spoil, weights, tmp_path):
    inception_features(crowd(1, 10), weights, cache=tmp_path / "kept")
    (file,) = (tmp_path / "kept").glob("*")
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match="cut off, or holds no features: delete it"):
        load_features(file)
    with pytest.raises(ValueError, match="cut off"):
        inception_features(crowd(1, 10), weights, cache=tmp_path / "kept")


def test_features_of_other_images(weights, tmp_path):
    for seed in (1, 2):
        inception_features(Images(crowd(seed, 10), name=f"set {seed}"), weights, cache=tmp_path)
    one, two = sorted(tmp_path.glob("set-*"))
    shutil.copy(one, two)
    with pytest.raises(ValueError, match="of other images: delete it"):
        inception_features(Images(crowd(2, 10), name="set 2"), weights, cache=tmp_path)
    with pytest.raises(FileNotFoundError):
        load_features(tmp_path / "none.safetensors")


# -- what cannot be compared --------------------------------------------------

@pytest.mark.parametrize("n, m, said", [(999, 1000, "the set of samples has 999 images: FID needs 1,000"), (1000, 64, "the reference has 64 images")])
def test_too_few_images(n, m, said, weights):
    with pytest.raises(ValueError, match=said):
        fid(crowd(0, n), crowd(1, m), weights)


def test_other_sizes_and_channels(weights, tmp_path):
    x, wide = crowd(0), torch.cat([crowd(1), crowd(2)], 3)
    with pytest.raises(ValueError, match="samples are 8x8, a tensor is 16x8: FID would measure the sharpness"):
        fid(x, wide, weights)
    with pytest.warns(UserWarning, match="samples are grey, a tensor is in colour: grey became three equal channels"):
        fid(crowd(3, channels=1), x, weights, subsets=2, cache=False)


def test_the_largest_sets_are_thinned_for_precision_alone(weights, monkeypatch):
    x, real = (inception_features(crowd(s, 1200), weights, cache=False) for s in (0, 1))
    whole = inception._compared(x, real, 100, 2)
    monkeypatch.setattr(inception, "_MOST", 1000)
    part = inception._compared(x, real, 100, 2)
    assert (part.fid, part.kid, part.n) == (whole.fid, whole.kid, 1200) and part.precision == pytest.approx(whole.precision, abs=0.05)
    assert len(inception._some(x.values)) == 1000 and torch.equal(pictures(crowd(0, 5)).x, to_bytes(crowd(0, 5)))

"""Inception: its weights are checked, and what stands in the file is what computes."""

import urllib.error

import pytest
import torch

from diffcourse import inception
from diffcourse.evaluation import to_bytes


@pytest.fixture
def no_internet(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def test_inception_without_internet(no_internet):
    with pytest.raises(ConnectionError, match="weights=…"):
        inception.inception_weights()


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
    photos = to_bytes(x)
    (found,) = inception._inception(inception.inception_weights(tmp_path / "w.pth"), [photos], 2)
    assert found.shape == (3, 2048)
    assert torch.allclose(found, net(photos)[0], atol=1e-5)


@pytest.mark.parametrize("shape", [(2048, 3, 2, 2), (3000, 1, 2, 2)])
def test_photographs_that_cannot_be_scored(shape):
    with pytest.raises(ValueError, match="2,048"):
        inception.fid(torch.zeros(shape), torch.zeros(shape))

"""From diffusers and back: equal images to rounding; a run as a folder of the hub, and its card."""
import json
import re

import pytest
import torch

import diffcourse as dc
from diffcourse import interchange as ic
from diffcourse import runs

SHAPE = (2, 8, 8)


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(8, *SHAPE[:1] * 2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, num_class_embeds=None,
                       down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")).eval()


@torch.no_grad()
def theirs(unet, scheduler, x, steps, **more):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x, **more).prev_sample
    return x


def noise(n=3, shape=SHAPE):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(5))


def scheduler(kind, **config):
    import diffusers

    return getattr(diffusers, f"{kind}Scheduler")(**config)


SCHEDULERS = [
    ("DDIM", {}), ("DDIM", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ("DDIM", {"clip_sample": False, "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False}),
    ("DDIM", {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.5}),
    ("DDIM", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("DDPM", {}), ("DDPM", {"variance_type": "fixed_large", "clip_sample": False, "prediction_type": "v_prediction"}),
    ("DDPM", {"timestep_spacing": "trailing"}), ("DDPM", {"timestep_spacing": "linspace", "num_train_timesteps": 500}),
    ("FlowMatchEulerDiscrete", {}), ("FlowMatchEulerDiscrete", {"shift": 3.0}), ("FlowMatchEulerDiscrete", {"num_train_timesteps": 500}),
    ("FlowMatchEulerDiscrete", {"use_karras_sigmas": True}),
]


@pytest.mark.parametrize("kind, config", SCHEDULERS, ids=str)
def test_the_walk_of_diffusers(unet, kind, config):
    theirs_too, x = scheduler(kind, **config), noise()
    den = ic.from_diffusers(unet, theirs_too)
    here = dc.sample(den, SHAPE, *ic.walk(theirs_too, 10), seeds=3, x=x)
    more = {"generator": torch.Generator().manual_seed(3)} if kind == "DDPM" else {}
    there = theirs(unet, theirs_too, x, 10, **more)
    assert here.nfe == 10
    assert (here.x - there).abs().max() < 1e-4 * max(1, there.abs().max())


@pytest.mark.parametrize("config", [config for kind, config in SCHEDULERS if kind == "DDIM"], ids=str)
def test_nothing_but_rounding_differs(config):
    net = torch.nn.Conv2d(2, 2, 3, padding=1).double()

    class Net(torch.nn.Module):
        config = type("Config", (), dict(in_channels=2, out_channels=2))

        def forward(self, x, t):
            t = torch.as_tensor(t).double().expand(len(x))[:, None, None, None]
            return type("Out", (), {"sample": net(x).tanh() * torch.cos(t / 300)})

    sched, x = scheduler("DDIM", **config), noise().double()
    den = ic.from_diffusers(Net(), sched)
    here = dc.sample(den, SHAPE, *ic.walk(sched, 10), x=x).x
    sched.alphas_cumprod, sched.final_alpha_cumprod = sched.alphas_cumprod.double(), sched.final_alpha_cumprod.double()
    there = theirs(Net(), sched, x, 10)
    assert here.dtype == torch.float64
    assert (here - there).abs().max() < 1e-9 * max(1, there.abs().max())


def test_the_network_is_told_the_same_times(unet):
    told = []
    hook = unet.register_forward_pre_hook(lambda module, args: told.append(args[1]))
    x = noise(2)
    ic.from_diffusers(unet, scheduler("DDIM")).eps(x, 0.001)
    ic.from_diffusers(unet, scheduler("DDIM")).eps(x, 1.0)
    ic.from_diffusers(unet, scheduler("FlowMatchEulerDiscrete")).flow(x, 0.25)
    hook.remove()
    assert [t.tolist() for t in told] == [[0, 0], [999, 999], [250.0, 250.0]]


def test_a_trap_a_walk_with_another_time_scale_is_far_off(unet):
    den, x = ic.from_diffusers(unet, scheduler("FlowMatchEulerDiscrete")), noise()
    wrong = dc.Denoiser(lambda x, t: unet(x, t).sample, dc.Linear(), "flow")
    good, bad = (dc.sample(d, SHAPE, grid=dc.uniform(5), x=x).x for d in (den, wrong))
    assert (good - bad).abs().max() > 1e-2


def test_labels_are_passed_on():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    net = UNet2DModel(8, 1, 1, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                      layers_per_block=1, norm_num_groups=4, num_class_embeds=3).eval()
    den, x = ic.from_diffusers(net, scheduler("DDIM")), noise(3, (1, 8, 8))
    assert den.takes_labels
    out = dc.sample(den, (1, 8, 8), dc.DDIM(), dc.trailing(2), x=x, condition=[0, 1, 2]).x
    other = dc.sample(den, (1, 8, 8), dc.DDIM(), dc.trailing(2), x=x, condition=2).x
    assert torch.allclose(out[2], other[2], atol=1e-6) and not torch.allclose(out[0], other[0], atol=1e-4)


@pytest.mark.parametrize("kind, config, said", [
    ("DDIM", {"timestep_spacing": "linspace"}, "do not meet"), ("DDIM", {"thresholding": True}, "thresholding"),
    ("DDPM", {"variance_type": "learned"}, "learned"), ("EulerDiscrete", {}, "EulerDiscreteScheduler"),
    ("DDPM", {"variance_type": "fixed_large", "timestep_spacing": "trailing"}, "fixed_large"),
    ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, "stochastic_sampling")])
def test_a_walk_without_an_equal_is_refused(kind, config, said):
    with pytest.raises(ValueError, match=said):
        ic.walk(scheduler(kind, **config), 10)


@pytest.mark.parametrize("kind, config, said", [
    ("EDMEuler", {}, "alphas_cumprod"), ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, "invert_sigmas"),
    ("DDIM", {"rescale_betas_zero_snr": True}, "pure noise")])
def test_a_path_that_is_unknown_is_refused(unet, kind, config, said):
    with pytest.raises(ValueError, match=said):
        ic.from_diffusers(unet, scheduler(kind, **config))


def test_a_network_with_a_variance_is_refused():
    from diffusers import UNet2DModel

    net = UNet2DModel(8, 1, 2, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4)
    with pytest.raises(ValueError, match="2 channels of 1"):
        ic.from_diffusers(net, scheduler("DDPM"))


def test_a_scheduler_with_other_steps_gives_the_path_all_the_same(unet):
    den = ic.from_diffusers(unet, scheduler("EulerDiscrete"))
    assert den.predicts == "eps" and len(den.path) == 1000


# -- the way back -------------------------------------------------------------

class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(5, 16), torch.nn.Linear(16, 4)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(torch.cat([x, t[:, None]], 1))))


PATHS = {"linear": dc.Linear(), "cosine": dc.VP.cosine(), "vp": dc.VP.linear(), "sigmoid": dc.VP.sigmoid(),
         "table": dc.VP.table(dc.linear_betas()), "short table": dc.VP.table(dc.linear_betas(50, 1e-3, 0.2))}


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("name", PATHS)
def test_there_and_back_and_there(name, predicts):
    path = PATHS[name]
    if "table" in name and predicts == "flow":
        pytest.skip("a table has no flow")
    if (name == "linear" and predicts == "eps") or (name in ("cosine", "sigmoid") and predicts in ("eps", "flow")):
        pytest.skip("says nothing about the image at t = 1")
    torch.manual_seed(1)
    den = dc.Denoiser(Small(), path, predicts)
    x, (net, sched) = noise(6, (4,)), ic.to_diffusers(den)
    there = theirs(net, sched, x, 10)
    back = dc.sample(ic.from_diffusers(net, sched), (4,), *ic.walk(sched, 10), x=x).x
    near = 2e-5 * max(1.0, float(there.abs().max()))
    assert (there - back).abs().max() < near
    if name == "linear":
        grid = [*torch.linspace(1, 0.001, 10).tolist(), 0.0]
        here = dc.sample(den, (4,), dc.Euler(), grid, x=x).x
        assert (there - here).abs().max() < near
    else:  # their table is float32, ours is not
        here = dc.sample(den, (4,), dc.DDIM(), dc.uniform(10), x=x).x
        assert (there - here).abs().max() < 5e-3 * max(1.0, float(there.abs().max()))


def test_an_end_that_says_nothing_is_not_visited():
    net, sched = ic.to_diffusers(dc.Denoiser(Small(), dc.VP.cosine(), "eps"))
    assert sched.config.timestep_spacing == "leading"
    assert theirs(net, sched, noise(2, (4,)), 10).isfinite().all()


def test_the_network_of_the_wheel_in_a_pipeline():
    from diffusers import DDPMPipeline

    net, sched = ic.to_diffusers(dc.load("digits/flow", source="shipped"))
    pipeline = DDPMPipeline(net, sched)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 1) and 0 <= images.min() <= images.max() <= 1
    assert net(torch.zeros(1, 1, 8, 8), 500.0, return_dict=False)[0].shape == (1, 1, 8, 8)


def test_what_no_scheduler_asks_is_refused():
    with pytest.raises(TypeError, match="UNet"):
        ic.to_diffusers(dc.UNet(size=8))
    with pytest.raises(ValueError, match="intervals"):
        ic.to_diffusers(dc.load("digits/meanflow", source="shipped"))


# -- the hub ------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    return ic.save_for_hub("digits/flow", tmp_path / "run", repo_id="you/flow")


def test_the_folder_gives_the_same_samples(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text()) == runs.load_meta(folder / "model.safetensors")
    one, two = (dc.sample(d, (1, 8, 8), seeds=range(3)).x for d in (dc.load("digits/flow", source="shipped"), ic.pull(folder)))
    assert torch.equal(one, two)


def test_the_card_says_what_it_must_and_its_code_runs(folder):
    import yaml

    card = (folder / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) | {"tags": 0} == {"license": "cc-by-4.0", "library_name": "diffcourse", "tags": 0}
    for part in ("# digits/flow", "## Data", "UCI", "## Records", "`flow`", "`Linear`", "1,500 iterations"):
        assert part in text
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert 'pull("you/flow")' in code
    names = {}
    exec(code.replace('"you/flow"', repr(str(folder))), names)
    assert names["images"].shape == (16, 1, 8, 8)


def test_records_of_the_weights_are_in_the_card(monkeypatch, tmp_path):
    record = dict(training="abc", solver="AB2()", nfe=5, metric="FD", value=0.5, n=1000, date="2026-11-26")
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.setattr(ic.evaluation, "results_folder", lambda: tmp_path)
    assert "| AB2() | 5 | FD 0.500 | 1,000 | 2026-11-26 |" in ic._records("abc")
    assert "none" in ic._records("other") and "none" in ic._records(None)


def test_without_data_and_licence_there_is_no_card(tmp_path):
    den = dc.load("digits/flow", source="shipped")
    runs.save_tensors(tmp_path / "w.safetensors", den.net.state_dict(), {})
    with pytest.raises(ValueError, match="licence="):
        ic.save_for_hub(str(tmp_path / "w.safetensors"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match="no trained"):
        ic.save_for_hub("digits/nothing", tmp_path / "out")


class Hub:
    "Stands in for HfApi: a repository is a folder."

    root, calls = None, []

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append((repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        import shutil

        shutil.copytree(folder_path, self.root / repo_id)


def test_push_and_pull_by_a_local_folder(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(Hub, "root", tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "something")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, revision: str(tmp_path / repo / name))
    assert ic.push("digits/flow", "you/flow") == "https://huggingface.co/you/flow"
    assert Hub.calls == [("you/flow", True, True)]
    assert 'pull("you/flow")' in (tmp_path / "you/flow/README.md").read_text()
    assert ic.pull("you/flow").predicts == "flow"


def test_the_names_of_the_hub_are_there():
    import inspect

    import huggingface_hub

    api = huggingface_hub.HfApi
    assert {"repo_id", "private", "exist_ok"} <= {*inspect.signature(api.create_repo).parameters}
    assert {"repo_id", "folder_path", "commit_message"} <= {*inspect.signature(api.upload_folder).parameters}
    assert {"repo_id", "filename", "revision"} <= {*inspect.signature(huggingface_hub.hf_hub_download).parameters}


def test_push_without_a_token(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(PermissionError, match="hf auth login"):
        ic.push("digits/flow", "you/flow")

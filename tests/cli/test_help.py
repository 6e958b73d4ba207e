"""What the command says of itself, and its surface: a name or a default that changes here changes for users."""

import contextlib
import inspect
import io
import itertools
import re

import pytest

from asyncdiff_pl.cli.command import run
from asyncdiff_pl.cli.help import PREDICT, settings_parser
from asyncdiff_pl.cli.overview import is_training, overview, packaged_configs
from asyncdiff_pl.cli.parser import OTHERS, SETTINGS

SURFACE = {
    "model": {
        "pretrained": "stabilityai/stable-video-diffusion-img2vid-xt",
        "num_inference_steps": 25,
        "num_frames": 25,
        "fps": 7,
        "motion_bucket_id": 127,
        "noise_aug_strength": 0.02,
        "min_guidance_scale": 1.0,
        "max_guidance_scale": 3.0,
        "decode_chunk_size": 8,
        "scheduler": None,
        "seed": 0,
        "dtype": "float16",
        "weights": "pretrained",
        "variant": None,
        "scheduler_config": None,
        "forward_chunk_size": None,
    },
    "data": {
        "images_dir": None,
        "annotations": None,
        "max_images": None,
        "height": 576,
        "width": 1024,
        "fit": "crop",
        "batch_size": 1,
        "num_workers": 0,
        "skip_uncaptioned": False,
        "caption_index": None,
        "number_as_seed": False,
    },
    "trainer.strategy": {
        "stages": 1,
        "stride": 1,
        "warm_up": 3,
        "refresh_every": None,
        "time_shift": False,
        "cfg": 1,
        "cut": None,
        "capture": None,
        "compile": "none",
        "balance": "operations",
        "warm_up_mode": "replicated",
        "folded": False,
        "layout": "fixed",
        "share_encoding": False,
        "simulate": False,
        "timeout": 600.0,
    },
    "clip_score": {"model": "openai/clip-vit-base-patch32", "batch_size": 16, "dtype": "float32"},
    "reference_metrics": {"folder": None, "ssim": True, "lpips": None},
    "frechet_distance": {"real": None, "features": "inception", "max_real": None},
    "precision_recall": {"real": None, "features": "vgg16-397923af.pth", "max_real": 10000, "neighbours": 3},
    "step_latency": {},
    "device_stats": {"interval": 0.5},
    "traffic": {},
    "solver": {"sheets": 0},
    "trajectories": {"save": False},
    "frame_writer": {"png": True, "animation": "gif", "fps": None, "max_tensorboard": 16},
    "results": {},
    "progress_bar": {"refresh_seconds": 0.1},
}


@pytest.fixture(scope="module")
def text():
    """What `predict --help` says."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["asyncdiff_pl"])
        patch.setenv("COLUMNS", "100")
        run(["predict", "--help"])
    assert end.value.code == 0
    return out.getvalue()


def test_surface():
    surface = {}
    for place, kind in SETTINGS.items():
        # a class without settings has no place in what is parsed
        defaults = settings_parser(place, kind).get_defaults().get(place) or {}
        surface[place] = dict(vars(defaults)) if defaults else {}
    assert surface == SURFACE


def test_every_setting_is_explained_once_with_its_default(text):
    for place, settings in SURFACE.items():
        for name, default in settings.items():
            option = f"  --{place}.{name} "
            entries = re.findall(rf"^{re.escape(option)}(.*?)(?=^  --|^\S|\Z)", text, re.MULTILINE | re.DOTALL)
            assert len(entries) == 1, option
            explained = "".join(entries[0].split())
            assert len(explained) > 40, option
            is_required = (place, name) == ("data", "annotations")
            shown = "required" if is_required else f"default:{'null' if default is None else default}"
            assert shown in explained, option


def test_sections_come_in_the_order_of_use(text):
    titles = [line.rstrip(":") for line in text.splitlines() if re.match(r"\S.*:|\S+: \S+$", line)]
    places = [title.partition(":")[0] for title in titles]
    # classes that may stand in one place follow one another
    assert [place for place, _ in itertools.groupby(place for place in places if place in SURFACE)] == list(SURFACE)
    assert places.index("the run") < places.index("model")
    assert titles.index(PREDICT.trainer) == len(titles) - 1
    assert text.startswith("usage: python -m asyncdiff_pl predict --config CONFIG")
    for option in ("--resume FOLDER", "--dry-run", "--config CONFIG"):
        assert option in text


@pytest.mark.parametrize(("place", "kind"), [(place, kind) for place, kinds in OTHERS.items() for kind in kinds])
def test_other_classes_are_explained_by_what_they_have_beyond_the_first(text, place, kind):
    _, _, section = text.partition(f"\n{place}: {kind.__name__}\n")
    section = section.partition("\n\n")[0]
    first = inspect.signature(SETTINGS[place]).parameters
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in first:
            value = "required" if parameter.default is parameter.empty else parameter.default
            # as YAML has it
            shown = {"None": "null", "True": "true", "False": "false"}.get(str(value), value)
            assert f" {name} {shown}" in " ".join(section.split())
            assert f"--{place}.{name} " not in section
        else:
            assert f"  --{place}.{name} " in section


def test_all_that_is_known_of_the_configs_is_shown(text):
    for name in packaged_configs():
        for place in (overview(), text):
            if place == text and is_training(name):
                continue  # `fit --help` shows it
            (line,) = [line for line in place.splitlines() if line.startswith(f"  {name} ")]
            assert len(line.split()) > 5


@pytest.mark.parametrize("hint", ["predict --config demo", "--dry-run", "--resume", "predict --help"])
def test_the_overview_says_how_to_begin(hint):
    assert hint in overview()

"""The README's promises that can be checked without a network: its example runs, its files and configs exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from asyncdiff_pl import parallelize
from asyncdiff_pl.data import Sample
from asyncdiff_pl.models.clip import load_clip
from asyncdiff_pl.parallel.patches.rows import shares
from asyncdiff_pl.parallel.patches.settings import MODES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = load_clip("tiny-clip")[1].tokenizer
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, projection_dim=16,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64), cross_attention_dim=16, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sd")
    pipeline.save_pretrained(folder)
    return folder


def test_the_example_of_a_model_of_ones_own_runs_in_stages(tiny_sd):
    code = README.split("<!-- example: tests/test_readme.py runs this -->\n```python\n")[1].split("```")[0]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    painter = names["CaptionPainter"](str(tiny_sd), num_inference_steps=5, dtype="float32")
    painter.configure_model()
    samples = [Sample("1", captions=("a red ball",)), Sample("2", captions=("a boat",))]
    exact = painter.predict_step(samples)
    assert [len(prediction.frames) for prediction in exact] == [1, 1]
    handle = parallelize(painter.pipeline, stages=2, warm_up=2, simulate=True, trajectory=painter.trajectory)
    staged = painter.predict_step(samples)
    handle.remove()
    again = painter.predict_step(samples)
    assert staged[0].frames[0].size == exact[0].frames[0].size
    assert staged[0].frames[0].tobytes() != exact[0].frames[0].tobytes()
    assert again[0].frames[0].tobytes() == exact[0].frames[0].tobytes()


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#]+?)\)", README)
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert links
    assert missing == []


def test_every_config_of_the_readme_exists():
    named = set(re.findall(r"configs/(\w+)\.yaml", README))
    for row in README.split("| configs |")[1].split("\n\n")[0].splitlines()[2:]:
        for name in re.findall(r"`(\w+)`", row.split("|")[1]):
            # `svd_n2` `_n3`: the second is svd_n3
            whole = f"{whole.rpartition('_')[0]}{name}" if name.startswith("_") else name  # noqa: F821
            named.add(whole)
    assert {"demo", "svd_n3", "svd_n4", "svd_cfg2_n2"} <= named
    assert [name for name in named if not (ROOT / "configs" / f"{name}.yaml").exists()] == []


def test_the_page_on_patches_has_every_mode_and_its_figures_are_right():
    page = (ROOT / "docs/patches.md").read_text(encoding="utf-8")
    table = page.split("## Modes")[1].split("## How")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == MODES
    shared = {"SDXL, 1024 pixels high": 4, "SD 1.5, AnimateDiff, 512": 8, "SVD, 576": 8}
    for row in page.split("## How")[1].split("## Which")[0].splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if cells[0] not in shared:
            continue
        unit, rows = shared.pop(cells[0]), int(cells[1])
        for patches, text in zip((2, 3, 4), cells[2:5], strict=True):
            told = (
                [int(part) for part in text.split(" + ")] if "×" not in text else [int(text.split(" × ")[1])] * patches
            )
            assert tuple(told) == shares(rows, patches, unit)
        assert int(cells[5]) == rows // unit
    assert shared == {}
    assert all((ROOT / "configs" / f"{name}.yaml").exists() for name in re.findall(r"--config (\w+)", page))


def test_the_picture_of_the_house_names_every_file():
    house = README.split("## The house")[1].split("## Limits")[0]
    files = {path.name for path in (ROOT / "asyncdiff_pl").rglob("*.py") if path.name != "__init__.py"}
    assert sorted(name for name in files if name not in house and name != "__main__.py") == []


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ("parallel", ("lightning", "asyncdiff_pl.models", "asyncdiff_pl.strategies", "asyncdiff_pl.callbacks")),
        ("metrics", ("lightning", "torch.distributed", "asyncdiff_pl.parallel", "asyncdiff_pl.models")),
    ],
)
def test_imports_go_one_way(below, above):
    for path in (ROOT / "asyncdiff_pl" / below).rglob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not [name for name in imported if name.startswith(above)], path


def test_importing_the_package_is_quick_and_offers_parallelize():
    code = "import sys, asyncdiff_pl; assert 'torch' not in sys.modules; from asyncdiff_pl import parallelize"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_example_of_a_strategy_of_ones_own(tmp_path):
    page = (ROOT / "docs" / "adding_a_strategy.md").read_text(encoding="utf-8")
    code = page.split("<!-- example: tests/test_readme.py runs this -->\n```python\n")[1].split("```")[0]
    names: dict = {}
    exec(compile(code, "adding_a_strategy.md", "exec"), names)
    with pytest.raises(ValueError, match=r"exact is 2; give a share above 0"):
        names["ShareExact"](exact=2)
    strategy = names["ShareExact"](stages=2, exact=0.4)
    assert strategy.ranks_per_group == 2
    assert strategy.describe()["exact"] == 0.4


def test_every_link_of_the_docs_leads_somewhere():
    missing = []
    for page in ROOT.glob("docs/**/*.md"):
        links = re.findall(r"\]\(([^)\s]+?)\)", page.read_text(encoding="utf-8"))
        for place, _, heading in (link.partition("#") for link in links if "://" not in link):
            file = (page.parent / place) if place else page
            if not file.exists() or (heading and heading not in _headings(file)):
                missing.append(f"{page.relative_to(ROOT)}: {place}#{heading}")
    assert missing == []


def _headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}

"""A run of prompts to pictures through the command line, of a checkpoint that nobody but its owner knows."""

import numpy as np
import pytest
import yaml
from checkpoints import save_small_lora, save_small_sd
from PIL import Image

from asyncdiff_pl.cli.command import run

CONFIG = {
    "model": {
        "class_path": "asyncdiff_pl.models.PipelinePredictor",
        "init_args": {"pretrained": "tiny-sd", "num_inference_steps": 4, "dtype": "float32"},
    },
    "data": {"class_path": "asyncdiff_pl.data.PromptFile", "init_args": {"path": "", "batch_size": 2}},
    "trainer": {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": {
            "class_path": "asyncdiff_pl.strategies.AsyncDiffStrategy",
            "init_args": {"stages": 2, "warm_up": 2},
        },
        "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "logs"}},
        "inference_mode": False,
    },
    "clip_score": {"model": "tiny-clip"},
    "return_predictions": False,
}


@pytest.fixture
def arguments(command):
    """The config of the package's own model, with prompts that have settings of their own."""
    prompts = command.folder / "prompts.csv"
    prompts.write_text("id,prompt,negative_prompt,seed\ncube,a red cube,,1\nball,a blue ball,green,2\ndog,a dog,,\n")
    config = command.folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    logger = ["--trainer.logger.save_dir", str(command.folder), "--trainer.logger.name"]

    def build(name, *more):
        return ["predict", "--config", str(config), "--data.path", str(prompts), *logger, name, *more]

    return build


def pictures(log):
    """What a run wrote, by its path."""
    frames = log.path / "frames"
    return {name: np.asarray(Image.open(frames / name)).astype(int) for name in log.pictures()}


def test_a_checkpoint_with_a_name_of_its_own_and_a_lora(command, arguments):
    pytest.importorskip("peft")
    # the same config: only the checkpoint is another
    own = ["--model.pretrained", str(save_small_sd(command.folder / "my-finetuned-model"))]
    lora = ["--model.lora", f'[{{"path": "{save_small_lora(command.folder / "my-lora")}", "weight": 0.8}}]']
    # one process plays both ranks; the ranks themselves: test_patch_runs.py, and LoRAs on ranks: parallel/test_ranks.py
    simulated = ["--trainer.devices", "1", "--trainer.strategy.simulate", "true"]
    run(arguments("parallel", *own, *lora, *simulated))
    log = command.log("parallel")
    assert {row["id"]: row["steps"] for row in log.table("samples.csv")} == {"cube": "4", "ball": "4", "dog": "4"}
    (result,) = log.table("results.csv")
    assert (result["samples"], result["stages"], result["simulate"]) == ("3", "2", "True")
    assert result["model"] == own[1]
    assert result["scorer"].startswith("CLIP score (tiny-clip")
    made = pictures(log)
    assert set(made) == {f"steps=4/{name}.png" for name in ("cube", "ball", "dog")}
    assert {picture.shape for picture in made.values()} == {(64, 64, 3)}
    run(arguments("plain", *own, *simulated, "--clip_score.model", "null"))
    for name, picture in pictures(command.log("plain")).items():
        assert np.abs(picture - made[name]).mean() > 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--model.call", "{gamma: 1}"], "StableDiffusionPipeline takes no gamma: it takes prompt, height, width"),
        (["--model.height", "90"], "height is 90 pixels; tiny-sd takes multiples of"),
        (
            ["--model.guidance_scale", "1.0", "--trainer.strategy.cfg", "2", "--trainer.strategy.stages", "1"],
            "cfg 2 halves the guidance batch, but guidance is off",
        ),
        (["--model.pipeline", "NoSuchPipeline"], "There is no pipeline NoSuchPipeline"),
        (["--model.offload", "model"], "offload is model, which would move the networks"),
    ],
)
def test_bad_settings_are_told_before_the_run(command, arguments, more, sentence):
    command.arguments = lambda *args, **kwargs: arguments("bad", *args)
    with pytest.raises(ValueError, match=sentence) as caught:
        command.here(*more)
    assert "\n" not in str(caught.value)


def test_values_of_the_prompts_are_told_before_the_run(command, arguments):
    (command.folder / "prompts.csv").write_text("prompt,gamma\na red cube,1\n")
    command.arguments = lambda *args, **kwargs: arguments("bad", *args)
    with pytest.raises(ValueError, match="The data has gamma, but StableDiffusionPipeline takes no gamma"):
        command.here()


def test_a_dry_run_knows_the_size_of_the_results(command, arguments, capsys):
    command.arguments = lambda *args, **kwargs: arguments("dry", *args)
    with pytest.raises(SystemExit) as end:
        command.here("--dry-run")
    assert end.value.code == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["samples"] == "3 of 4 steps"
    assert "3 frames of 128x128" in lines["disk"]
    assert lines["cut"].startswith("stages of ")

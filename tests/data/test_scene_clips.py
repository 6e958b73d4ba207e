"""Batches of scenes: none comes twice, ranks and runs that go on have others, validation has the same."""

from itertools import islice

import pytest
import torch

from asyncdiff_pl.data.scene_clips import SceneClips
from asyncdiff_pl.data.scenes import CLASS_NAMES, captions, class_caption, draw, sample_scenes


class Asked:
    """What a data module asks of its trainer."""

    def __init__(self, step=0, rank=0, ranks=1, accumulate=1, training=True):
        self.global_step, self.global_rank, self.world_size = step, rank, ranks
        self.accumulate_grad_batches, self.training = accumulate, training


def data(asked=None, **settings):
    module = SceneClips(**{"batch_size": 3, "num_frames": 2, "size": 16, "num_workers": 0, **settings})
    module.trainer = asked or Asked()
    return module


def indices(loader, number):
    return [batch["index"].tolist() for batch in islice(loader, number)]


def test_what_a_batch_holds():
    module = data(changed_captions=2)
    batch = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
    assert batch["frames"].shape == (3, 2, 3, 16, 16)
    assert 0 <= batch["frames"].min() < batch["frames"].max() <= 1
    assert all(5 <= fps <= 10 and fps == int(fps) for fps in batch["fps"].tolist())
    for text, changed, five in zip(
        batch["captions"], batch["changed_captions"], captions(sample_scenes(torch.arange(3))), strict=True
    ):
        assert text in five
        assert len({text, *changed}) == 3


def test_training_scenes_never_come_twice():
    seen = [indices(data(Asked(step, rank, ranks=2)).train_dataloader(), 2) for step in (0, 2) for rank in (0, 1)]
    flat = [index for run in seen for batch in run for index in batch]
    assert sorted(flat) == list(range(24))
    assert indices(data(Asked(1, accumulate=2)).train_dataloader(), 1) == [[6, 7, 8]]


def test_repeated_clips_are_drawn_once_for_all_their_steps():
    module = data(repeat=3, max_start=2.0)
    batches = [module.on_after_batch_transfer(batch, 0) for batch in islice(iter(module.train_dataloader()), 7)]
    frames = [batch["frames"] for batch in batches]
    assert [batch["index"][0] for batch in batches] == [0, 0, 0, 3, 3, 3, 6]
    assert all(one is frames[0] for one in frames[:3])
    assert all(one is frames[3] for one in frames[3:6])
    # a run that goes on after step 4 has the scenes that it would have had
    assert indices(data(Asked(4), repeat=3).train_dataloader(), 3) == [[3, 4, 5], [3, 4, 5], [6, 7, 8]]
    # validation scenes come once
    module.trainer.training = False
    assert indices(module.val_dataloader(), 2) == [[0, 1, 2], [3, 4, 5]]


def test_captions_and_pictures_are_of_the_sizes_and_backgrounds_asked_for():
    module = data(batch_size=40, max_objects=1, sizes=["large"], backgrounds=["sea", "hills"], size=32)
    batch = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
    scenes = sample_scenes(batch["index"], max_objects=1, sizes=("large",), backgrounds=("sea", "hills"))
    assert all(text in five for text, five in zip(batch["captions"], captions(scenes), strict=True))
    times = torch.arange(2) / batch["fps"][:, None]
    torch.testing.assert_close(batch["frames"], draw(scenes, times, 32))


def test_workers_change_nothing():
    own, with_workers = (data(num_workers=n, changed_captions=1).train_dataloader() for n in (0, 2))
    for one, other in islice(zip(own, with_workers, strict=False), 3):
        assert one["captions"] == other["captions"]
        assert torch.equal(one["index"], other["index"])


def test_validation_is_the_same_each_time():
    loaders = [data(Asked(step, training=False), validation_batches=4).val_dataloader() for step in (0, 500)]
    first, again = ([batch["captions"] for batch in loader] for loader in loaders)
    assert first == again
    assert len(first) == 4
    shares = [indices(data(Asked(rank=r, ranks=2), validation_batches=4).val_dataloader(), 9) for r in (0, 1)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(12))


def test_some_captions_name_the_class_alone():
    module = data(batch_size=400, class_captions=0.1, changed_captions=3)
    batch = next(iter(module.train_dataloader()))
    short = {class_caption(name): number for number, name in enumerate(CLASS_NAMES)}
    chosen = [i for i, text in enumerate(batch["captions"]) if text in short]
    assert 20 <= len(chosen) <= 60
    for i in chosen:
        assert short[batch["captions"][i]] == batch["label"][i] == batch["caption_label"][i]
        assert len({batch["captions"][i], *batch["changed_captions"][i]} & short.keys()) == 4
    assert (batch["caption_label"] >= 0).sum() == len(chosen)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"batch_size": 0}, "data.batch_size is 0; give a number from 1 up"),
        ({"repeat": 0}, "data.repeat is 0; give a number from 1 up"),
        ({"min_fps": 9, "max_fps": 3}, "min_fps is 9 and max_fps 3; give 2 <= min_fps"),
        ({"sizes": ["huge"]}, "sizes is .'huge'.; give some of small, medium, large, each once"),
        ({"sizes": ["large"]}, "sizes is .'large'. and max_objects 3; give a smaller size too, or 1 object"),
        ({"backgrounds": []}, "backgrounds is ..; give some of gradient"),
        ({"backgrounds": ["sea", "sea"]}, "backgrounds is .'sea', 'sea'.; give some of gradient"),
        ({"max_objects": 4}, "max_objects is 4; give 1, 2 or 3"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SceneClips(**settings)

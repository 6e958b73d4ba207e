import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import Dataset

from asyncdiff_pl.data import Sample, SampleDataModule, UnreadableSample
from asyncdiff_pl.data.base import share_out


class Names(Dataset):
    def __init__(self, names, broken=()):
        self.names, self.broken = names, broken

    def __getitem__(self, index):
        name = self.names[index]
        if name in self.broken:
            raise UnreadableSample(f"{name}.jpg", "it is empty")
        return Sample(name)


class Named(SampleDataModule):
    def __init__(self, names, broken=(), **kwargs):
        super().__init__(**kwargs)
        self.names, self.broken = names, broken

    def samples(self):
        return Names(self.names, self.broken)

    def ids(self):
        return self.names


class Recorder(LightningModule):
    """Keeps the keys of the samples of each batch that it gets."""

    def __init__(self, num_inference_steps=None):
        super().__init__()
        if num_inference_steps is not None:
            self.num_inference_steps = num_inference_steps
        self.batches = []

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def predict_step(self, batch, batch_idx):
        self.batches.append([sample.key for sample in batch])


class Ends(Callback):
    def __init__(self):
        self.seen = []

    def on_predict_start(self, trainer, pl_module):
        self.seen.append("start")

    def on_predict_epoch_end(self, trainer, pl_module):
        self.seen.append("epoch_end")


class OneOfManyGroups(DDPStrategy):
    """The only process of its world, which believes to be one group of several."""

    def __init__(self, num_groups, group, is_group_leader=True):
        super().__init__()
        self.num_groups, self.group, self.is_group_leader = num_groups, group, is_group_leader

    @property
    def distributed_sampler_kwargs(self):
        return {"num_replicas": self.num_groups, "rank": self.group}


def predict(data, model=None, tmp_path=None, **kwargs):
    model = Recorder() if model is None else model
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **options, **kwargs)
    trainer.predict(model, data, return_predictions=False)
    return model.batches


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (Sample("1"), ""),
        (Sample("1", ("a", "b")), "a"),
        (Sample("1", ("a", "b"), prompt="c"), "c"),
        (Sample("1", ("a", "b"), prompt=""), ""),
    ],
)
def test_the_model_is_told_the_prompt_or_else_the_first_caption(sample, text):
    assert sample.text == text


@pytest.mark.parametrize(
    ("num_entries", "batch_size", "num_groups", "expected"),
    [
        (5, 1, 1, [[[0], [1], [2], [3], [4]]]),
        (5, 2, 1, [[[0, 1], [2, 3], [4]]]),
        (5, 2, 2, [[[0, 2], [4]], [[1, 3]]]),
        (4, 1, 2, [[[0], [2]], [[1], [3]]]),
        (2, 2, 4, [[[0]], [[1]], [[]], [[]]]),
        (0, 3, 2, [[[]], [[]]]),
    ],
)
def test_entries_are_shared_out_in_turn(num_entries, batch_size, num_groups, expected):
    assert [share_out(num_entries, batch_size, num_groups, group) for group in range(num_groups)] == expected


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (None, [(None, "a"), (None, "b")]),
        (7, [(7, "a"), (7, "b")]),
        ([10, 25], [(10, "a"), (10, "b"), (25, "a"), (25, "b")]),
    ],
)
def test_every_sample_runs_with_every_step_count_of_the_module(steps, expected, tmp_path):
    assert predict(Named(["a", "b"]), Recorder(steps), tmp_path) == [[key] for key in expected]


def test_samples_come_in_batches(tmp_path):
    data = Named(["a", "b", "c"], batch_size=2)
    assert predict(data, Recorder(), tmp_path) == [[(None, "a"), (None, "b")], [(None, "c")]]
    assert data.num_samples == 3


def test_what_is_done_is_left_out(tmp_path):
    data = Named(["a", "b"])
    data.exclude([(10, "a"), (25, "b")])
    data.exclude([(99, "a")])
    assert predict(data, Recorder([10, 25]), tmp_path) == [[(10, "b")], [(25, "a")]]


def test_a_run_with_nothing_left_ends_well_with_all_its_hooks(tmp_path):
    data, ends = Named(["a"]), Ends()
    data.exclude([(10, "a")])
    assert predict(data, Recorder(10), tmp_path, callbacks=[ends]) == [[]]
    assert ends.seen == ["start", "epoch_end"]


@pytest.mark.parametrize(("group", "expected"), [(0, [[(10, "a")]]), (1, [[(10, "b")]]), (3, [[]])])
def test_a_group_without_work_does_nothing_and_waits_with_the_others(group, expected, tmp_path):
    data, ends = Named(["a", "b"]), Ends()
    strategy = OneOfManyGroups(4, group)
    with pytest.warns(UserWarning, match="2 samples are to be done by 4 data groups: 2 of them have nothing to do"):
        assert predict(data, Recorder(10), tmp_path, strategy=strategy, callbacks=[ends]) == expected
    assert ends.seen == ["start", "epoch_end"]


def test_groups_share_the_work_without_repeating_any(tmp_path):
    done = []
    for group in range(2):
        done += predict(Named(["a", "b", "c"]), Recorder([5, 6]), tmp_path, strategy=OneOfManyGroups(2, group))
    assert sorted(key for batch in done for key in batch) == [(n, name) for n in (5, 6) for name in "abc"]


def test_unreadable_samples_are_told_counted_and_left_out(tmp_path):
    data = Named(["a", "b", "c"], broken=["b"])
    with pytest.warns(UserWarning) as caught:
        batches = predict(data, Recorder([5, 6]), tmp_path)
    assert batches == [[(5, "a")], [], [(5, "c")], [(6, "a")], [], [(6, "c")]]
    told = [str(warning.message) for warning in caught if "b.jpg" in str(warning.message)]
    assert told == ["b.jpg cannot be read: it is empty; it is left out."]
    assert data.num_unreadable == 1
    assert data.unreadable == {"b.jpg": "it is empty"}


def test_only_one_rank_of_a_group_tells_but_all_leave_out(tmp_path, recwarn):
    data = Named(["a", "b"], broken=["b"], batch_size=2)
    strategy = OneOfManyGroups(1, 0, is_group_leader=False)
    assert predict(data, Recorder(5), tmp_path, strategy=strategy) == [[(5, "a")]]
    assert data.num_unreadable == 1
    assert not [warning for warning in recwarn if "b.jpg" in str(warning.message)]


def test_reading_processes_are_not_forked_and_count_as_well(tmp_path):
    data = Named(["a", "b", "c"], broken=["b"], num_workers=1)
    with pytest.warns(UserWarning, match="b.jpg cannot be read"):
        assert predict(data, Recorder(5), tmp_path) == [[(5, "a")], [], [(5, "c")]]
    assert data.num_unreadable == 1
    assert data.predict_dataloader()._loader.multiprocessing_context.get_start_method() == "forkserver"


def test_other_errors_of_a_dataset_are_not_hidden(tmp_path):
    class Faulty(Named):
        def samples(self):
            return [None]

    with pytest.raises(TypeError):
        predict(Faulty(["a"]), Recorder(5), tmp_path)


def test_it_serves_without_a_trainer():
    batches = Named(["a", "b", "c"], batch_size=2).predict_dataloader()
    assert len(batches) == 2
    assert [[sample.id for sample in batch] for batch in batches] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"batch_size": 0}, "batch_size is 0; give a number from 1 up."),
        ({"num_workers": -1}, "num_workers is -1; give 0 or a number of processes."),
    ],
)
def test_bad_arguments_are_told_before_the_run(kwargs, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        Named(["a"], **kwargs).check()
    with pytest.raises(ValueError, match=sentence):
        predict(Named(["a"], **kwargs), Recorder(5), tmp_path)


def test_a_subclass_must_say_what_samples_there_are():
    class Half(SampleDataModule):
        def ids(self):
            return []

    with pytest.raises(TypeError, match="samples"):
        Half()


@pytest.fixture(autouse=True)
def no_group_is_left_behind():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

import pytest
import torch

from asyncdiff_pl.metrics.ranking import choose_others, ranks_first, ranks_first_among

NAN = float("nan")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.9, 0.1, 0.8], True),
        ([0.5, 0.1, 0.8], False),
        ([0.8, 0.1, 0.8], False),  # a tie
        ([-0.1, -0.2, -0.3], True),
        ([0.5, NAN, 0.4], True),  # left out
        ([0.5, NAN, 0.6], False),
        ([0.5, -float("inf"), NAN], True),
        ([NAN, 0.1, 0.2], False),
    ],
)
def test_one_picture(row, expected):
    assert ranks_first(torch.tensor([row, [1.0, 0.0, 0.0]])).tolist() == [expected, True]


def test_chosen_others_of_a_matrix():
    similarity = torch.tensor([[0.5, 0.9, 0.1], [0.2, 0.6, 0.3], [0.7, 0.1, 0.7]])
    assert ranks_first_among(similarity, torch.tensor([[1], [0], [0]])).tolist() == [False, True, False]
    assert ranks_first_among(similarity, torch.tensor([[2], [2], [1]])).tolist() == [True, True, True]


def test_no_others():
    with pytest.raises(ValueError, match=r"N from 1 up; given is \(2, 1\)"):
        ranks_first(torch.zeros(2, 1))


def test_others_differ_in_words_and_come_once():
    texts = [f"scene {index // 2}" for index in range(20)]
    others = choose_others(texts, 18, seed=3)
    assert others.shape == (20, 18)
    for index, row in enumerate(others.tolist()):
        assert len(set(row)) == 18
        assert all(texts[other] != texts[index] for other in row)


def test_the_choice_follows_the_seed_alone():
    texts = [str(index) for index in range(30)]
    assert torch.equal(choose_others(texts, 5, seed=1), choose_others(texts, 5, seed=1))
    assert not torch.equal(choose_others(texts, 5, seed=1), choose_others(texts, 5, seed=2))


def test_too_few_texts():
    with pytest.raises(ValueError, match="only 2 texts other than 'a', but 3 are asked for"):
        choose_others(["a", "b", "c"], 3)

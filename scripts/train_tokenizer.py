"""Makes the tokenizer of a small CLIP model from captions of training scenes: vocab.json and merges.txt.

python scripts/train_tokenizer.py asyncdiff_pl/assets/models/components/scene-clip
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from asyncdiff_pl.data.scenes import captions, class_caption, sample_scenes
from asyncdiff_pl.data.scenes.attributes import CLASS_NAMES

START, END = "<|startoftext|>", "<|endoftext|>"
# as transformers' CLIPTokenizer splits texts
WORDS = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")


def train(texts: list[str], vocabulary: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE as CLIP's: lower case, words end in </w>, start and end of text are the last two tokens."""
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # every byte alone, and at the end of a word, is a token: any text can be written
    room = vocabulary - 2 - 2 * len(letters)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]][:room]
    # further words may have been too many or too few: unused places keep the size of the vocabulary
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += [f"<|unused{number}|>" for number in range(room - len(merges))]
    assert len(set(tokens)) == vocabulary - 2
    return {token: number for number, token in enumerate([*tokens, START, END])}, merges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where vocab.json and merges.txt go")
    parser.add_argument("--scenes", type=int, default=20_000, help="number of training scenes")
    parser.add_argument("--vocabulary", type=int, default=1024, help="number of tokens")
    arguments = parser.parse_args()
    texts = [text for five in captions(sample_scenes(torch.arange(arguments.scenes))) for text in five]
    texts += [class_caption(name) for name in CLASS_NAMES]
    vocabulary, merges = train(texts, arguments.vocabulary)
    (arguments.folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (arguments.folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

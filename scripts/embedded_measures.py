"""The figures by which the embedded models are judged, each with its bound: one function a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, DiTPipeline, StableDiffusionPipeline
from diffusers import StableVideoDiffusionPipeline as SVDPipeline
from embedded_report import Line, Options
from scene_samples import FPS, Scorer, generate_pictures, generate_videos, held_out, load
from sheets import save_gif, sheet
from torch import Tensor, nn

from asyncdiff_pl.data.scenes import CLASS_NAMES, class_caption, class_of
from asyncdiff_pl.data.scenes.captions import Content, caption, contents
from asyncdiff_pl.data.scenes.changed_captions import changed_contents
from asyncdiff_pl.metrics.motion import flicker, frame_difference
from asyncdiff_pl.metrics.paired import Mean, mean_with_error, paired_difference
from asyncdiff_pl.metrics.psnr import psnr
from asyncdiff_pl.metrics.ranking import choose_others, ranks_first, ranks_first_among
from asyncdiff_pl.models.base import DTYPES
from asyncdiff_pl.models.embedded import find_component
from asyncdiff_pl.models.random_weights import build_random_model
from asyncdiff_pl.models.sources import has_weights

POOL = 500
"""Held-out scenes whose captions are each other's candidates, and whose pictures CLIP is judged on."""
OTHERS = 100
CHANGED = 20
NUM_FRAMES = 8
MOTION_BUCKET_IDS = (40, 127, 220)
SHOWN = 36
"""Pictures of a contact sheet."""


# -- tiny-clip --------------------------------------------------------------------------------------------------------


def measure_clip(options: Options) -> list[Line]:
    """How often CLIP finds the true caption among random ones, and among ones that differ in one attribute."""
    scorer, data = Scorer(options.clip, options.device), held_out(POOL, device=options.device)
    count, wordings = options.count(POOL), len(data.captions[0])
    images = scorer.images(data.pictures[:count])
    rates = [
        among_random(scorer, images, [own[wording] for own in data.captions], options.seed).mean().item()
        for wording in range(wordings)
    ]
    hits, by_attribute = [], {}
    for wording in range(min(wordings, count)):
        # each scene is judged in one wording, all wordings alike
        own = torch.arange(wording, count, wordings)
        true = [data.captions[index][wording] for index in own.tolist()]
        found = changed_contents(data.scenes[own], CHANGED, options.seed)
        changed = [[caption(change, wording) for change in changes] for changes in found]
        attributes = [
            [changed_attribute(content, change) for change in changes]
            for content, changes in zip(contents(data.scenes[own]), found, strict=True)
        ]
        similarity = among_changed(scorer, images[own.to(images.device)], true, changed)
        hits.append(ranks_first(similarity))
        for name, flags in by_changed_attribute(similarity, attributes).items():
            by_attribute.setdefault(name, []).append(flags)
    note = "by wording " + ", ".join(f"{share:.3f}" for share in rates)
    return [
        Line("tiny-clip", f"true caption first among {OTHERS} random", sum(rates) / wordings, low=0.9, note=note),
        rate("tiny-clip", f"true caption first among {CHANGED} with one attribute changed", hits, low=0.6),
        *(rate("tiny-clip", f"among those with {name} changed", by_attribute[name]) for name in sorted(by_attribute)),
    ]


def among_random(scorer: Scorer, images: Tensor, texts: Sequence[str], seed: int) -> Tensor:
    """Whether each picture's own text ranks first among random others of the list, [N], float64.

    Args:
        scorer: Embeds the texts.
        images: [N, D]: unit vectors; picture i belongs to text i.
        texts: N or more texts.
        seed: Seed of the choice.
    """
    others = choose_others(texts, OTHERS, seed)[: len(images)]
    return ranks_first_among((images @ scorer.texts(texts).T).cpu(), others).double()


def among_changed(scorer: Scorer, images: Tensor, true: Sequence[str], changed: Sequence[Sequence[str]]) -> Tensor:
    """Similarities of pictures with their true captions, in column 0, and with changed ones, [N, 1 + C]."""
    texts = [text for own, others in zip(true, changed, strict=True) for text in (own, *others)]
    return torch.einsum("nd,ncd->nc", images, scorer.texts(texts).unflatten(0, (len(true), -1))).cpu()


def by_changed_attribute(similarity: Tensor, attributes: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Whether the true caption beats all those that differ in a certain attribute, for each attribute.

    Args:
        similarity: [N, 1 + C], as `among_changed` gives it.
        attributes: For each of N scenes the attribute that each of the C captions changes.

    Returns:
        For each attribute a flag for each scene that has captions which differ in it.
    """
    found = {}
    for name in sorted({name for own in attributes for name in own}):
        differs = torch.tensor([[True, *(other == name for other in own)] for own in attributes])
        rows = differs[:, 1:].any(1)
        found[name] = ranks_first(similarity[rows].masked_fill(~differs[rows], -torch.inf))
    return found


def changed_attribute(true: Content, changed: Content) -> str:
    """The attribute in which two scenes differ."""
    pairs = [(true, changed), *zip(true.things, changed.things, strict=True)]
    (name,) = (
        name
        for one, other in pairs
        for name in one._fields
        if name != "things" and getattr(one, name) != getattr(other, name)
    )
    return name.replace("_", " ")


# -- autoencoders -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_autoencoders(options: Options) -> list[Line]:
    """What is left of clips after both autoencoders' round trips."""
    clips = held_out(options.count(64), NUM_FRAMES, options.device).clips
    lines = []
    for kind, name, what in (
        (AutoencoderKL, options.image_autoencoder, "image autoencoder"),
        (AutoencoderKLTemporalDecoder, options.video_autoencoder, "video autoencoder"),
    ):
        network = load_component(kind, name, options)
        arguments = {"num_frames": NUM_FRAMES} if kind is AutoencoderKLTemporalDecoder else {}
        parts = []
        for part in clips.split(options.batch_size):
            pixels = part.flatten(0, 1).to(network.device, network.dtype) * 2 - 1
            back = network.decode(network.encode(pixels).latent_dist.mode(), **arguments).sample
            parts.append((back.float() / 2 + 0.5).clamp(0, 1).cpu().unflatten(0, part.shape[:2]))
        decoded = torch.cat(parts)
        found = psnr(decoded.flatten(0, 1), clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean(1)
        note = f"{plus_minus(found)}, {len(clips)} clips, worst {found.min():.1f}"
        lines.append(Line(what, "round trip, PSNR in dB", found.mean().item(), low=30, note=note))
        if arguments:
            ratio = (flicker(decoded) / flicker(clips)).item()
            lines.append(Line(what, "flicker against the true clips'", ratio))
        rows = torch.stack([clips[:SHOWN, 0], decoded[:SHOWN, 0]], dim=1).flatten(0, 1)
        sheet(rows, 12).save(options.output / f"{what.replace(' ', '_')}.png")
    return lines


def load_component(kind: type[nn.Module], name: str, options: Options) -> Any:
    """Loads one network of a pipeline, or builds it at random, with a warning, if it has no weights."""
    folder, dtype = find_component(name), DTYPES[options.dtype]
    if has_weights(folder):
        network = kind.from_pretrained(folder, dtype=dtype)
    else:
        warnings.warn(f"{name}: random weights, its pictures mean nothing", stacklevel=2)
        network = build_random_model(kind, folder, dtype, seed_name=name)
    return network.requires_grad_(False).eval().to(options.device)


# -- tiny-svd ---------------------------------------------------------------------------------------------------------


def measure_svd(options: Options) -> list[Line]:
    """Whether videos keep to their picture and caption, move as true clips do, and move as they are told."""
    scorer, pipe = Scorer(options.clip, options.device), load(SVDPipeline, options.svd, options.dtype, options.device)
    data = held_out(options.count(64), pipe.unet.config.num_frames, options.device)

    def videos(steps: int, motion_bucket_ids: Sequence[float]) -> Tensor:
        return generate_videos(pipe, data.pictures, motion_bucket_ids, steps, options.batch_size, options.seed)

    found = videos(options.steps, data.motion_bucket_ids)
    few = videos(options.few_steps, data.motion_bucket_ids)
    score, true, few_score = (scorer.frames(clips, data.captions) for clips in (found, data.clips, few))
    frame_0 = psnr(found[:, 0], data.pictures)
    moved, true_moved = frame_difference(found), frame_difference(data.clips)
    flickers = flicker(found).item(), flicker(data.clips).item()
    better = paired_difference(score.mean(1), few_score.mean(1))
    last, true_last = score[:, -1].mean().item(), true[:, -1].mean().item()
    differences = [frame_difference(videos(options.steps, [number] * len(data.clips))) for number in MOTION_BUCKET_IDS]
    lines = [
        Line(
            "tiny-svd",
            "frame 0 against the conditioning picture, PSNR in dB",
            frame_0.mean().item(),
            low=25,
            note=f"{plus_minus(frame_0)}, {len(found)} scenes",
        ),
        Line(
            "tiny-svd",
            "CLIP score (tiny-clip) of the last frame, of the true clips'",
            last / true_last,
            low=0.9,
            note=f"{last:.2f} of {true_last:.2f}",
        ),
        Line(
            "tiny-svd",
            "mean difference of neighbouring frames, of the true clips'",
            (moved.mean() / true_moved.mean()).item(),
            low=0.5,
            high=2,
            note=f"{moved.mean():.4f} of {true_moved.mean():.4f}",
        ),
        Line(
            "tiny-svd",
            "flicker, of the true clips'",
            flickers[0] / flickers[1],
            high=1.3,
            note="{:.3f} of {:.3f}".format(*flickers),
        ),
        in_errors("tiny-svd", f"CLIP score (tiny-clip) of {options.steps} steps less {options.few_steps}", better),
    ]
    for at in range(1, len(MOTION_BUCKET_IDS)):
        more, less = MOTION_BUCKET_IDS[at], MOTION_BUCKET_IDS[at - 1]
        rise = paired_difference(differences[at], differences[at - 1])
        lines.append(in_errors("tiny-svd", f"frame difference at motion_bucket_id {more} less that at {less}", rise))
    for what, scores in (("", score), (" of the true clips", true), (f" of {options.few_steps} steps", few_score)):
        of_clips = scores.mean(1)
        note = f"{plus_minus(of_clips)}, by frame {', '.join(f'{x:.2f}' for x in scores.mean(0).tolist())}"
        lines.append(Line("tiny-svd", f"CLIP score (tiny-clip), all frames{what}", of_clips.mean().item(), note=note))
    strips = torch.stack([data.clips[:8], found[:8]], dim=1).flatten(0, 1)
    first = data.pictures[:8].repeat_interleave(2, 0)[:, None]
    sheet(torch.cat([first, strips], dim=1).flatten(0, 1), strips.shape[1] + 1).save(options.output / "svd_strips.png")
    pairs = torch.stack([data.clips[:8], found[:8]], dim=1).flatten(0, 1)
    save_gif(pairs, options.output / "svd.gif", columns=4, fps=FPS)
    return lines


# -- tiny-sd ----------------------------------------------------------------------------------------------------------


def measure_sd(options: Options) -> list[Line]:
    """How often CLIP finds the prompt for a generated picture, against how often it finds it for a true one."""
    scorer = Scorer(options.clip, options.device)
    pipe = load(StableDiffusionPipeline, options.sd, options.dtype, options.device)
    data, count = held_out(POOL, device=options.device), options.count(200)
    prompts = [own[index % len(own)] for index, own in enumerate(data.captions)]
    found = generate_pictures(
        pipe, "prompt", prompts[:count], 5.0, options.steps, options.picture_batch_size, options.seed
    )
    images, true = scorer.images(found), scorer.images(data.pictures[:count])
    hits = among_random(scorer, images, prompts, options.seed)
    true_hits = among_random(scorer, true, prompts, options.seed)
    texts = scorer.texts(prompts[:count])
    scores, true_scores = (100 * (pictures * texts).sum(1).cpu() for pictures in (images, true))
    sheet(found[:SHOWN], 6).save(options.output / "sd_sheet.png")
    sheet(data.pictures[: min(SHOWN, count)], 6).save(options.output / "sd_sheet_true.png")
    (options.output / "sd_prompts.txt").write_text("\n".join(prompts[: min(SHOWN, count)]) + "\n", encoding="utf-8")
    return [
        Line(
            "tiny-sd",
            f"prompt first among {OTHERS} random, of the rate on true pictures",
            (hits.mean() / true_hits.mean()).item(),
            low=0.7,
            note=f"{hits.mean():.3f} of {true_hits.mean():.3f}, {count} prompts",
        ),
        Line("tiny-sd", "CLIP score (tiny-clip)", scores.mean().item(), note=plus_minus(scores)),
        Line(
            "tiny-sd",
            "CLIP score (tiny-clip) of true pictures",
            true_scores.mean().item(),
            note=plus_minus(true_scores),
        ),
    ]


# -- tiny-dit ---------------------------------------------------------------------------------------------------------


def measure_dit(options: Options) -> list[Line]:
    """How often CLIP finds a picture's class among all classes."""
    scorer = Scorer(options.clip, options.device)
    pipe = load(DiTPipeline, options.dit, options.dtype, options.device)
    texts = scorer.texts([class_caption(name) for name in CLASS_NAMES])
    samples = options.dit_samples * len(CLASS_NAMES)
    # samples of a class lie apart: the first ones, which are shown, are of different classes
    labels = torch.arange(samples)[: options.count(samples)] % len(CLASS_NAMES)
    found = generate_pictures(
        pipe,
        "class_labels",
        labels.tolist(),
        options.dit_guidance,
        options.steps,
        options.picture_batch_size,
        options.seed,
    )
    true = held_out(len(labels), device=options.device, max_objects=1)
    right = (scorer.images(found) @ texts.T).argmax(1).cpu() == labels
    true_right = (scorer.images(true.pictures) @ texts.T).argmax(1).cpu() == class_of(true.scenes).cpu()
    sheet(found[: len(CLASS_NAMES)], 10).save(options.output / "dit_sheet.png")
    wrong = sorted({CLASS_NAMES[label] for label in labels[~right].tolist()})
    note = f"{len(labels)} pictures, {len(CLASS_NAMES)} classes" + (f"; misses in {', '.join(wrong)}" if wrong else "")
    return [
        Line("tiny-dit", "class right by tiny-clip", right.double().mean().item(), low=0.8, note=note),
        Line("tiny-dit", "class right by tiny-clip, on true pictures", true_right.double().mean().item()),
    ]


# -- words for figures ------------------------------------------------------------------------------------------------


def plus_minus(values: Tensor) -> str:
    """The standard error of a mean, in words."""
    return f"± {mean_with_error(values.flatten()).standard_error:.2g}"


def in_errors(model: str, what: str, difference: Mean) -> Line:
    """A paired difference that should be at least 2 standard errors above 0."""
    note = f"{difference.value:.4g} ± {difference.standard_error:.2g}"
    return Line(model, f"{what}, in standard errors", difference.in_standard_errors, low=2, note=note)


def rate(model: str, what: str, hits: Sequence[Tensor], low: float | None = None) -> Line:
    """A share of scenes, from flags."""
    flags = torch.cat(list(hits)).double()
    return Line(model, what, flags.mean().item(), low, note=f"{len(flags)} scenes")

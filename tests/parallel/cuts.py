"""The original AsyncDiff's cuts, stage by stage: d = down block, u = up block, r = ResNet block, a = attention."""

_PARTS = {"r": "resnets", "a": "attentions"}
_WHOLE = {"in": ["conv_in"], "mid": ["mid_block"], "out": ["conv_norm_out", "conv_out"]}

_TEXT = {
    ("sd15", 2): "in d0 d1 d2 d3 mid u0 u1.r0,a0,r1 | u1.a1,r2,a2,up u2 u3 out",
    ("sd15", 3): "in d0 d1 d2 d3 | mid u0 u1 u2.r0,a0,r1,a1,r2 | u2.a2,up u3 out",
    ("sd15", 4): "in d0 d1 | d2 d3 mid u0 u1.r0,a0,r1 | u1.a1,r2,a2,up u2 | u3 out",
    ("sd21", 2): "in d0 d1 d2 d3 mid u0 u1.r0,a0,r1,a1,r2 | u1.a2,up u2 u3 out",
    ("sd21", 3): "in d0 d1 d2 d3 | mid u0 u1 u2 | u3 out",
    ("sd21", 4): "in d0 d1 | d2 d3 mid u0 u1 | u2 u3.r0 | u3.a0,r1,a1,r2,a2 out",
    ("sdxl", 2): "d2 mid u0.r0,a0,r1,a1 | in d0 d1 u0.r2,a2,up u1 u2 out",
    ("sdxl", 3): "d2 mid u0.r0 | u0.a0,r1,a1,r2,a2,up | in d0 d1 u1 u2 out",
    ("sdxl", 4): "d1.a0,r1,a1,down d2 | mid u0.r0,a0 | u0.r1,a1,r2,a2,up | in d0 d1.r0 u1 u2 out",
    ("svd", 2): "in d0 d1 d2 d3 mid u0 u1 | u2 u3 out",
    ("svd", 3): "in d0 d1 d2 | d3 mid u0 u1 u2 | u3 out",
    ("svd", 4): "in d0 d1.r0,a0 | d1.r1,a1,down d2 d3 mid u0 u1 | u2 u3.r0,a0 | u3.r1,a1,r2,a2 out",
    ("animatediff", 2): "in d0 d1 d2 d3 mid u0 u1 | u2 u3 out",
    ("animatediff", 3): "in d0 d1 d2 d3 | mid u0 u1 u2 | u3 out",
}


def _names(word: str) -> list[str]:
    if word in _WHOLE:
        return _WHOLE[word]
    block, _, parts = word.partition(".")
    block = f"{'down' if block[0] == 'd' else 'up'}_blocks.{block[1:]}"
    if not parts:
        return [block]
    full = [
        f"{part}samplers" if part in ("up", "down") else f"{_PARTS[part[0]]}.{part[1]}" for part in parts.split(",")
    ]
    return [f"{block}.{name}" for name in full]


ORIGINAL = {
    key: [[name for word in stage.split() for name in _names(word)] for stage in text.split("|")]
    for key, text in _TEXT.items()
}
"""For each model and number of stages, the names of each stage's modules."""


def split_attentions(stages: int) -> list[list[str]]:
    """SDXL, with attentions that lie in two or three stages, at both ends: their residual is glue over stages."""
    first, last = "down_blocks.2.attentions.0", "up_blocks.0.attentions.1"
    early = [f"{first}.norm", f"{first}.proj_in", *(f"{first}.transformer_blocks.{i}" for i in range(2))]
    middle = [
        *(f"{first}.transformer_blocks.{i}" for i in (2, 3)),
        f"{first}.proj_out",
        *("down_blocks.2.resnets.1", "down_blocks.2.attentions.1", "mid_block"),
        *("up_blocks.0.resnets.0", "up_blocks.0.attentions.0", "up_blocks.0.resnets.1"),
        *(f"{last}.{part}" for part in ("norm", "proj_in", "transformer_blocks.0")),
    ]
    late = [f"{last}.transformer_blocks.{i}" for i in (1, 2, 3)]
    end = [f"{last}.proj_out", "up_blocks.0.resnets.2", "up_blocks.0.attentions.2", "up_blocks.0.upsamplers"]
    begin = ["conv_in", "down_blocks.0", "down_blocks.1", "down_blocks.2.resnets.0", *early]
    final = [*end, "up_blocks.1", "up_blocks.2", "conv_norm_out", "conv_out"]
    return [middle, [*begin, *late, *final]] if stages == 2 else [[*begin, *late], middle, final]

"""Turns what jsonargparse says of a bad argument, a tree of all types that it tried, into one sentence."""

from __future__ import annotations

import re

KEY = re.compile(r'Parser key "([^"]+)":\s*')
CLASS = re.compile(r"Problem with given class_path '[^']*':\s*")
UNKNOWN = re.compile(r"(?:Option|does not accept option) '([^']+)'|unrecognized arguments: (\S+)")
MISSING = re.compile(r"the following arguments are required: (.*)")
EXPECTED = re.compile(r"^Expected (?:an? )?(.+?)(?:\. Got value: (.*))?$")
GIVEN = re.compile(r"^Given value: (.*)$", re.MULTILINE)
SUBTYPES = re.compile(r"^Subtypes: \[(.*)\]$", re.MULTILINE)
STRUCTURE = re.compile(r"^(Does not validate against|Subtypes:|Errors:|Given value|Unexpected import path format)")


def one_sentence(message: str, subcommand: str = "predict") -> str:
    """The sentence for a user.

    Args:
        message: What jsonargparse says; where an argument may have several types, it lists for each why it does not
            fit, the wrong ones (a name in place of a class) among them.
        subcommand: Whose help explains the arguments.
    """
    remedy = f"`{subcommand} --help` explains all settings."
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    text = "\n".join(line for line in lines if line)
    text = CLASS.sub("", text)
    keys = KEY.findall(text)
    place = ".".join(keys)
    rest = KEY.sub("\n", text)
    if unknown := UNKNOWN.search(rest):
        return f"There is no setting {'.'.join([*keys, unknown[1] or unknown[2]])}; {remedy}"
    if missing := MISSING.search(rest):
        names = missing[1].replace(f"{subcommand}.", "")
        return f"Nothing is said of {names}: give `--config CONFIG`, or set them one by one; {remedy}"
    # a class that refuses its settings says why; that stands among the types that were tried as well
    reasons = [x for x in rest.splitlines() if x and not STRUCTURE.match(x) and not EXPECTED.match(x)]
    if reasons:
        return " ".join(([f"{place}:"] if place else []) + reasons)
    # what follows the last key is about the value itself, what stands before it about the classes around it
    inner = KEY.split(text)[-1]
    types, given = SUBTYPES.search(inner), GIVEN.search(inner)
    if types and given:
        return f"{place} is {given[1]}; it must be {_plain(types[1])}."
    for line in inner.splitlines():
        expected = EXPECTED.match(line)
        if expected and expected[2] is not None:
            return f"{place} is {expected[2]}; it must be {_plain(expected[1])}."
    return " ".join(text.split())


def _plain(types: str) -> str:
    """Types as a user writes them: `int or null`, `crop, pad or stretch`, `a LightningModule (my_module.MyClass)`."""
    types = re.sub(r"(?:typing\.)?Literal\[([^\]]*)\]", lambda match: match[1].replace("'", ""), types)
    types = re.sub(r"<class '[\w.]+\.(\w+)'>", r"a \1 (my_module.MyClass)", types)
    types = re.sub(r"<class '(\w+)'>", r"\1", types)
    types = re.sub(r"[\w.]+\.(\w+)\]", r"\1]", types)
    *first, last = dict.fromkeys(types.replace("NoneType", "null").split(", "))
    return f"{', '.join(first)} or {last}" if first else last

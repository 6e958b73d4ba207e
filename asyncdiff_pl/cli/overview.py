"""What the command says of itself, and the configs that come with the package: all without importing torch."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml

TRAINING = "train"
"""Tells the configs for `fit` from those for `predict`; see `list_configs`."""

SWEEP = "sweep_"
"""What the names of the configs for `sweep` start with: they are of another form."""

CHECKED = ("validate", "test")
"""Subcommands that take a checkpoint."""

CONFIGS = Path(__file__).parents[1] / "configs"
"""Folder of the packaged configs."""

PROGRAM = "python -m asyncdiff_pl"


def overview() -> str:
    """What `--help` says before a subcommand."""
    return f"""\
asyncdiff_pl: diffusion models on several GPUs at once, each sample timed and scored.

  {PROGRAM} predict --config CONFIG [--SETTING VALUE ...] [--dry-run]

CONFIG is a YAML file, or the name of one that comes with the package:
{list_configs()}

and small networks are trained, by a CONFIG of these, and checked; of a DDPM's pictures FID, precision and recall:

  {PROGRAM} fit --config CONFIG [--SETTING VALUE ...]
  {PROGRAM} validate --config CONFIG [--ckpt_path RUN]
  {PROGRAM} test --config CONFIG [--ckpt_path RUN]

{list_configs(TRAINING)}

and what two runs made, or two folders of pictures, is compared:

  {PROGRAM} compare A B [--SETTING VALUE ...]

and many layouts are run over the same samples, by a CONFIG of these, and reported:

  {PROGRAM} sweep --config CONFIG [--SETTING VALUE ...]
  {PROGRAM} report RUN... [--SETTING VALUE ...]

{_lines(packaged_sweeps())}

and which layouts fit which GPUs, with what each would gain, is foreseen, on any computer:

  {PROGRAM} plan --config CONFIG [--gpus N ...] [--SETTING VALUE ...]

  try it, on any computer                  {PROGRAM} predict --config demo
  check all input, foresee time and disk   {PROGRAM} predict --config CONFIG --dry-run
  go on with a run that was stopped        {PROGRAM} predict --resume LOG_FOLDER
  all settings, with units and defaults    {PROGRAM} predict --help
  the same for training                    {PROGRAM} fit --help
  and for comparisons                      {PROGRAM} compare --help
  and for plans                            {PROGRAM} plan --help"""


def list_configs(kind: str = "") -> str:
    """The packaged configs of a subcommand, a line each: name and first comment.

    Args:
        kind: `TRAINING` for those that `fit` takes; empty for those that `predict` takes.
    """
    return _lines([name for name in packaged_configs() if is_training(name) == (kind == TRAINING)])


def _lines(names: list[str]) -> str:
    """A line for each config: name and first comment."""
    width = max(map(len, names))
    comments = ((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0] for name in names)
    return "\n".join(f"  {name:{width}}  {text.strip('# ')}" for name, text in zip(names, comments, strict=True))


def is_training(name: str) -> bool:
    """Whether a packaged config is for `fit`: its model is a module that trains."""
    return "class_path: asyncdiff_pl.models.training." in (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")


def packaged_configs() -> list[str]:
    """Names of the packaged configs for `predict` and `fit`."""
    return [name for name in _all_configs() if not name.startswith(SWEEP)]


def packaged_sweeps() -> list[str]:
    """Names of the packaged configs for `sweep`."""
    return [name for name in _all_configs() if name.startswith(SWEEP)]


def _all_configs() -> list[str]:
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def with_named_configs(arguments: list[str]) -> list[str]:
    """Turns names of packaged configs into paths; `--resume` alone takes the config of the run's log folder.

    Args:
        arguments: What stands behind the program's name.

    Raises:
        ValueError: There is no such config, or no such log folder.
    """
    found = [*arguments]
    given: dict[str, str] = {}
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        name = {"-c": "--config"}.get(name, name)
        if name not in ("--config", "--resume") or not (equals or at + 1 < len(arguments)):
            continue
        value = value if equals else arguments[at + 1]
        given[name] = find_config(value) if name == "--config" else find_log_folder(value)
        if name == "--config":
            _check_subcommand(arguments[0], given[name])
        found[at : at + 2 - len(equals)] = [f"{name}={given[name]}"] if equals else [name, given[name]]
    if arguments[0] in CHECKED and not given:
        found[1:1] = _config_beside(found)
    if "--resume" in given and "--config" not in given:
        config = Path(given["--resume"]) / "config.yaml"
        if not config.is_file():
            raise ValueError(f"{config.parent} holds no config.yaml; add the `--config` that the run was started with.")
        found[1:1] = ["--config", str(config)]
    return found


def _config_beside(arguments: list[str]) -> list[str]:
    """The config of the run that a checkpoint is of, as arguments; none where it has no log folder."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    if "--ckpt_path" not in words[:-1]:
        return []
    path = Path(words[words.index("--ckpt_path") + 1]).expanduser().resolve()
    configs = [folder / "config.yaml" for folder in (path, *path.parents[:2])]
    return next((["--config", str(config)] for config in configs if config.is_file()), [])


def find_config(name: str) -> str:
    """Path of a config that is given by its path or by its name in the package."""
    if Path(name).is_file():
        _check_yaml(name)
        return name
    plain = name.removeprefix("configs/").removesuffix(".yaml")
    candidate = CONFIGS / f"{plain}.yaml"
    if candidate.is_file():
        return str(candidate)
    near = difflib.get_close_matches(plain, packaged_configs(), 3)
    known = f"one of the package's ({', '.join(near)})" if near else "one of the package's"
    raise ValueError(
        f"There is no config {name}; give a YAML file or {known}: `python -m asyncdiff_pl --help` lists them."
    )


def _check_subcommand(subcommand: str, path: str) -> None:
    """Tells that a packaged config is one of the other subcommand."""
    file, packaged = Path(path).resolve(), CONFIGS.resolve()
    if not file.is_relative_to(packaged):
        return
    name = file.relative_to(packaged).with_suffix("").as_posix()
    own = "sweep" if name.startswith(SWEEP) else "fit" if is_training(name) else "predict"
    takes = {"plan": "predict", "validate": "fit", "test": "fit"}.get(subcommand, subcommand)
    if takes in ("fit", "predict", "sweep") and takes != own:
        raise ValueError(f"{name} is a config of `{own}`: {PROGRAM} {own} --config {name}.")


def _check_yaml(path: str) -> None:
    try:
        content = yaml.safe_load(Path(path).read_bytes())
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise ValueError(f"The config {path} is not YAML ({' '.join(str(error).split())}); mend it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"The config {path} holds no settings; {PROGRAM} --help lists configs to start from.")


def find_log_folder(name: str) -> str:
    """Path of a log folder, in full."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"There is no log folder {name} to resume; give the folder that the stopped run named.")
    return str(folder.resolve())

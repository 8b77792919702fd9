"""Options that several commands share, and options made from a settings dataclass.

A knob is written once, as a dataclass field with its default and one line of help (`metadata={"help": ...}`);
`settings_options` turns those fields into command-line options of a command that takes `**settings`.
"""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from mlx_llama3v.checkpoint import load_config, same_decoder
from mlx_llama3v.cli import show
from mlx_llama3v.config import TilingConfig
from mlx_llama3v.errors import RunError
from mlx_llama3v.hub import resolve
from mlx_llama3v.inference import Memory, Session, load

Model = Annotated[str, typer.Option("--model", help="Model directory (from `convert`) or Hub id.", show_default=False)]
Run = Annotated[Path | None, typer.Option("--run", help="Run directory (from `train`) to apply.", show_default=False)]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network (also HF_HUB_OFFLINE=1).")]
MaxSlices = Annotated[
    int | None,
    typer.Option("--max-slices", min=0, help="Slices beside the overview; 0: none.", show_default=False),
]


PRESETS = Path(__file__).parent / "presets"


def config_file(ctx: typer.Context, path: Path | None) -> Path | None:
    """Callback of `--config FILE.toml`: its values become the defaults, the command line wins.

    With `train`, a name that is no file may be that of a preset of this package.
    """
    if path is None:
        return None
    presets = ctx.command.name == "train"
    if (
        presets
        and not path.is_file()
        and (preset := PRESETS / path.with_suffix(".toml").name).is_file()
        and path.parent == Path()
    ):
        path = preset
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        ours = " and ".join(sorted(file.stem for file in PRESETS.glob("*.toml")))
        or_preset = f", or one of the presets {ours}" if presets else ""
        raise RunError(f"{path} is missing; expected a TOML file with options of this command{or_preset}.") from None
    except (ValueError, OSError) as error:
        raise RunError(f"{path} is not a TOML file: {error}.") from error
    values = {key.replace("-", "_"): value for key, value in values.items()}
    if tables := [key for key, value in values.items() if isinstance(value, dict)]:
        raise RunError(f"{path}: [{tables[0]}] is a section; options stand in none, as `iters = 100`.")
    names = {parameter.name for parameter in ctx.command.params}
    if unknown := sorted(values.keys() - names):
        known = [name for name in names if name]
        near = {key: get_close_matches(key, known, 1) for key in unknown}
        what = ", ".join(key + (f" (did you mean {near[key][0]}?)" if near[key] else "") for key in unknown)
        raise RunError(f"{path}: {what} is no option of `{ctx.command.name}`.")
    parameters = {parameter.name: parameter for parameter in ctx.command.params}
    values = {key: _toml_value(ctx, path, parameters[key], value) for key, value in values.items()}
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


def _toml_value(ctx: typer.Context, path: Path, parameter: Any, value: Any) -> Any:
    """What an option makes of a value of a TOML file, which is held to the same as on the command line.

    Raises RunError that names the file.
    """
    flag, many = getattr(parameter, "is_bool_flag", False), getattr(parameter, "multiple", False)
    given = value if many and isinstance(value, list) else [value]
    if any(isinstance(one, bool) != flag for one in given):
        expected = "true or false" if flag else "a value, since it is no switch"
        raise RunError(f"{path}: {parameter.name} is {json.dumps(value, default=str)}; expected {expected}.")
    made = value if flag else [str(one) for one in given] if many else str(value)  # int(1.5) would be 1
    try:
        parameter.process_value(ctx, made)
    except typer.BadParameter as error:
        what = error.message.rstrip(".")
        raise RunError(f"{path}: {parameter.name} is {json.dumps(value, default=str)}: {what}.") from error
    return [str(one) for one in given] if many else value


def _config_option(help: str) -> Any:
    return typer.Option("--config", "-c", callback=config_file, is_eager=True, help=help)


Config = Annotated[Path | None, _config_option("TOML file with defaults for these options.")]
TrainConfigFile = Annotated[
    Path | None, _config_option("TOML file with defaults for these options, or a preset's name (pretrain, sft).")
]


def byte_count(text: str) -> int:
    """ "50GB" -> 50,000,000,000. Raises RunError for what is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)[bB]?\s*", text)
    if match is None or float(match[1]) == 0:
        raise RunError(f"{text!r} is no size on disk; expected something like 50GB or 800MB.")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def settings_options(cls: type, skip: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command that ends in `**settings` one option for each field of dataclass `cls`, except `skip`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(cls)
        own = inspect.signature(function, eval_str=True)
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        made = [_parameter(f, hints[f.name]) for f in fields(cls) if f.name not in skip]
        function.__signature__ = own.replace(parameters=[*kept, *made])  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in [*kept, *made]}
        return function

    return decorate


def _parameter(item: Field[Any], hint: Any) -> inspect.Parameter:
    default = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc]
    name = item.name.replace("_", "-")
    flags = item.metadata.get("flags") or ([f"--{name}/--no-{name}"] if hint is bool else [f"--{name}"])
    if get_origin(hint) is tuple:  # a repeatable option; Typer knows those as lists
        hint, default = list[get_args(hint)[0]], list(default)  # type: ignore[misc]
    if choices := item.metadata.get("choices"):
        hint = Literal[choices]
    option = typer.Option(*flags, help=item.metadata.get("help", ""), min=item.metadata.get("min"))
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option]
    )


def given(ctx: typer.Context) -> set[str]:
    """The options of this call that came from the command line or from --config; the others have their defaults."""
    return {key for key in ctx.params if str(ctx.get_parameter_source(key)).endswith(("COMMANDLINE", "DEFAULT_MAP"))}


def tiling(base: TilingConfig, max_slices: int | None) -> TilingConfig:
    """`base` with the cap that was asked for."""
    return base if max_slices is None else TilingConfig(base.mode, max_slices)


def split_settings(values: dict[str, Any], *classes: type) -> list[Any]:
    """One instance of each settings class from the options that `settings_options` made of them."""
    return [cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values}) for cls in classes]


def warn_misfit(model: Path, run: Path | None) -> None:
    """Say that a model cannot see yet, or that a run is of another one: its answers look like those of a bad one."""
    if run is not None:
        warn_decoder(model, run)
    elif load_config(model).untrained:
        show.warn(f"note: the projector of {model} is untrained, so it cannot see; train one, and give it with --run.")


def warn_decoder(model: Path, run: Path) -> None:
    """Say that a run learned beside other weights."""
    if not same_decoder(model, run):
        show.warn(f"note: {run} was trained with another decoder than that of {model}; here it may do badly.")


def open_session(
    model: str,
    run: Path | None,
    system: str | None,
    max_slices: int | None,
    offline: bool,
    memory: Memory | None = None,
) -> Session:
    """A chat session on a model directory and, if given, a run; used by `chat` and `generate`."""
    session = load(path := resolve(model, offline=offline), run, system=system, memory=memory)
    warn_misfit(path, run)
    if session.encoder is not None:
        session.encoder.tiling = tiling(session.encoder.tiling, max_slices)
    return session

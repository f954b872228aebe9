"""Dynamic-rank training in a script that knows nothing of it::

    python -m hf_drt.run script.py --drt_schedule "factored@0 dense@40% adapter@80%" <the script's own flags>
    python -m hf_drt.run -m package.module --drt_schedule paper <the module's own flags>
    torchrun --nproc_per_node 2 -m hf_drt.run script.py ...
    accelerate launch -m hf_drt.run script.py ...

The ``drt_*`` flags are taken off the command line; the script gets the others. While it runs, ``Trainer`` and
``Seq2SeqTrainer`` of transformers are subclasses of themselves with :class:`hf_drt.DRTTrainerMixin` in them, so that
every trainer derived from them, in the script or in a library, trains in dynamic rank. A script without such a trainer
ends with an error, since it has trained without DRT. Settings in the script itself are an error too.

Without ``drt_*`` flags it runs what loads models and does not train them: native checkpoints load as in any process
that has imported hf_drt, and the log says how many did. A ``Trainer`` ends such a run with an error, as it is made::

    python -m hf_drt.run -m lm_eval --model hf --model_args pretrained=FOLDER --tasks TASK

transformers is imported before the script is: environment variables that it reads on import (``HF_HOME``,
``HF_HUB_OFFLINE``) are set in the shell, not in the script. Processes that the script spawns are plain.
"""

import contextlib
import difflib
import functools
import importlib.util
import logging
import os
import runpy
import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

from transformers import HfArgumentParser, Seq2SeqTrainer, Trainer

from hf_drt.config import DRTConfig
from hf_drt.native_format import LOADED
from hf_drt.trainer import PREFIX, DRTFields, DRTTrainerMixin, checked_config

PROGRAM = "python -m hf_drt.run"
USAGE = f"{PROGRAM} (script.py | -m module) [--drt_schedule SCHEDULE [other --drt_ flags]] [the script's flags]"

logger = logging.getLogger("hf_drt.run")  # of this name as a program too


@dataclass
class RunFields:
    """What the command line says of the run itself, which is no setting of a plan."""

    drt_resume: Literal["never", "auto"] = field(
        default="never",
        metadata={
            "help": "Where the script's train() names no checkpoint: 'never' leaves it at that; 'auto' goes on from "
            "the last complete checkpoint in output_dir, and begins anew while there is none. For jobs that are "
            "started again after a failure, as by torchrun --max-restarts."
        },
    )


class Flags:
    """Settings from the command line, and whether a trainer has asked for them."""

    def __init__(self, config: DRTConfig):
        self.config = config
        self.taken = False

    def __call__(self) -> DRTConfig:
        self.taken = True
        return self.config


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script that the command line names; ``arguments`` are ``sys.argv[1:]`` by default.

    Raises:
        SystemExit: Of the script; or with status 2 for a wrong command line, and 1 where the script made no trainer for
            the flags, or one without flags.
    """
    target, is_module, config, rest, run = read_command(sys.argv[1:] if arguments is None else list(arguments))
    loaded, refused = len(LOADED), refused_trainers(_missing(target, is_module, rest))
    with refused if config is None else dynamic_rank_trainers(config, run.drt_resume) as flags:
        try:
            execute(target, is_module, rest)
        except SystemExit as end:
            if end.code or _asks_for_help(rest):
                raise
        except TypeError as error:
            if DRTTrainerMixin.__name__ in str(error) and "MRO" in str(error):
                error.add_note(
                    "hf_drt.run has put DRTTrainerMixin into transformers' Trainer already. Run a script that uses it "
                    "itself without hf_drt.run."
                )
            raise
    if flags is None:
        _tell(target, LOADED[loaded:])
    elif not flags.taken:
        sys.exit(
            f"hf_drt.run: {target} made no transformers.Trainer, so nothing of this run was dynamic-rank training: "
            "--drt_schedule had no effect. A script with a training loop of its own needs hf_drt.DynamicRank in that "
            "loop; one that starts its own processes is launched with torchrun instead; one that only loads native "
            "checkpoints runs without --drt_ flags."
        )


def _tell(target: str, loaded: list[str]) -> None:
    """What hf_drt did in a script without flags."""
    if loaded:
        classes = ", ".join(dict.fromkeys(loaded))
        logger.info("%s loaded native checkpoints, %d in number, as %s.", target, len(loaded), classes)
    else:
        logger.info("%s loaded no native checkpoint: it did what it does without hf_drt.run.", target)


# ---- the command line


def read_command(words: list[str]) -> tuple[str, bool, DRTConfig | None, list[str], RunFields]:
    """(script or module, whether it is a module, settings, the script's own flags, the run's) of a command line.

    The settings are None where it has no ``drt_*`` flags.

    Raises:
        SystemExit: With status 0 after ``--help``; with status 2 and a message on stderr where something is wrong.
    """
    parser = HfArgumentParser(
        cast(Any, [DRTFields, RunFields]), prog=PROGRAM, usage=USAGE, allow_abbrev=False,
        description="Run a training script with dynamic-rank training in it.",
        epilog="The script comes first. Its own help: script.py --help.",
    )  # fmt: skip
    if words[:1] in (["-h"], ["--help"]):
        parser.print_help()
        sys.exit(0)
    is_module = words[:1] == ["-m"]
    words = words[is_module:]
    if not words or words[0].startswith("-"):
        what = "a module after -m" if is_module else "a script"
        parser.error(f"{what} comes first, before any flag; got {words[0] if words else 'nothing'}.")
    target = words[0]
    if not is_module and not Path(target).exists():
        parser.error(f"there is no file {target} (in {Path.cwd()}).")
    own, rest = split_flags(parser, words[1:])
    fields, run = parser.parse_args_into_dataclasses(own, look_for_args_file=False)
    try:
        config = checked_config(fields)
    except ValueError as error:
        parser.error(str(error))
    if config.schedule is not None:
        return target, is_module, config, rest, run
    if own and not _asks_for_help(rest):
        parser.error(_missing(target, is_module, rest))
    return target, is_module, None, rest, run


def _missing(target: str, is_module: bool, rest: list[str]) -> str:
    plain = shlex.join(["python", *["-m"] * is_module, target, *rest])
    return f"--drt_schedule is missing, e.g. --drt_schedule paper. Without DRT: {plain}"


def split_flags(parser: HfArgumentParser, words: list[str]) -> tuple[list[str], list[str]]:
    """The words of the parser's flags with their values, and all others in their order; all after ``--`` are others.

    Raises:
        SystemExit: A flag begins as the parser's do, but is none of them.
    """
    nargs = {option: action.nargs for action in parser._actions for option in action.option_strings}
    own: list[str] = []
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word == "--":
            return own, [*rest, word, *queue]
        flag, with_value, _ = word.partition("=")
        if not flag.replace("-", "_").startswith(f"__{PREFIX}"):
            rest.append(word)
            continue
        if flag not in nargs:
            parser.error(_unknown(flag, nargs))
        own.append(word)
        values = 0 if with_value else len(queue) if nargs[flag] == "+" else 1
        while values and queue and not queue[0].startswith("-"):
            own.append(queue.pop(0))
            values -= 1
    return own, rest


def _unknown(flag: str, known: Iterable[str]) -> str:
    spelled = [name for name in known if "-" not in name[2:]]
    close = difflib.get_close_matches("--" + flag[2:].replace("-", "_"), spelled, 2)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"{PROGRAM} --help shows them all."
    return f"there is no flag {flag}. {hint}"


def _asks_for_help(flags: list[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(flags)


# ---- the script


@contextlib.contextmanager
def dynamic_rank_trainers(config: DRTConfig, resume: str = "never") -> Iterator[Flags]:
    """While this lasts, the trainers of transformers are made with DRT, and ``config`` is every trainer's default, as
    ``resume`` (:class:`RunFields`) is that of every ``train()``."""
    flags = Flags(config)
    with _in_place(_stand_in(Trainer, DRTTrainerMixin, Trainer)):
        try:
            DRTTrainerMixin._drt_default = flags
            DRTTrainerMixin._drt_resume = None if resume == "never" else resume
            yield flags
        finally:
            DRTTrainerMixin._drt_default = DRTTrainerMixin._drt_resume = None


@contextlib.contextmanager
def refused_trainers(message: str) -> Iterator[None]:
    """While this lasts, the trainers of transformers end the program with a message as they are made; those of hf_drt,
    whose settings stand in the script, do not."""

    def refuse(self: Trainer, *args: Any, **kwargs: Any) -> None:
        sys.exit(f"hf_drt.run: {message}")

    with _in_place(_stand_in(Trainer, type("Refused", (Trainer,), {"__init__": refuse}))):
        yield


@contextlib.contextmanager
def _in_place(trainer: type) -> Iterator[None]:
    """While this lasts, scripts get this class as Trainer of transformers, and one below it as Seq2SeqTrainer."""
    # Below the new Trainer, so that isinstance(..., Trainer) holds for it.
    seq2seq = _stand_in(Seq2SeqTrainer, Seq2SeqTrainer, trainer)
    # Looked up now: importing parts of transformers replaces its top-level module, and older references are stale.
    modules = [sys.modules[name] for name in ("transformers", Trainer.__module__, Seq2SeqTrainer.__module__)]
    places = [(module, cls) for module in modules for cls in (trainer, seq2seq) if cls.__name__ in vars(module)]
    originals = [(module, cls.__name__, getattr(module, cls.__name__)) for module, cls in places]
    try:
        for module, cls in places:
            setattr(module, cls.__name__, cls)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _stand_in(original: type, *bases: type) -> type:
    """A class that others take for ``original``: same name, same module, same signature."""

    @functools.wraps(original.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super(made, self).__init__(*args, **kwargs)

    names = ("__module__", "__qualname__", "__doc__")
    made = type(original.__name__, bases, {name: getattr(original, name) for name in names} | {"__init__": __init__})
    return made


def execute(target: str, is_module: bool, flags: list[str]) -> None:
    """What ``python target *flags``, or ``python -m target *flags``, would do, in this process."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [target, *flags]
    try:
        if is_module:
            if not _module_exists(target):
                print(f"{PROGRAM}: error: there is no module {target} on Python's path.", file=sys.stderr)
                sys.exit(2)
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            if not sys.flags.safe_path:  # else Python itself leaves the script's folder out
                sys.path[0] = str(Path(target).resolve().parent)
            runpy.run_path(target, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


def _module_exists(name: str) -> bool:
    """Imports the packages above the module, so not before the trainers are in place."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):
            return False
        raise


# ---- as a program


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The traceback without the frames above the script's own."""
    above = {__file__, runpy.__file__, "<frozen runpy>"}
    inner = trace
    while inner is not None and inner.tb_frame.f_code.co_filename in above:
        inner = inner.tb_next
    traceback.print_exception(kind, error, inner or trace)


def _show_messages() -> None:
    """The plan and every switch on stderr, of the first process; not once more by the script's own logging."""
    if os.environ.get("RANK", "0") != "0":
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger = logging.getLogger("hf_drt")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    sys.excepthook = _print_exception
    _show_messages()
    main()

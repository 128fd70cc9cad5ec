"""The `puffer-jax` command: train and play policies, check and convert checkpoints, benchmark."""

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

import puffer_jax
from puffer_jax.bench.command import Bench
from puffer_jax.cli.autotune import Autotune
from puffer_jax.cli.check import Check
from puffer_jax.cli.convert import Convert
from puffer_jax.cli.eval import Eval
from puffer_jax.cli.export import Export
from puffer_jax.cli.plot import Plot
from puffer_jax.cli.sweep import Sweep
from puffer_jax.cli.train import Train, train_defaults


def _whole_number(words: list[str]) -> int:
    try:
        return int(words[0])
    except ValueError:
        number = float(words[0])
        if not number.is_integer():
            raise ValueError(f"{words[0]} is not a whole number") from None
        return int(number)


_integers = tyro.constructors.ConstructorRegistry()


@_integers.primitive_rule
def _integer(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[int] | None:
    """Take 1e6 for a million, as people write numbers of steps."""
    if info.type is not int:
        return None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=_whole_number,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


def _commands(train: Train) -> Any:
    one_way = tyro.conf.FlagCreatePairsOff
    return (
        Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Eval, tyro.conf.subcommand("eval"), one_way]
        | Annotated[Plot, tyro.conf.subcommand("plot")]
        | Annotated[Check, tyro.conf.subcommand("check"), one_way]
        | Annotated[Convert, tyro.conf.subcommand("convert"), one_way]
        | Annotated[Export, tyro.conf.subcommand("export"), one_way]
        | Annotated[Sweep, tyro.conf.subcommand("sweep"), one_way]
        | Annotated[Autotune, tyro.conf.subcommand("autotune"), one_way]
        | Annotated[Bench, tyro.conf.subcommand("bench"), one_way]
    )


def _print_warning(message: Warning | str, *details: object) -> None:
    print(f"puffer-jax: warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: run the command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"puffer-jax {puffer_jax.__version__}")
        return 0
    warnings.showwarning = _print_warning
    try:
        # A file or a run gives the defaults, and flags override them.
        train = train_defaults(argv[1:]) if argv[:1] == ["train"] else Train()
        command = tyro.cli(
            _commands(train),
            prog="puffer-jax",
            description=__doc__,
            args=argv,
            registry=_integers,
        )
        return command.run()
    except (ValueError, TypeError, RuntimeError, ArithmeticError, ImportError, OSError) as error:
        lines = [str(error) or type(error).__name__, *getattr(error, "__notes__", ())[-1:]]
        print("puffer-jax:", " ".join(" ".join(lines).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

"""Every scheme at the learning rate that is best for it: chosen on the hold-out, then scored on the test images.

    python -m benchmarks.tuning --data DIR --dataset-name cifar100 --arch resnet18_cifar --epochs 30
    python -m benchmarks.tuning ... --device cuda --processes 5         several runs at a time, which fills a GPU

Options and rows are those of ``benchmarks.accuracy``, without --lr and --select; --seeds are those of the test images.
A rate is the best one only where a lower and a higher one were tried: half and double are added until it is. A row that
exists is not run again, so a stopped command goes on when it is repeated. --save keeps the models of the test images.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from huggingface_hub.utils.tqdm import disable_progress_bars, tqdm

from benchmarks import accuracy
from benchmarks.accuracy import SELECTION_SEEDS, Run, Settings
from benchmarks.comparisons import BEST, Tuning, conditions_of, shared_settings
from benchmarks.timing import read_rows_of
from timm_convmix import PackingError

Words = tuple[str, ...]
"""A command line of ``benchmarks.accuracy``."""
MOST_RATES = 10
"""Tried for a scheme; where none of these lies between two worse ones, the scores say nothing."""


def run_all(commands: Iterable[Words], *, processes: int, what: str) -> None:
    """Run commands of ``benchmarks.accuracy``, several at a time in processes of their own.

    Args:
        commands: Their options.
        processes: At a time; 1 runs them here, with their progress.
        what: They are, for the progress bar.
    """
    todo = list(commands)
    if processes == 1:
        for words in tqdm(todo, desc=what, unit="command"):
            accuracy.main(words)
        return
    spawn = multiprocessing.get_context("spawn")  # a GPU does not survive a fork
    with ProcessPoolExecutor(processes, spawn, disable_progress_bars) as pool:
        for _ in tqdm(pool.map(accuracy.main, todo), total=len(todo), desc=what, unit="command"):
            pass


def what_was_tried(args: argparse.Namespace, settings: Settings) -> Tuning:
    """The runs on the hold-out in a setting, whatever the learning rate."""
    wanted = replace(shared_settings(settings), lr=BEST)
    conditions = conditions_of(read_rows_of(Run, args.results / "accuracy.csv"))
    found = (condition for condition in conditions if replace(condition.settings, lr=BEST) == wanted)
    return Tuning(sorted(found, key=lambda condition: condition.settings.lr))


def choose_rates(
    args: argparse.Namespace,
    settings: Settings,
    words: Words,
    *,
    rates: Sequence[float],
    seeds: Iterable[int],
    processes: int,
) -> dict[str, float]:
    """Try learning rates on the hold-out until each scheme's best one lies between two others.

    Args:
        args: The options of ``benchmarks.accuracy``.
        settings: Of any of its runs on the hold-out, with the backbone in question.
        words: The same options, as they were given.
        rates: Tried first.
        seeds: Each rate is tried with.
        processes: See ``run_all``.

    Returns:
        Scheme -> rate.

    Raises:
        ValueError: No rate is better than those around it.
    """
    todo = {(scheme, rate) for scheme in args.schemes for rate in rates}
    while todo:
        commands = [
            (
                *words,
                "--arch",
                settings.arch,
                "--select",
                "--schemes",
                scheme,
                "--lr",
                f"{rate:g}",
                "--seeds",
                f"{seed}",
            )
            for scheme, rate in sorted(todo)
            for seed in seeds
        ]
        run_all(commands, processes=processes, what="hold-out")
        tuning = what_was_tried(args, settings)
        todo = set()
        for scheme in args.schemes:
            tried = [condition.settings.lr for condition in tuning.tried(scheme)]
            best = tuning.best(scheme).settings.lr
            if best in (tried[0], tried[-1]):
                if len(tried) >= MOST_RATES:
                    shown = f"{tried[0]:g} to {tried[-1]:g}"
                    raise ValueError(f"{scheme}: no rate of {shown} is better than its neighbours; give other --rates.")
                todo.add((scheme, best / 2 if best == tried[0] else best * 2))
    return {scheme: tuning.best(scheme).settings.lr for scheme in args.schemes}


def build_parser() -> argparse.ArgumentParser:
    """The options beside those of ``benchmarks.accuracy``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.4], help="learning rates tried first")
    parser.add_argument(
        "--rate-seeds", type=int, nargs="+", default=SELECTION_SEEDS, metavar="N", help="on the hold-out (0 1 2)"
    )
    parser.add_argument("--save", metavar="DIR", help="as there, of the runs on the test images")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs at a time")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Choose the rates, and run what has no row yet; the exit status."""
    parser = build_parser()
    own, rest = parser.parse_known_args(argv)
    options = accuracy.build_parser()
    options.set_defaults(lr=BEST)
    options.prog = parser.prog
    args = options.parse_args(rest)
    if args.select or args.lr != BEST:
        parser.error("this chooses the learning rate, on the hold-out: leave out --lr and --select.")
    if len(set(own.rates)) == 1:
        parser.error("one rate leaves nothing to choose: give two or more --rates.")
    accuracy.fill_in(args)
    if twice := set(own.rate_seeds) & set(args.seeds):
        parser.error(f"seeds that choose a rate prove nothing: {min(twice)} is among --rate-seeds and --seeds.")
    try:
        accuracy.check_options(args)
        args.select = True
        found = accuracy.list_settings(args, accuracy.load_data(args).settings)
        for arch, settings in {settings.arch: settings for settings, _ in found}.items():
            rates = choose_rates(
                args, settings, tuple(rest), rates=own.rates, seeds=own.rate_seeds, processes=own.processes
            )
            print(f"{arch}: " + ", ".join(f"{scheme} {rate:g}" for scheme, rate in rates.items()))
            save = ("--save", own.save) if own.save else ()
            commands = [
                (*rest, *save, "--arch", arch, "--schemes", scheme, "--lr", f"{rate:g}", "--seeds", str(seed))
                for seed in args.seeds
                for scheme, rate in rates.items()
            ]
            run_all(commands, processes=own.processes, what="test images")
    except (ValueError, OSError, PackingError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())

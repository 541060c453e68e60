"""Runs of the evidence harness, compared: paired differences, the declared tests, the declared series.

Declared: in each setting ConvMix is tested against the last stage alone and against the control, on the test images, by
an exact sign-flip test of the paired differences, the two p values corrected by Holm's method; a difference is claimed
where eight pairs or more were run, the corrected p is below 0.05 and the bootstrap interval excludes zero. Whether the
relative reduction of the error grows along a series of settings is tested by Page's trend test with the seeds as
blocks; images are varied at equal steps. A variant replaces the default mixer where its mean difference to it over the
selection settings is the highest of those that meet the cost bars and more than two standard errors above zero.
Everything else is description. docs/experiments.md tells what of this was added when there were runs already.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import TypeVar

import numpy as np
from scipy import stats

from benchmarks.accuracy import SELECTION_SEEDS, Run, Settings
from benchmarks.schemes import PEERS, changes_of

LAST, CONTROL, CONVMIX = "last", "control", "convmix"
NAMES = {LAST: "last stage", CONTROL: "control", CONVMIX: "ConvMix"}
FORMERS = ("add", "layerscale")
"""Former defaults that ran where the present one did not: in most nets, and on all images. What was claimed with them
stays on record."""
LEVEL = 0.05
PAIRS, FEW_PAIRS = 8, 3
"""How many pairs a claim rests on at least, and how many a variant is judged by."""
TESTS = (LAST, CONTROL)
"""What ConvMix is tested against; declared, so that Holm's method counts both even where one was not run."""
RESAMPLES = 9999
RATE, BEST = 0.1, 0.0
"""The recipe's learning rate; settings with another one say so. And what stands for the best one of each scheme."""
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tiny": "Tiny-ImageNet", "imagenette": "Imagenette"}
"""How a data set is shown, by the name that the runs give it."""

STARTS = {"{arch}-{scheme}-{seed}.safetensors": "the nets", "{arch}-last-{seed}.safetensors": "the plain nets"}
"""What runs start from, by the name of the file."""


Row = TypeVar("Row", bound=Settings)


# Statistics -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Paired differences of two schemes over seeds.

    Args:
        values: Other minus base, one a seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return mean(self.values)

    def interval(self) -> tuple[float, float] | None:
        """Bootstrap interval of the mean, 95 %, BCa (Efron 1987); None below three seeds."""
        if len(self.values) < 3:
            return None
        if len(set(self.values)) == 1:  # resampling has nothing to say, and BCa divides by zero
            return self.values[0], self.values[0]
        data = (np.array(self.values),)
        found = stats.bootstrap(data, np.mean, n_resamples=RESAMPLES, confidence_level=1 - LEVEL, method="BCa", rng=0)
        return float(found.confidence_interval.low), float(found.confidence_interval.high)

    def sign(self) -> int | None:
        """1 or -1 where the interval lies above or below zero and p is below the level, else 0.

        The bootstrap of a few pairs is too narrow, so that the interval alone would see too much. None where no p of so
        few pairs can be below the level.
        """
        interval = self.interval()
        if interval is None or 2 / 2 ** len(self.values) >= LEVEL:
            return None
        return (interval[0] > 0) - (interval[1] < 0) if self.p_value() < LEVEL else 0

    def p_value(self) -> float:
        """Two-sided p of the sign-flip test of the mean, exact: all ``2 ** n`` signs are counted."""
        data = (np.array(self.values),)
        found = stats.permutation_test(data, np.mean, permutation_type="samples", n_resamples=np.inf)
        return float(found.pvalue)


def paired(base: Mapping[int, float], own: Mapping[int, float]) -> Difference | None:
    """Of values by seed, ``own - base``, over the seeds that both have; None where there are none."""
    seeds = sorted(base.keys() & own.keys())
    return Difference(tuple(own[seed] - base[seed] for seed in seeds)) if seeds else None


def holm(p_values: Mapping[str, float], tests: int) -> dict[str, float]:
    """Holm's correction (1979).

    Args:
        p_values: Of the tests that could be made.
        tests: How many were declared.
    """
    corrected, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (tests - rank) * p_values[name]))
        corrected[name] = highest
    return corrected


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for one value, nan where one is not finite."""
    return float(np.std(values, ddof=1)) / sqrt(len(values)) if len(values) > 1 else None


# Settings -------------------------------------------------------------------------------------------------------------

FREE = dict(scheme="", seed=0, init_sha256="", data="")


@dataclass(frozen=True)
class Condition:
    """All runs that differ in scheme and seed only.

    Args:
        settings: What they share.
        runs: Scheme -> seed -> run.
    """

    settings: Settings
    runs: dict[str, dict[int, Run]]

    def seeds(self, *schemes: str) -> list[int]:
        """Those that every one of some schemes was run with."""
        return sorted(set.intersection(*(set(self.runs.get(scheme, ())) for scheme in schemes)))

    def values(self, scheme: str, name: str = "top1") -> list[float]:
        """One a seed, of a column."""
        return [getattr(run, name) for _, run in sorted(self.runs[scheme].items())]

    def difference(self, base: str, other: str, name: str = "top1") -> Difference | None:
        """Of a column, over the seeds that both have; None where there are none."""
        return paired(
            *({seed: getattr(run, name) for seed, run in self.runs.get(s, {}).items()} for s in (base, other))
        )

    def reductions(self, base: str, other: str) -> dict[int, float]:
        """By how many percent the error falls, for each seed that both have."""
        return {
            seed: 100 * (1 - (100 - self.runs[other][seed].top1) / (100 - self.runs[base][seed].top1))
            for seed in self.seeds(base, other)
            if self.runs[base][seed].top1 < 100
        }

    @property
    def params(self) -> int:
        """Of the smallest scheme that was run: the backbone's, where the last stage was."""
        return min(run.params for by_seed in self.runs.values() for run in by_seed.values())


def conditions_of(runs: Iterable[Run]) -> list[Condition]:
    """Group runs, in the order in which the first of each group was made.

    What was scored on the test images with seeds that choose on the hold-out proves nothing, and is left out. The plain
    backbone's runs that start from their own nets stand beside the warm starts from the same nets too.

    Raises:
        ValueError: Two groups differ in their data alone.
    """
    groups: dict[Settings, dict[str, dict[int, Run]]] = {}
    digests: dict[Settings, str] = {}
    for run in runs:
        if run.split == "test" and run.seed in SELECTION_SEEDS:
            continue
        shared = shared_settings(run)
        if digests.setdefault(shared, run.data) != run.data:
            raise ValueError(
                f"Runs on {run.dataset} saw different images ({digests[shared]}, {run.data}): name them apart."
            )
        groups.setdefault(shared, {}).setdefault(run.scheme, {})[run.seed] = run
    for shared, by_scheme in groups.items():
        warm = replace(shared, init=shared.init.replace("{scheme}", LAST))
        if warm != shared and warm in groups and LAST in by_scheme:  # its own nets are the plain ones
            groups[warm][LAST] = by_scheme[LAST] | groups[warm].get(LAST, {})
    return [Condition(settings, by_scheme) for settings, by_scheme in groups.items()]


def proving(rows: Iterable[Row]) -> list[Row]:
    """Rows of what was measured on saved nets, without those of nets whose seeds or images chose something."""
    return [row for row in rows if row.split == "test" and row.seed not in SELECTION_SEEDS]


def names_under(former: str) -> dict[str, str]:
    """What stood for ConvMix and its control while a scheme was the default, and what they are compared with."""
    return {former: CONVMIX, f"{CONTROL}-{former}": CONTROL} | {peer: peer for peer in PEERS}


def former_conditions(conditions: Iterable[Condition], former: str) -> list[Condition]:
    """Conditions as they were while ``former`` was the default, without its variants."""
    names = names_under(former)
    found = (replace(c, runs={names[s]: runs for s, runs in c.runs.items() if s in names}) for c in conditions)
    return [condition for condition in found if condition.runs]


def former_rows(rows: Iterable[Row], former: str) -> list[Row]:
    """Rows of what was measured on saved nets, as ``former_conditions``, where ``former`` was measured."""
    names, rows = names_under(former), list(rows)
    measured = {replace(shared_settings(row), lr=BEST) for row in rows if row.scheme == former}
    chosen = (row for row in rows if replace(shared_settings(row), lr=BEST) in measured)
    return [replace(row, scheme=names[row.scheme]) for row in chosen if row.scheme in names]


def shared_settings(row: Settings) -> Settings:
    """What rows of all schemes and seeds share."""
    return Settings(**{name: getattr(row, name) for name in Settings.__dataclass_fields__} | FREE)


def name_of(settings: Settings) -> str:
    """The data set's name, as it is shown."""
    return DATASETS.get(settings.dataset, settings.dataset)


def title(settings: Settings) -> str:
    """What a setting is about: data set, part of it, size, backbone, length, warm-up, start."""
    words = [f"{name_of(settings)}, {settings.classes} classes"]
    if settings.fraction < 1:
        words.append(f"{settings.images} images")
    words.append(f"{settings.size} px, {settings.arch}, {settings.epochs} epochs")
    if settings.warmup:
        words.append(f"warm-up {settings.warmup:g}")
    if settings.lr != RATE:
        words.append(f"learning rate {settings.lr:g}" if settings.lr != BEST else "each at its best learning rate")
    if settings.init:
        start = Path(settings.init)
        nets = f"{STARTS[start.name]} of {start.parent}" if start.name in STARTS else str(start)
        words.append(f"{'linear probe' if settings.freeze else 'fine-tuned'} from {nets}")
    return ", ".join(words)


def named(settings: Settings) -> str:
    """Its title where the learning rates stand beside it, or are told of all."""
    return title(replace(settings, lr=RATE))


def is_proof(condition: Condition) -> bool:
    """Whether it was scored on the test images."""
    return condition.settings.split == "test"


def all_runs(conditions: Iterable[Condition]) -> list[Run]:
    """Every run of some conditions, once."""
    runs = (run for condition in conditions for by_seed in condition.runs.values() for run in by_seed.values())
    return list({run.key: run for run in runs}.values())


def alike(conditions: Iterable[Condition], shared: Callable[[Settings], Settings]) -> Iterator[list[Condition]]:
    """Groups of what shares something."""

    def key(condition: Condition) -> str:
        return str(shared(condition.settings))

    for _, group in groupby(sorted(conditions, key=key), key=key):
        yield list(group)


def backbones(conditions: Iterable[Condition]) -> list[list[Condition]]:
    """Settings that differ in the backbone only, and have both schemes."""
    usable = (condition for condition in conditions if condition.seeds(LAST, CONVMIX))
    return [group for group in alike(usable, partial(replace, arch="")) if len(group) > 1]


# What was declared ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What a declared test says.

    Args:
        seeds: Pairs it rests on.
        p: After Holm's correction; None where the seeds are too few for any claim.
        claim: 1 where ConvMix is claimed to be better, -1 worse, 0 neither.
    """

    seeds: int
    p: float | None
    claim: int

    def __str__(self) -> str:
        if self.p is None:
            return f"n = {self.seeds}: no claim"
        return f"**p = {self.p:.3f}**" if self.claim else f"p = {self.p:.3f}: no claim"


def verdicts(condition: Condition) -> dict[str, Verdict]:
    """One for each declared test of which both schemes were run."""
    found = {base: difference for base in TESTS if (difference := condition.difference(base, CONVMIX))}
    p_values = {base: difference.p_value() for base, difference in found.items() if len(difference.values) >= PAIRS}
    corrected = holm(p_values, len(TESTS))
    result = {}
    for base, difference in found.items():
        claim = (difference.sign() or 0) if corrected.get(base, 1) < LEVEL else 0
        result[base] = Verdict(len(difference.values), corrected.get(base), claim)
    return result


@dataclass(frozen=True)
class Candidate:
    """A scheme beside the default, on the hold-out.

    Args:
        scheme: Its name.
        differences: To ConvMix, one a setting that holds both.
    """

    scheme: str
    differences: tuple[Difference, ...]

    @property
    def mean(self) -> float:
        """Over the settings."""
        return mean(d.mean for d in self.differences)

    @property
    def error(self) -> float | None:
        """Its standard error, that of the seeds within the settings; None where a setting has too few."""
        errors = [standard_error(d.values) or 0 for d in self.differences if len(d.values) >= FEW_PAIRS]
        if len(errors) < len(self.differences):
            return None
        return sqrt(sum(error**2 for error in errors)) / len(errors)

    @property
    def pairs(self) -> int:
        """Of runs."""
        return sum(len(d.values) for d in self.differences)


@dataclass(frozen=True)
class Tuning:
    """Settings that differ in the learning rate only, on the hold-out.

    Args:
        conditions: By rising rate.
    """

    conditions: list[Condition]

    @property
    def settings(self) -> Settings:
        """What they share."""
        return replace(self.conditions[0].settings, lr=BEST)

    def schemes(self) -> list[str]:
        """Those that were run at more than one rate."""
        names = [scheme for condition in self.conditions for scheme in condition.runs]
        return [scheme for scheme in dict.fromkeys(names) if names.count(scheme) > 1]

    def tried(self, scheme: str) -> list[Condition]:
        """Those that hold a scheme."""
        return [condition for condition in self.conditions if scheme in condition.runs]

    def best(self, scheme: str) -> Condition:
        """The condition whose rate suits a scheme best: whose least lead over any other is the highest.

        Leads are over the seeds that two rates share, so that a rate given up after one seed costs the others nothing.
        """
        tried = self.tried(scheme)

        def lead(own: Condition, other: Condition) -> float:
            difference = paired(*({seed: run.top1 for seed, run in c.runs[scheme].items()} for c in (other, own)))
            return difference.mean if difference else mean(own.values(scheme)) - mean(other.values(scheme))

        return max(tried, key=lambda own: min((lead(own, other) for other in tried if other is not own), default=0.0))

    def settled(self) -> list[str]:
        """Schemes that were tried at a lower and at a higher rate than their best one."""
        return [scheme for scheme in self.schemes() if self.best(scheme) in self.tried(scheme)[1:-1]]

    def chosen_for(self, settings: Settings) -> bool:
        """Whether its rates are for a setting on the test images: of as many images or as large a part, else equal."""
        own = self.settings
        free = partial(replace, split="", lr=BEST, images=0, fraction=0.0)
        as_large = settings.images == own.images or settings.fraction == own.fraction
        return settings.split == "test" and as_large and free(settings) == free(own)

    def difference(self, base: str, other: str) -> Difference | None:
        """Of accuracies, each scheme at the rate that suits it best, over the seeds that both have there."""
        arms = (self.best(scheme).runs[scheme] for scheme in (base, other))
        return paired(*({seed: run.top1 for seed, run in arm.items()} for arm in arms))


def at_best_rates(conditions: Sequence[Condition]) -> list[Condition]:
    """The runs on the test images that have, for each scheme, the learning rate that was best for it on the hold-out.

    Returns:
        One a setting that the last stage and ConvMix were run in so, its rate ``BEST``.
    """
    found = []
    for tuning in tunings_of(conditions):
        rates = {scheme: tuning.best(scheme).settings.lr for scheme in tuning.settled()}
        for group in alike((c for c in conditions if tuning.chosen_for(c.settings)), partial(replace, lr=BEST)):
            tests = {c.settings.lr: c for c in group}
            runs = {s: tests[lr].runs[s] for s, lr in rates.items() if lr in tests and s in tests[lr].runs}
            if {LAST, CONVMIX} <= runs.keys():
                found.append(Condition(replace(group[0].settings, lr=BEST), runs))
    return found


def rows_at_best_rates(rows: Sequence[Row], best: Iterable[Condition]) -> list[Row]:
    """Rows whose rate is ``BEST`` where the net was trained at the one that was best for its scheme, these first.

    Args:
        rows: Of anything that was measured on saved nets.
        best: What ``at_best_rates`` gave.
    """
    rates = {(c.settings, scheme): runs[min(runs)].lr for c in best for scheme, runs in c.runs.items()}
    found = ((row, replace(row, lr=BEST)) for row in rows)
    named = [same if rates.get((shared_settings(same), row.scheme)) == row.lr else row for row, same in found]
    return sorted(named, key=lambda row: row.lr != BEST)


def proofs(conditions: Sequence[Condition]) -> list[Condition]:
    """What was scored on the test images: each scheme at its best rate, or all at one where the best are not known."""
    best = at_best_rates(conditions)
    tuned = {condition.settings for condition in best}
    others = (condition for condition in conditions if is_proof(condition))
    return [*best, *(c for c in others if replace(c.settings, lr=BEST) not in tuned)]


def tunings_of(conditions: Iterable[Condition], scheme: str = CONVMIX) -> list[Tuning]:
    """Those in which both the last stage and a scheme were run at several learning rates."""
    groups = alike((c for c in conditions if not is_proof(c)), partial(replace, lr=BEST))
    found = [Tuning(sorted(group, key=lambda c: c.settings.lr)) for group in groups]
    return [tuning for tuning in found if {LAST, scheme} <= set(tuning.schemes())]


def candidates(conditions: Iterable[Condition]) -> list[Candidate]:
    """Those of the hold-out at the recipe's learning rate, best first."""
    usable = [c for c in conditions if not is_proof(c) and c.settings.lr == RATE]
    return ranked((scheme, c.difference(CONVMIX, scheme)) for c in usable for scheme in c.runs)


def tuned_candidates(tunings: Iterable[Tuning]) -> list[Candidate]:
    """Those whose best rate lies within those tried, each at its own, best first."""
    return ranked((s, t.difference(CONVMIX, s)) for t in tunings for s in t.settled() if CONVMIX in t.settled())


def unsettled(tunings: Iterable[Tuning]) -> list[str]:
    """Candidates of which nowhere a lower and a higher rate than the best one were tried."""
    tunings = list(tunings)
    settled = {scheme for tuning in tunings for scheme in tuning.settled()}
    tried = dict.fromkeys(scheme for tuning in tunings for scheme in tuning.schemes())
    return [scheme for scheme in tried if is_variant(scheme) and scheme not in settled]


def is_variant(scheme: str) -> bool:
    """Whether it could be the default: not ConvMix itself, a peer or a control.

    Nor is it what leaves the residual out: it cannot start warm, and its map is the same in every cell.
    """
    named = scheme in (CONVMIX, *PEERS) or scheme.startswith(CONTROL)
    return not named and bool(changes_of(scheme).get("residual", True))


def ranked(differences: Iterable[tuple[str, Difference | None]]) -> list[Candidate]:
    """Candidates of differences to ConvMix, the highest mean first.

    Settings with fewer than ``FEW_PAIRS`` pairs of runs count only for those that have no others.
    """
    found: dict[str, list[Difference]] = {}
    for scheme, difference in differences:
        if difference and is_variant(scheme):
            found.setdefault(scheme, []).append(difference)
    judged = {name: [d for d in those if len(d.values) >= FEW_PAIRS] or those for name, those in found.items()}
    return sorted((Candidate(name, tuple(those)) for name, those in judged.items()), key=lambda one: -one.mean)


@dataclass(frozen=True)
class Series:
    """Settings that differ in one thing that has an order.

    Args:
        what: The thing.
        conditions: In its order.
        position: Where a condition lies.
    """

    what: str
    conditions: list[Condition]
    position: Callable[[Condition], float]

    @property
    def images(self) -> str:
        """Of which data set, on which backbone, and at which learning rates."""
        settings = self.conditions[-1].settings
        words = [" and ".join(dict.fromkeys(name_of(condition.settings) for condition in self.conditions))]
        if len({condition.settings.arch for condition in self.conditions}) == 1:
            words.append(settings.arch)
        return ", ".join([*words, *["each at its best learning rate"] * (settings.lr == BEST)])

    def table(self) -> list[tuple[float, dict[int, float]]]:
        """Position, and relative reduction of the error for each seed, a setting."""
        return [(self.position(condition), condition.reductions(LAST, CONVMIX)) for condition in self.conditions]

    @property
    def seeds(self) -> list[int]:
        """That every setting was run with."""
        return sorted(set.intersection(*(set(reductions) for _, reductions in self.table())))

    def p_value(self, *, falls: bool = False) -> float | None:
        """Of Page's test that the reduction grows, or that it falls (one-sided); None where there is too little for it.

        That is below three settings or two common seeds.
        """
        columns = [reductions for _, reductions in self.table()]
        if len(columns) < 3 or len(self.seeds) < 2:
            return None
        blocks = [[column[seed] for column in (columns[::-1] if falls else columns)] for seed in self.seeds]
        return float(stats.page_trend_test(blocks).pvalue)

    def rise(self) -> Difference | None:
        """Of the reduction, from the first setting to the last, by seed; None without a common one."""
        (_, first), *_, (_, last) = self.table()
        return paired(first, last)


def series_of(conditions: Sequence[Condition]) -> list[Series]:
    """All else equal: class count, training images at about equal steps, epochs, image size, parameters of a ResNet.

    With the class count of Tiny-ImageNet the images grow, and so the steps; from CIFAR-10 to CIFAR-100 they stay.
    """
    axes: dict[str, tuple[Callable[[Settings], Settings], Callable[[Condition], float]]] = {
        "number of classes": (of_any_classes, lambda c: c.settings.classes),
        "training images": (at_equal_steps, lambda c: c.settings.images),
        "epochs": (partial(replace, epochs=0), lambda c: c.settings.epochs),
        "image size": (partial(replace, size=0, padding=0), lambda c: c.settings.size),
        "parameters of a ResNet": (partial(replace, arch=""), lambda c: c.params),
    }
    usable = [c for c in conditions if c.reductions(LAST, CONVMIX) and not c.settings.init]
    found = []
    for what, (shared, position) in axes.items():
        chosen = [c for c in usable if shared(c.settings).arch or c.settings.arch.startswith("resnet")]
        for group in alike(chosen, shared):
            ordered = sorted(group, key=position)
            if len(ordered) > 1:
                found.append(Series(what, ordered, position))
    return found


def of_any_classes(settings: Settings) -> Settings:
    """Settings whose class count is free, and with it which CIFAR it is, and how many images make up the same part."""
    return replace(settings, dataset=settings.dataset.rstrip("0123456789"), classes=0, images=0)


def at_equal_steps(settings: Settings) -> Settings:
    """Settings whose number of images is free, and that saw as many in all."""
    return replace(settings, fraction=0.0, images=0, epochs=settings.images * settings.epochs)

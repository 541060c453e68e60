"""What the runs say: the tables of README and docs, and the plots, from the CSVs of benchmarks/results.

    python -m benchmarks.report                     print both texts
    python -m benchmarks.report --write             into README.md (between markers) and docs/evidence.md
    python -m benchmarks.report --check             exit 1 where a number there differs from the CSVs
    python -m benchmarks.report --plots             docs/figures/*.svg; needs matplotlib

Declared before any run: in each setting ConvMix is tested against the last stage alone and against the control, on the
test images, by an exact sign-flip test of the paired differences, the two p values corrected by Holm's method; a
difference is claimed where the corrected p is below 0.05 and the bootstrap interval excludes zero. Whether the
relative reduction of the error grows along a series of settings is tested by Page's trend test with the seeds as
blocks; images are varied at equal steps. A variant replaces the default mixer where its mean difference to it over the
selection settings is the highest of those that meet the cost bars and more than two standard errors above zero.
Everything else is description.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import groupby
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.accuracy import Run, Settings
from benchmarks.robustness import CLEAN, Robustness
from benchmarks.saliency import MEASURES, Saliency
from benchmarks.timing import README, RESULTS, ROOT, markdown, read_rows_of, show_tables

DOCUMENT = ROOT / "docs" / "evidence.md"
FIGURES = ROOT / "docs" / "figures"
DIFFERENCES = "differences.svg"
LAST, CONTROL, CONVMIX = "last", "control", "convmix"
LEVEL = 0.05
TESTS = (LAST, CONTROL)
"""What ConvMix is tested against; declared, so that Holm's method counts both even where one was not run."""
RESAMPLES = 9999
DIVISIONS = {"--seeds", "--schemes", "--save", "--results"}
"""Options by which several processes share a table; its lines say which seeds and schemes were run."""
STARTS = {"{arch}-{scheme}-{seed}.safetensors": "the nets", "{arch}-last-{seed}.safetensors": "the plain nets"}
"""What runs start from, by the name of the file."""
NAMES = {LAST: "last stage", CONTROL: "control", CONVMIX: "ConvMix"}


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
        """1 or -1 where the interval lies above or below zero, 0 where it holds it; None below three seeds."""
        interval = self.interval()
        return (interval[0] > 0) - (interval[1] < 0) if interval else None

    def p_value(self) -> float:
        """Two-sided p of the sign-flip test of the mean, exact: all ``2 ** n`` signs are counted."""
        data = (np.array(self.values),)
        found = stats.permutation_test(data, np.mean, permutation_type="samples", n_resamples=np.inf)
        return float(found.pvalue)


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


def can_claim(seeds: int) -> bool:
    """Whether the smallest p that the sign-flip test can give, corrected, lies below the level."""
    return len(TESTS) * 2 / 2**seeds < LEVEL


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for one value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


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
        pairs = [(self.runs[base][seed], self.runs[other][seed]) for seed in self.seeds(base, other)]
        return Difference(tuple(getattr(b, name) - getattr(a, name) for a, b in pairs)) if pairs else None

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

    Raises:
        ValueError: Two groups differ in their data alone.
    """
    groups: dict[Settings, dict[str, dict[int, Run]]] = {}
    digests: dict[Settings, str] = {}
    for run in runs:
        shared = shared_settings(run)
        if digests.setdefault(shared, run.data) != run.data:
            raise ValueError(
                f"Runs on {run.dataset} saw different images ({digests[shared]}, {run.data}): name them apart."
            )
        groups.setdefault(shared, {}).setdefault(run.scheme, {})[run.seed] = run
    return [Condition(settings, by_scheme) for settings, by_scheme in groups.items()]


def shared_settings(row: Settings) -> Settings:
    """What rows of all schemes and seeds share."""
    return Settings(**{name: getattr(row, name) for name in Settings.__dataclass_fields__} | FREE)


def title(settings: Settings) -> str:
    """What a setting is about: data set, part of it, size, backbone, start."""
    words = [f"{settings.dataset}, {settings.classes} classes"]
    if settings.fraction < 1:
        words.append(f"{settings.images} images")
    words.append(f"{settings.size} px, {settings.arch}, {settings.epochs} epochs")
    if settings.init:
        start = Path(settings.init)
        nets = f"{STARTS[start.name]} of {start.parent}" if start.name in STARTS else str(start)
        words.append(f"{'linear probe' if settings.freeze else 'fine-tuned'} from {nets}")
    return ", ".join(words)


def recipe(settings: Settings) -> str:
    """How a setting was trained."""
    return (
        f"{settings.images} training images, {settings.opt}, learning rate {settings.lr:g}, momentum"
        f" {settings.momentum:g}, weight decay {settings.weight_decay:g}, batch {settings.batch}, warm-up"
        f" {settings.warmup:g}, label smoothing {settings.smoothing:g}, crop padding {settings.padding},"
        f" {settings.mode}"
    )


# Numbers as text ------------------------------------------------------------------------------------------------------


def show_mean(values: Sequence[float]) -> str:
    """Mean and standard error."""
    error = standard_error(values)
    return f"{mean(values):.2f}" + ("" if error is None else f" ± {error:.2f}")


def show_difference(difference: Difference | None) -> str:
    """Mean difference and interval."""
    if difference is None:
        return ""
    interval = difference.interval()
    return f"{difference.mean:+.2f}" + (f" ({interval[0]:+.2f} to {interval[1]:+.2f})" if interval else "")


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
    p_values = {base: difference.p_value() for base, difference in found.items() if can_claim(len(difference.values))}
    corrected = holm(p_values, len(TESTS))
    result = {}
    for base, difference in found.items():
        claim = (difference.sign() or 0) if corrected.get(base, 1) < LEVEL else 0
        result[base] = Verdict(len(difference.values), corrected.get(base), claim)
    return result


def answers(conditions: Sequence[Condition]) -> str:
    """The two declared tests over all settings, in words."""
    words = {1: "higher", -1: "lower", 0: "not shown to differ", None: "not tested yet (too few seeds)"}
    sentences = []
    for base in TESTS:
        made = [verdict for condition in conditions if (verdict := verdicts(condition).get(base))]
        found = [None if verdict.p is None else verdict.claim for verdict in made]
        counts = [f"{word} in {found.count(claim)}" for claim, word in words.items() if claim in found]
        if found:
            settings = f"{len(found)} setting{'s' * (len(found) > 1)}"
            sentences.append(f"Against the {NAMES[base]}, ConvMix's accuracy is {', '.join(counts)} of {settings}.")
            if base == CONTROL and -1 in found:
                sentences.append(
                    "Where it is lower, a further layer on the deepest stage does more than mixing stages."
                )
    return " ".join(sentences)


def fit(conditions: Sequence[Condition]) -> str:
    """Whether ConvMix acts as a regulariser, in words: its training loss, and the gap from there to the test loss.

    '' where fewer than three seeds stand in every setting.
    """
    signs: dict[str, list[int]] = {"loss": [], "gap": []}
    for condition in conditions:
        pairs = [(condition.runs[LAST][seed], condition.runs[CONVMIX][seed]) for seed in condition.seeds(LAST, CONVMIX)]
        losses = Difference(tuple(own.train_loss - base.train_loss for base, own in pairs))
        gaps = Difference(tuple((own.loss - own.train_loss) - (base.loss - base.train_loss) for base, own in pairs))
        for found, difference in zip(signs.values(), (losses, gaps), strict=True):
            if (sign := difference.sign()) is not None:
                found.append(sign)
    loss, gap = signs.values()
    if not loss:
        return ""
    return (
        f"A regulariser fits the training images less and narrows the gap to the test loss. By the 95 % interval of the"
        f" paired difference to the last stage's, ConvMix's training loss in the last epoch is higher in"
        f" {loss.count(1)} and lower in {loss.count(-1)} of {len(loss)} settings, and the gap is narrower in"
        f" {gap.count(-1)} and wider in {gap.count(1)}."
        f"{'' if gap.count(-1) > gap.count(1) else ' These runs do not show the regulariser that the paper reports.'}"
    )


def provenance(runs: Sequence[Run]) -> str:
    """One sentence of conditions for a table; what differs between its rows is listed."""

    def values(name: str) -> str:
        return ", ".join(sorted({str(getattr(run, name)) for run in runs}))

    hours = sum(run.seconds for run in runs) / 3600
    return (
        f"{values('device')}; torch {values('torch')}, timm {values('timm')}, timm-convmix {values('timm_convmix')},"
        f" Python {values('python')}, {values('date')}; {len(runs)} runs, {hours:.1f} hours."
    )


def all_runs(conditions: Iterable[Condition]) -> list[Run]:
    """Every run of some conditions."""
    return [run for condition in conditions for by_seed in condition.runs.values() for run in by_seed.values()]


# Tables ---------------------------------------------------------------------------------------------------------------


def claims(conditions: Sequence[Condition]) -> str:
    """The two declared tests, a line a setting; means over the seeds that ConvMix was run with."""
    header = ["", "seeds", *(f"{NAMES[scheme]}, %" for scheme in (LAST, CONTROL, CONVMIX))]
    header += ["to last stage, points", "p", "to control, points", "p", "error reduction, %"]
    lines = []
    for condition in conditions:
        if CONVMIX not in condition.runs or not condition.seeds(CONVMIX, LAST):
            continue
        texts = verdicts(condition)
        cells = [title(condition.settings), str(len(condition.seeds(CONVMIX, LAST)))]
        cells += [
            show_mean([condition.runs[scheme][seed].top1 for seed in seeds])
            if (seeds := condition.seeds(scheme, CONVMIX))
            else ""
            for scheme in (LAST, CONTROL, CONVMIX)
        ]
        for base in TESTS:
            cells += [
                show_difference(condition.difference(base, CONVMIX) if base in texts else None),
                str(texts.get(base, "")),
            ]
        reductions = list(condition.reductions(LAST, CONVMIX).values())
        lines.append([*cells, f"{mean(reductions):.1f}" if reductions else ""])
    return markdown(header, lines) if lines else ""


def schemes_table(condition: Condition) -> str:
    """Every scheme of one setting, described: differences to the last stage, and cost."""
    plain = condition.runs.get(LAST)
    base = min(plain.values(), key=lambda run: run.seed) if plain else None
    lines = []
    for scheme, runs in sorted(condition.runs.items(), key=lambda item: -mean(condition.values(item[0]))):
        run = next(iter(runs.values()))
        difference = condition.difference(LAST, scheme) if base and scheme != LAST else None
        lines.append(
            [
                scheme,
                str(len(runs)),
                *(show_mean(condition.values(scheme, name)) for name in ("top1", "top5", "loss", "train_loss", "ece")),
                show_difference(difference),
                *(f"{getattr(run, name) / getattr(base, name):.4f}" if base else "" for name in ("params", "macs")),
                str(sum(run.diverged > 0 for run in runs.values()) or ""),
            ]
        )
    header = ["", "seeds", "top-1, %", "top-5, %", "loss", "training loss", "calibration error, %"]
    header += ["top-1 to last stage, points", "parameters", "MACs", "diverged"]
    return markdown(header, lines)


def choice(conditions: Sequence[Condition]) -> str:
    """Mean difference of each variant to ConvMix over the selection settings that hold both, best first.

    Its standard error is that of the seeds within the settings.
    """
    found: dict[str, list[Difference]] = {}
    for condition in conditions:
        for scheme in condition.runs:
            if scheme != CONVMIX and (difference := condition.difference(CONVMIX, scheme)):
                found.setdefault(scheme, []).append(difference)
    lines = []
    for scheme, differences in sorted(found.items(), key=lambda item: -mean(d.mean for d in item[1])):
        errors = [error for d in differences if (error := standard_error(d.values)) is not None]
        text = f"{mean(d.mean for d in differences):+.2f}"
        if len(errors) == len(differences):
            text += f" ± {sqrt(sum(error**2 for error in errors)) / len(errors):.2f}"
        lines.append([scheme, text, str(len(differences)), str(sum(len(d.values) for d in differences))])
    return markdown(["", "top-1 to ConvMix, points", "settings", "pairs of runs"], lines) if lines else ""


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

    def table(self) -> list[tuple[float, dict[int, float]]]:
        """Position, and relative reduction of the error for each seed, a setting."""
        return [(self.position(condition), condition.reductions(LAST, CONVMIX)) for condition in self.conditions]

    def p_value(self) -> float | None:
        """Of Page's test that the reduction grows (one-sided); None below three settings or two common seeds."""
        columns = [reductions for _, reductions in self.table()]
        seeds = sorted(set.intersection(*map(set, columns)))
        if len(columns) < 3 or len(seeds) < 2:
            return None
        blocks = [[column[seed] for column in columns] for seed in seeds]
        return float(stats.page_trend_test(blocks).pvalue)


def series_of(conditions: Sequence[Condition]) -> list[Series]:
    """The declared series, all else equal: class count, training images at equal steps, epochs, size of a ResNet."""
    axes: dict[str, tuple[Callable[[Settings], Settings], Callable[[Condition], float]]] = {
        "number of classes": (partial(replace, classes=0, images=0), lambda c: c.settings.classes),
        "training images": (at_equal_steps, lambda c: c.settings.images),
        "epochs": (partial(replace, epochs=0), lambda c: c.settings.epochs),
        "parameters of a ResNet": (partial(replace, arch=""), lambda c: c.params),
    }
    usable = [condition for condition in conditions if condition.reductions(LAST, CONVMIX)]
    found = []
    for what, (shared, position) in axes.items():
        chosen = [c for c in usable if shared(c.settings).arch or c.settings.arch.startswith("resnet")]
        for group in alike(chosen, shared):
            ordered = sorted(group, key=position)
            if len(ordered) > 1:
                found.append(Series(what, ordered, position))
    return found


def at_equal_steps(settings: Settings) -> Settings:
    """Settings whose number of images is free, and that saw as many in all."""
    return replace(settings, fraction=0.0, images=0, epochs=settings.images * settings.epochs)


def alike(conditions: Iterable[Condition], shared: Callable[[Settings], Settings]) -> Iterator[list[Condition]]:
    """Groups of what shares something."""

    def key(condition: Condition) -> str:
        return str(shared(condition.settings))

    for _, group in groupby(sorted(conditions, key=key), key=key):
        yield list(group)


def trends(series: Sequence[Series]) -> str:
    """A line a series."""
    lines = []
    for one in series:
        p = one.p_value()
        cells = [f"{position:g}: {mean(reductions.values()):.1f}" for position, reductions in one.table()]
        settings = one.conditions[-1].settings
        seeds = min(len(reductions) for _, reductions in one.table())
        verdict = "too few settings or seeds" if p is None else f"p = {p:.3f}"
        lines.append([f"{one.what}, {settings.dataset}", "; ".join(cells), str(seeds), verdict])
    return markdown(["", "error reduction, %", "seeds", "it grows (Page)"], lines) if lines else ""


def robustness_table(rows: Sequence[Robustness]) -> str:
    """Accuracy under each corruption, the mean over severities, and the paired difference to the last stage."""
    scores: dict[tuple[Settings, str], dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        by_scheme = scores.setdefault((shared_settings(row), row.corruption), {})
        by_scheme.setdefault(row.scheme, {}).setdefault(row.seed, []).append(row.top1)
    lines = []
    for (settings, corruption), by_scheme in scores.items():
        means = {
            scheme: {seed: mean(values) for seed, values in by_seed.items()} for scheme, by_seed in by_scheme.items()
        }
        base = means.get(LAST, {})
        name = "clean" if corruption == CLEAN else corruption
        for scheme, by_seed in means.items():
            pairs = tuple(by_seed[seed] - base[seed] for seed in sorted(by_seed.keys() & base.keys()))
            difference = show_difference(Difference(pairs)) if pairs and scheme != LAST else ""
            cells = [scheme, str(len(by_seed)), show_mean(list(by_seed.values())), difference]
            lines.append([f"{title(settings)}: {name}", *cells])
    return markdown(["", "scheme", "seeds", "top-1, %", "to last stage, points"], lines) if lines else ""


def by_layer(rows: Sequence[Saliency]) -> dict[tuple[Settings, str], dict[str, dict[int, Saliency]]]:
    """Setting and layer -> scheme -> seed -> row."""
    groups: dict[tuple[Settings, str], dict[str, dict[int, Saliency]]] = {}
    for row in rows:
        groups.setdefault((shared_settings(row), row.layer), {}).setdefault(row.scheme, {})[row.seed] = row
    return groups


def saliency_table(rows: Sequence[Saliency]) -> str:
    """The box measures of each layer, the mean over seeds, and the paired difference to the last stage."""
    lines = []
    for (settings, layer), by_scheme in by_layer(rows).items():
        base = by_scheme.get(LAST, {})
        for scheme, by_seed in by_scheme.items():
            cells = [
                f"{title(settings)}: {layer}",
                scheme,
                str(len(by_seed)),
                str(min(row.count for row in by_seed.values())),
            ]
            for measure in MEASURES:
                values = {seed: 100 * getattr(row, measure) for seed, row in by_seed.items()}
                pairs = tuple(values[seed] - 100 * getattr(base[seed], measure) for seed in values if seed in base)
                own = f"{mean(values.values()):.1f}"
                cells.append(f"{own}, {show_difference(Difference(pairs))}" if pairs and scheme != LAST else own)
            lines.append([*cells, f"{mean(100 * row.chance for row in by_seed.values()):.1f}"])
    header = ["", "scheme", "seeds", "images", *(f"{text}, %" for text in MEASURES.values()), "energy by chance, %"]
    return markdown(header, lines) if lines else ""


def view(rows: Sequence[Saliency]) -> str:
    """Whether ConvMix's maps are wider and rest more on the object than the last stage's, in words; '' without runs."""
    signs: dict[str, list[int]] = {"energy": [], "area": []}
    for by_scheme in by_layer(rows).values():
        base, own = by_scheme.get(LAST, {}), by_scheme.get(CONVMIX, {})
        seeds = sorted(base.keys() & own.keys())
        for name, found in signs.items() if seeds else ():
            difference = Difference(tuple(getattr(own[seed], name) - getattr(base[seed], name) for seed in seeds))
            found.append(difference.sign() or 0)
    energy, area = signs["energy"], signs["area"]
    if not energy:
        return ""
    wider = sum(e > 0 and a > 0 for e, a in zip(energy, area, strict=True))
    return (
        f"Grad-CAM of ConvMix against the last stage's, at {len(energy)} layers (by the 95 % interval of the paired"
        f" difference): more of the energy falls into the object's box at {energy.count(1)}, less at"
        f" {energy.count(-1)}; the map is wider at {area.count(1)}, narrower at {area.count(-1)}. A wider view counts"
        f" only where the energy in the box rises too: at {wider}."
        f"{'' if wider else ' These runs do not show the wider view that the paper reports.'}"
    )


# Texts ----------------------------------------------------------------------------------------------------------------

NOTHING = "No run is recorded yet."
FIGURE = "Differences of top-1 to the last stage and to the control: a bar a seed, their mean and its 95 % interval"
TREND = (
    "Page's test asks whether the relative reduction of the error grows along a series. Training images are varied at"
    " equal steps: as many fewer epochs as there are more images."
)
EXPLANATION = (
    "Mean ± standard error over seeds, of the last epoch on the test images; differences are paired by seed, with their"
    " 95 % bootstrap interval (BCa). p: exact sign-flip test, corrected by Holm's method for the two tests declared"
    " beforehand; bold where a difference is claimed. The control is one branch of the mixer on the deepest stage"
    " alone, of as many parameters."
)


def is_proof(condition: Condition) -> bool:
    """Whether it was scored on the test images."""
    return condition.settings.split == "test"


def summary(conditions: Sequence[Condition], boxes: Sequence[Saliency] = ()) -> str:
    """The README's part."""
    proof = list(filter(is_proof, conditions))
    parts = []
    if table := claims(proof):
        parts += [answers(proof), table, figures(proof, "docs/figures", DIFFERENCES)]
        parts.append(f"{EXPLANATION} {provenance(all_runs(proof))} All schemes: [docs/evidence.md](docs/evidence.md).")
    if table := trends(series_of(proof)):
        parts += [table, TREND]
    parts += [figures(proof, "docs/figures", "gain-"), figures(proof, "docs/figures", "cost-"), fit(proof)]
    if boxes:
        parts.append(view(boxes))
    return "\n\n".join(filter(None, parts)) or NOTHING


def document(conditions: Sequence[Condition], corrupted: Sequence[Robustness], boxes: Sequence[Saliency]) -> str:
    """The whole of docs/evidence.md."""
    proof = list(filter(is_proof, conditions))
    selection = [condition for condition in conditions if not is_proof(condition)]
    parts = ["# Evidence", "Written by `python -m benchmarks.report --write` from the CSVs in benchmarks/results."]
    if table := claims(proof):
        parts += ["## ConvMix against the last stage and the control", answers(proof), table]
        parts += [figures(proof, "figures", DIFFERENCES), EXPLANATION]
    if table := trends(series_of(proof)):
        parts += ["## Does the gain grow?", table, TREND, figures(proof, "figures", "gain-")]
    if pictures := figures(proof, "figures", "cost-"):
        parts += ["## Accuracy per cost", pictures]
    if text := fit(proof):
        parts += ["## Does it regularise?", text]
    if proof:
        parts += ["## Every scheme, on the test images", "Descriptive: only the two tests above were declared."]
        parts += described(proof)
    if selection:
        parts += [
            "## Selection, on the hold-out",
            "A tenth of the training images, not trained on; nothing is claimed. Declared before the runs: a variant"
            " replaces the default where it is the best of those that meet the cost bars and its mean difference is"
            " more than two standard errors above zero.",
        ]
        parts += [choice(selection), *described(selection)]
    if corrupted:
        parts += ["## Corrupted images", robustness_table(corrupted), commands(corrupted)]
    if boxes:
        parts += ["## Where it looks", view(boxes), saliency_table(boxes), commands(boxes)]
    if len(parts) == 2:
        parts.append(NOTHING)
    return "\n\n".join(filter(None, parts)) + "\n"


def described(conditions: Sequence[Condition]) -> list[str]:
    """The paragraphs of every scheme's table, a setting after the other."""
    parts = []
    for condition in conditions:
        runs = all_runs([condition])
        parts += [f"### {title(condition.settings)}", schemes_table(condition)]
        parts.append(f"{recipe(condition.settings)}. {provenance(runs)} {commands(runs)}")
    return parts


def commands(rows: Sequence[Run] | Sequence[Robustness] | Sequence[Saliency]) -> str:
    """The commands that made some rows, each once, without what only divides the work."""
    return ", ".join(f"`{command}`" for command in sorted({whole_command(row.argv) for row in rows}))


def whole_command(argv: str) -> str:
    """A command without ``DIVISIONS`` and their values."""
    kept, dropping = [], False
    for word in shlex.split(argv):
        if word.startswith("--"):
            dropping = word in DIVISIONS
        if not dropping:
            kept.append(word)
    return shlex.join(kept)


# Plots ----------------------------------------------------------------------------------------------------------------


def fingerprint(conditions: Sequence[Condition]) -> str:
    """Of the scores that the figures show; each figure carries it."""
    shown = sorted((*run.key, run.top1, run.macs) for run in all_runs(conditions))
    return f"runs {sha256(repr(shown).encode()).hexdigest()}"


def draw_differences(axes: Any, tested: Sequence[Condition]) -> None:
    """A line a setting, a tick a seed, and the mean with its interval: to the last stage and to the control."""
    for base, offset, color in ((LAST, -0.15, "tab:blue"), (CONTROL, 0.15, "tab:orange")):
        found = [(row + offset, d) for row, c in enumerate(tested) if (d := c.difference(base, CONVMIX))]
        for height, difference in found:
            axes.plot(difference.values, [height] * len(difference.values), "|", color=color, alpha=0.6)
        means = [difference.mean for _, difference in found]
        ends = [difference.interval() or (difference.mean,) * 2 for _, difference in found]
        spread = [[m - low for m, (low, _) in zip(means, ends, strict=True)]]
        spread += [[high - m for m, (_, high) in zip(means, ends, strict=True)]]
        heights = [height for height, _ in found]
        axes.errorbar(means, heights, xerr=spread, fmt="o", capsize=3, color=color, label=f"to the {NAMES[base]}")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="top-1 of ConvMix minus theirs, points", ylim=(len(tested) - 0.5, -0.5))
    axes.set_yticks(range(len(tested)), [fill(title(c.settings), 30) for c in tested], fontsize="small")
    axes.legend(fontsize="small", ncols=2, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))


def draw_series(axes: Any, series: Sequence[Series], what: str) -> None:
    """The gain along what grows, a line a series."""
    for one in series:
        points = [(position, list(reductions.values())) for position, reductions in one.table()]
        x, y = [position for position, _ in points], [mean(values) for _, values in points]
        errors = [standard_error(values) or 0 for _, values in points]
        settings = one.conditions[-1].settings
        axes.errorbar(x, y, errors, marker="o", capsize=3, label=f"{settings.dataset}, {settings.arch}")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel=what, ylabel="error reduction, % (± standard error)", xscale="log")
    ticks = sorted({position for one in series for position, _ in one.table()})
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize="small")


def draw_cost(axes: Any, conditions: Sequence[Condition], dataset: str) -> None:
    """Accuracy against MACs, a point a backbone and scheme."""
    for scheme in (LAST, CONTROL, CONVMIX):
        chosen = [c for c in conditions if scheme in c.runs]
        x = [mean(c.values(scheme, "macs")) / 1e6 for c in chosen]
        errors = [standard_error(c.values(scheme)) or 0 for c in chosen]
        axes.errorbar(x, [mean(c.values(scheme)) for c in chosen], errors, fmt="o", capsize=3, label=NAMES[scheme])
    axes.set(xlabel="million MACs", ylabel="top-1, % (± standard error)", xscale="log", title=dataset)
    axes.legend(fontsize="small")


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn.

    Args:
        text: What it shows.
        size: In inches.
        draw: Draws it on matplotlib's axes.
    """

    text: str
    size: tuple[float, float]
    draw: Callable[[Any], None]


def list_drawings(proof: Sequence[Condition]) -> dict[str, Drawing]:
    """File name -> drawing.

    The differences that were tested, the gain along each series, and accuracy against cost where settings differ in the
    backbone only.
    """
    drawings: dict[str, Drawing] = {}
    if tested := [c for c in proof if c.difference(LAST, CONVMIX)]:
        size = 7, 1.3 + 0.7 * len(tested)
        drawings[DIFFERENCES] = Drawing(FIGURE, size, partial(draw_differences, tested=tested))
    series = series_of(proof)
    for what in dict.fromkeys(one.what for one in series):
        draw = partial(draw_series, series=[one for one in series if one.what == what], what=what)
        drawings[f"gain-{what.replace(' ', '-')}.svg"] = Drawing(
            f"Reduction of the error along: {what}", (5, 3.5), draw
        )
    nets = (group for group in alike(proof, partial(replace, arch="")) if len(group) > 1)
    for number, group in enumerate(nets, start=1):
        dataset = group[0].settings.dataset
        draw = partial(draw_cost, conditions=group, dataset=dataset)
        drawings[f"cost-{dataset}-{number}.svg"] = Drawing(f"Accuracy against MACs on {dataset}", (5, 3.5), draw)
    return drawings


def figures(proof: Sequence[Condition], folder: str, start: str) -> str:
    """Those of a folder whose names start alike, as markdown; '' where there are none."""
    found = list_drawings(proof).items()
    return "\n".join(f"![{drawing.text}]({folder}/{name})" for name, drawing in found if name.startswith(start))


def stale_figures(conditions: Sequence[Condition], folder: Path) -> list[str]:
    """Names of the figures that are missing in a folder, or were drawn from other runs."""
    proof = list(filter(is_proof, conditions))
    current = fingerprint(proof)
    paths = [folder / name for name in list_drawings(proof)]
    return [path.name for path in paths if not path.is_file() or current not in path.read_text()]


def plot(conditions: Sequence[Condition], folder: Path) -> list[Path]:
    """Draw what ``list_drawings`` lists.

    Returns:
        The files written: none where there is nothing to draw.
    """
    import matplotlib as mpl  # noqa: PLC0415  (of the extra 'benchmarks'; only plots need it)

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "timm-convmix"  # the same file from the same numbers
    from matplotlib import pyplot as plt  # noqa: PLC0415

    proof = list(filter(is_proof, conditions))
    drawings = list_drawings(proof)
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings.items():
        figure, axes = plt.subplots(figsize=drawing.size)
        drawing.draw(axes)
        figure.tight_layout()
        figure.savefig(folder / name, metadata={"Date": None, "Description": fingerprint(proof)})
        plt.close(figure)
    return [folder / name for name in drawings]


# Command line ---------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into the README and the document")
    parser.add_argument("--check", action="store_true", help="exit 1 where these or the figures differ from the CSVs")
    parser.add_argument("--plots", action="store_true", help="draw the figures")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    parser.add_argument("--readme", type=Path, default=README, help="the file with the markers evidence:begin and :end")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print, write, check or draw; the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        conditions = conditions_of(read_rows_of(Run, args.results / "accuracy.csv"))
    except ValueError as error:
        parser.error(str(error))
    corrupted = read_rows_of(Robustness, args.results / "robustness.csv")
    boxes = read_rows_of(Saliency, args.results / "saliency.csv")
    if args.plots:
        for path in plot(conditions, args.figures):
            print(path.name)
        return 0
    text = document(conditions, corrupted, boxes)
    status = show_tables(
        [(args.readme, summary(conditions, boxes))],
        name="evidence",
        write=args.write,
        check=args.check,
        command="benchmarks.report --write",
    )
    if args.write:
        args.document.parent.mkdir(parents=True, exist_ok=True)
        args.document.write_text(text)
    if args.check and (not args.document.is_file() or args.document.read_text() != text):
        print(f"{args.document.name} differs: python -m benchmarks.report --write")
        return 1
    if args.check and (stale := stale_figures(conditions, args.figures)):
        print(f"{', '.join(stale)}: missing, or of other runs: python -m benchmarks.report --plots")
        return 1
    if not args.write and not args.check:
        print(f"\n{text}")
    return status


if __name__ == "__main__":
    sys.exit(main())

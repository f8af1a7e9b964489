"""Findings of the checks of misspecification, in plain words."""

from __future__ import annotations

from nlme_sbi.diagnostics.data.residual_tests import MANY, STATISTICS, ResidualTests
from nlme_sbi.diagnostics.data.summary_tests import RARE, ReplicateTest, SupportScores
from nlme_sbi.diagnostics.findings import Finding, Light

_WORDS = {
    "correlation": "neighbouring ones are alike",
    "run": "ones of the same sign come in runs",
    "farthest": "single ones are outliers",
    "waves": "they go up and down in waves",
}
_STRONG = 0.5  # correlation of neighbouring residuals that makes a model useless for what lies between
_NAMED = 5


def model_finding(tests: ResidualTests) -> Finding:
    """Whether individuals have something in common that the simulator cannot make."""
    share = float(tests.named.double().mean())
    rejected = tests.p_model <= tests.level or tests.has_many_outliers
    light: Light = (
        "green" if not rejected else "red" if tests.has_many_outliers or tests.correlation > _STRONG else "amber"
    )
    extent = f"neighbouring residuals are correlated by {tests.correlation:.2f}"
    most = _WORDS[STATISTICS[int(tests.common.argmax())]]
    if light == "green":
        sentence = f"Residuals about the individuals' best fits look like noise (p = {tests.p_model:.2g}; {extent})."
    else:
        sentence = (
            f"The simulator cannot make these data: residuals about the individuals' best fits are not like noise, "
            f"foremost because {most} (p = {tests.p_model:.2g}; {extent}; {100 * share:.0f}% of the individuals are "
            "outliers by themselves). Look at their fits, and change the mechanism or the noise model; posteriors of "
            "its parameters are too narrow."
        )
    return Finding(
        check="misspecification_model",
        title="Can the simulator make these data?",
        light=light,
        sentence=sentence,
        rule=(
            f"Test of all individuals together, named outliers left out where they are at most {100 * MANY:.0f}%, "
            f"against {tests.replicates} data sets of noise: green above p = {tests.level:g}, which is its "
            f"false-alarm rate; red where also neighbouring residuals are correlated by more than {_STRONG:g} or more "
            f"than {100 * MANY:.0f}% of the individuals are outliers; amber between."
        ),
        numbers={
            "p": tests.p_model,
            "correlation": tests.correlation,
            "share_named": share,
            "level": tests.level,
            "replicates": tests.replicates,
        },
    )


def individuals_finding(tests: ResidualTests) -> Finding:
    """Whether single individuals' data cannot be made."""
    count = int(tests.named.sum())
    worst = tests.outlier_score.argsort(descending=True)[: min(count, _NAMED)].tolist()
    listed = ", ".join(tests.ids[place] for place in worst) + (f" and {count - _NAMED} more" if count > _NAMED else "")
    if count == 0:
        sentence = (
            f"No individual's residuals are unlike noise (the most extreme: p = {tests.p_individuals:.2g} of all)."
        )
    elif tests.has_many_outliers:
        sentence = (
            f"{count} of {len(tests.ids)} individuals have data that the simulator cannot make: too many to be "
            "outliers. The model is to blame; judge single individuals once it is repaired."
        )
    else:
        sentence = (
            f"{count} of {len(tests.ids)} individuals have data that the simulator cannot make: {listed}. Look at "
            "their fits for outliers, artefacts or another kind of individual, and fit once without them."
        )
    return Finding(
        check="misspecification_individuals",
        title="Are there individuals that the simulator cannot make?",
        light="amber" if count else "green",
        sentence=sentence,
        rule=(
            f"Amber where an individual's residuals are more extreme than the most extreme ones of a whole data set of "
            f"noise are in {100 * tests.level:.3g}% of {tests.replicates} simulated ones: the chance to "
            "name any individual wrongly."
        ),
        numbers={
            "named": count,
            "individuals": len(tests.ids),
            "p": tests.p_individuals,
            "level": tests.level,
            "replicates": tests.replicates,
        },
    )


def support_finding(scores: SupportScores, *, level: float = 0.05) -> Finding:
    """Whether the data lie where the network was trained."""
    count, total = int(scores.rare.sum()), len(scores.ids)
    outside = scores.p_value <= level
    worst = scores.distance.argsort(descending=True)[: min(count, _NAMED)].tolist()
    listed = ", ".join(scores.ids[place] for place in worst)
    if not outside:
        sentence = (
            f"The data lie where the network was trained: {count} of {total} individuals are as far from its "
            f"simulations as the rarest {100 * RARE:g}% of those are."
        )
    else:
        sentence = (
            f"{count} of {total} individuals are as far from the network's training simulations as the rarest "
            f"{100 * RARE:g}% of those are, farthest: {listed}. The network is poorly trained there: widen the "
            "training prior towards these data, or leave these individuals out."
        )
    return Finding(
        check="misspecification_support",
        title="Do the data lie where the network was trained?",
        light="red" if outside and count > total / 2 else "amber" if outside else "green",
        sentence=sentence,
        rule=(
            f"An individual is far where at most {100 * RARE:g}% of {scores.simulations // 2} simulations from the "
            f"training prior are as far; green where so many happen with a chance above {level:g}, which is the "
            "false-alarm rate for individuals from the training prior; red where most are far."
        ),
        numbers={
            "far": count,
            "individuals": total,
            "p": scores.p_value,
            "mmd_to_training_prior": scores.mmd,
            "p_same_as_training_prior": scores.p_prior,
            "level": level,
        },
    )


def replicate_finding(test: ReplicateTest, *, level: float = 0.05) -> Finding:
    """Whether the simulator, from each individual's parameters, makes data like the individual's."""
    rejected = test.p_value <= level
    whose = "the simulator makes data" if test.exact else "simulator and network make data"
    if not rejected:
        sentence = f"In the network's summaries {whose} like each individual's own (p = {test.p_value:.2g})."
    elif test.exact:
        sentence = (
            "Simulated again from its own parameters, an individual looks different to the network than its data do "
            f"(p = {test.p_value:.2g}): the simulator cannot make these data. Look at fits and residuals."
        )
    else:
        sentence = (
            "Simulated again from the network's draws, an individual looks different to the network than its data do "
            f"(p = {test.p_value:.2g}): either the simulator cannot make these data, or the network is not accurate "
            "there. Look at its calibration at the data first; where that is good, change the simulator."
        )
    return Finding(
        check="misspecification_replicates",
        title="Do individuals resemble what is simulated from their own parameters?",
        light="amber" if rejected else "green",
        sentence=sentence,
        rule=(
            f"Amber where the MMD between {test.individuals} individuals and {test.replicates} replicates of each is "
            f"larger than after exchanging individuals with their replicates at p = {level:g}, the false-alarm rate"
            + (
                "."
                if test.exact
                else " of a perfect network; the draws are the network's own, so its errors raise alarms, too."
            )
        ),
        numbers={
            "mmd": test.mmd,
            "expected": test.expected,
            "p": test.p_value,
            "individuals": test.individuals,
            "replicates": test.replicates,
            "level": level,
        },
    )

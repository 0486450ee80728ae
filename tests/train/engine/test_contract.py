"""The collective contract: whatever the ranks' rows hold, every rank issues the same collectives in the same order, and
the run learns what one rank learns without ZeRO.

Otherwise all ranks wait forever. Rows differ over ranks and micro-steps, with blank ones among them, in a first step,
after ZeRO-3 has recorded its order, after an evaluation and after a resume. The settings are a table that covers every
pair of values of two factors.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, Literal

import pytest

from llava_next.config import LoraConfig, ViewsConfig
from tests.ranks import Ranks
from tests.tiny import tiny_mixture
from tests.train import contract_cases
from tests.train.cases import aligning, relative_difference, zero
from tests.train.conftest import StartRanks
from tests.train.contract_cases import Report
from train.config.rules import check_values
from train.config.schema import ConfigError, EvaluateConfig, RunConfig

TIMEOUT_S = 40
"""A collective that waits longer is a hang; each rank then reports the collectives that it has issued."""
LORA = {
    "vision_tower": LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "v_proj")),
    "language_model": LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj")),
}
RECOMPUTE: dict[str, tuple[Literal["vision_tower", "language_model"], ...]] = {
    "nothing": (),
    "language_model": ("language_model",),
    "vision_tower": ("vision_tower",),
    "both": ("language_model", "vision_tower"),
}
FACTORS: dict[str, tuple[Any, ...]] = {  # in an order of few cases
    "trains": ("all", "adapters", "connector"),
    "stage": (3, 2, 1, 0),
    "size": (2, 3, 4),
    "resumes_at": ("the same stage", "another stage"),
    "nodes": (1, 2),
    "recompute": tuple(RECOMPUTE),
    "offload": (False, True),
}


@dataclass(frozen=True)
class Case:
    """The settings of a run: ranks, ZeRO stage, nodes with a copy of the weights each, stage of the resume, and what it
    trains (see `FACTORS`)."""

    size: int
    stage: int
    nodes: int
    resumes_at: str
    offload: bool
    recompute: str
    trains: str

    @property
    def is_possible(self) -> bool:
        return not (self.offload and self.stage == 0) and (self.nodes == 1 or (self.size, self.stage) == (4, 3))

    @property
    def pairs(self) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
        return set(combinations(((name, getattr(self, name)) for name in FACTORS), 2))


VIEWS = ViewsConfig("anyres_max_1", "pad", closing_newline=True)
"""Where the connector is trained, some rows have reduced feature maps and others have none."""


def covering() -> Iterator[Case]:
    """Cases that cover every possible pair of values of two factors; each next one covers the most missing pairs."""
    cases = [Case(**dict(zip(FACTORS, values, strict=True))) for values in product(*FACTORS.values())]
    possible = [case for case in cases if case.is_possible]
    missing = {pair for case in possible for pair in case.pairs}
    while missing:
        best = max(possible, key=lambda case: len(case.pairs & missing))  # the first of equals
        missing -= best.pairs
        yield best


TABLE = tuple(covering())
QUICK = Case(2, 3, 1, "the same stage", False, "both", "all")
ADAPTERS = Case(2, 3, 1, "the same stage", False, "language_model", "adapters")


def _engine(stage: int, offload: bool, ranks_per_node: int | None = None) -> dict[str, Any]:
    """As `zero`, and at ZeRO-3 weights are freed after each use, as for a model that does not fit."""
    engine = zero(stage)
    if stage == 3:
        engine["zero_optimization"] |= {"stage3_max_live_parameters": 4_000, "stage3_max_reuse_distance": 2_000}
        if ranks_per_node:
            engine["zero_optimization"] |= {"zero_hpz_partition_size": ranks_per_node}
    if offload and stage > 0:
        engine["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return engine


def _config(base: RunConfig, case: Case, stage: int) -> RunConfig:
    config = aligning(base, views=VIEWS) if case.trains == "connector" else base
    return replace(
        config,
        engine=_engine(stage, case.offload, case.size // case.nodes if case.nodes > 1 else None),
        recompute=RECOMPUTE[case.recompute],
        lora=LORA if case.trains == "adapters" else None,
    )


@pytest.fixture(scope="module")
def base(tiny_parts: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The tiny run with held-out samples and questions."""
    folder = tmp_path_factory.mktemp("contract")
    mixture, store_root = tiny_mixture(folder / "data", 40, holdout=5)
    return replace(
        tiny_parts,
        root=str(folder / "outputs"),
        mixture=mixture,
        data=replace(tiny_parts.data, store_root=str(store_root)),
        evaluate=EvaluateConfig(every=1, answers=3, answer_tokens=4),
        timeout_s=TIMEOUT_S,
    )


@pytest.fixture(scope="module")
def references(start_ranks: StartRanks, base: RunConfig) -> dict[str, Report]:
    """The same steps on one rank, without ZeRO, recompute and resume, by the trained parts."""
    reports = {}
    for trains in FACTORS["trains"]:
        case = Case(1, 0, 1, "", False, "nothing", trains)
        config = replace(_config(base, case, 0), name=f"reference_{trains}")
        [reports[trains]] = start_ranks(1).run(contract_cases.run_phases, config, None, TIMEOUT_S)
        assert not reports[trains].error
    return reports


def _run(ranks: Ranks, config: RunConfig, resumed: RunConfig | None, timeout_s: int = TIMEOUT_S) -> list[Report]:
    """The reports of all ranks, after a check that their collectives are the same."""
    reports: list[Report] = ranks.run(contract_cases.run_phases, config, resumed, timeout_s, timeout_s=8.0 * timeout_s)
    try:
        for phases in zip(*(report.phases for report in reports), strict=False):
            first = phases[0]
            for rank, other in enumerate(phases[1:], start=1):
                assert other.name == first.name
                both = zip(first.collectives, other.collectives, strict=False)
                different = [(index, *pair) for index, pair in enumerate(both) if pair[0] != pair[1]]
                assert not different[:1], f"{first.name}: rank 0 {first.kinds}, rank {rank} {other.kinds}"
                numbers = len(first.collectives), len(other.collectives)
                assert numbers[0] == numbers[1], f"{first.name}: rank 0 {first.kinds}, rank {rank} {other.kinds}"
        assert [report.error for report in reports] == [""] * len(reports)
    except AssertionError:
        ranks.close()  # they wait for each other
        raise
    return reports


def _assert_learns_the_same(reports: list[Report], expected: Report) -> None:
    """Losses, gradient norms, held-out losses and answers of every phase, and the final weights."""
    values = {phase.name: phase.values for phase in expected.phases}
    seen = {phase.name: phase.values for phase in reports[0].phases if phase.values}
    assert seen.keys() == values.keys()
    for name, of_phase in seen.items():
        assert of_phase[0] == pytest.approx(values[name][0], rel=1e-5), name
        assert of_phase == pytest.approx(values[name], rel=1e-4), name
    assert relative_difference(reports[0].after, expected.after) < 1e-4
    moved = [
        {name: run.after[name] - expected.before[name] for name in run.after if not name.endswith("k_proj.bias")}
        for run in (reports[0], expected)
    ]
    assert relative_difference(*moved) < 1e-2


@pytest.mark.parametrize(
    "case", [QUICK, *(pytest.param(each, marks=pytest.mark.full) for each in (ADAPTERS, *TABLE))], ids=str
)
def test_different_rows_issue_the_same_collectives(
    start_ranks: StartRanks, base: RunConfig, references: dict[str, Report], request: Any, case: Case
) -> None:
    """Kind, group, sizes and types are equal on all ranks in every phase; the run learns what the reference learns."""
    number = (case.stage + 1) % 4 if case.resumes_at == "another stage" else case.stage
    name = f"case_{[QUICK, ADAPTERS, *TABLE].index(case)}_{request.node.callspec.indices['case']}"
    config = replace(_config(base, case, case.stage), name=name)
    resumed = replace(_config(base, case, number), name=name)
    check_values(config)
    reports = _run(start_ranks(case.size), config, resumed)
    for phases in zip(*(report.phases for report in reports), strict=True):
        if phases[0].kinds:
            kinds = [phase.kinds for phase in phases]
            assert any("blank" in of_rank for of_rank in kinds)
            assert all(len(set(of_ranks)) > 1 for of_ranks in zip(*kinds, strict=True))
    if case.stage == 3:  # parameters are gathered, so the order matters
        learned = next(phase for phase in reports[0].phases if phase.name == "learned trace")
        gathers = [each for each in learned.collectives if "all_gather" in each.kind or "allgather" in each.kind]
        assert len(gathers) > 30
        assert any(each.group == ("0", "1") for each in gathers) == (case.nodes == 2)
    _assert_learns_the_same(reports, references[case.trains])


@pytest.mark.full
@pytest.mark.parametrize("recompute", ["nothing", "both"])
def test_compiled_blocks_issue_the_same_collectives(
    start_ranks: StartRanks, base: RunConfig, references: dict[str, Report], recompute: str
) -> None:
    """Both parts with torch.compile at ZeRO-2: each rank compiles for a new row length when it occurs."""
    case = Case(2, 2, 1, "the same stage", False, recompute, "all")
    config = replace(
        _config(base, case, case.stage), name=f"compiled_{recompute}", compile=("vision_tower", "language_model")
    )
    reports = _run(start_ranks(case.size), config, config, timeout_s=200)
    _assert_learns_the_same(reports, references[case.trains])


def test_compile_is_refused_at_zero_3(base: RunConfig) -> None:
    """It is refused because six blocks reach torch.compile's limit (two make 60 graphs, and 8 at ZeRO-2)."""
    config = replace(base, compile=("language_model",))
    check_values(config)
    with pytest.raises(ConfigError, match=r"compile=\[language_model\] .*ZeRO stage 3.*compile=\[\], or engine=zero2"):
        check_values(replace(config, engine=_engine(3, False)))


def test_every_pair_of_values_is_covered() -> None:
    """A case of the table has it, unless the pair is impossible: two nodes need four ranks at ZeRO-3."""
    covered = set().union(*(case.pairs for case in TABLE))
    for (first, values), (second, others) in combinations(FACTORS.items(), 2):
        for pair in product(values, others):
            values_of = {first: pair[0], second: pair[1]}
            is_possible = values_of != {"stage": 0, "offload": True}
            if values_of.get("nodes") == 2:
                is_possible &= values_of.get("size", 4) == 4 and values_of.get("stage", 3) == 3
            assert (((first, pair[0]), (second, pair[1])) in covered) == is_possible, pair
    assert len(TABLE) < 20

"""Rankings of K completions: from a JSONL or JSON file of {prompt, completions, ranks}, or from generated
problems with a right worked answer and wrong ones.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from research.data.builders.base import INTS, MESSAGES, Prepared, Record, RecordsBuilder, message_records
from research.data.builders.file import FileSpec, prepare_file
from research.data.preferences import Ranking, parse_ranking
from research.tasks.arithmetic.build import prepare_corrupted
from research.tasks.arithmetic.corruption import ranking_record
from research.tasks.arithmetic.problems import ArithmeticSpec, Item

_FEATURES = {"prompt": MESSAGES, "completions": MESSAGES, "ranks": INTS}


class TemperRankings(RecordsBuilder):
    """Records {prompt, completions}, each a list of messages, and {ranks}, lower is better."""


def prepare_rankings(data_dir: str | Path, spec: FileSpec) -> Prepared:
    """Splits "train" and "validation"; the prompt decides which, so one prompt is never in both."""

    def parse(record: Mapping[str, Any], where: str) -> Iterable[tuple[object, Record]]:
        ranking = parse_ranking(record, where=where)
        yield ranking.prompt, _record(ranking)

    return prepare_file(TemperRankings, data_dir, spec, features=_FEATURES, parse=parse)


def prepare_arithmetic_rankings(
    data_dir: str | Path,
    *,
    n_train: int,
    n_validation: int,
    candidates: int,
    seed: int,
    spec: ArithmeticSpec | None = None,
) -> Prepared:
    """Splits "train" and "validation" of generated problems: a right answer, then wrong ones, better the later
    they go wrong.
    """

    def records(item: Item, spec: ArithmeticSpec) -> list[Record]:
        made = ranking_record(item, seed=seed, max_value=spec.max_value, candidates=candidates)
        return [_record(parse_ranking(made, where=item.prompt))]

    return prepare_corrupted(
        TemperRankings,
        data_dir,
        n_train=n_train,
        n_validation=n_validation,
        seed=seed,
        spec=spec,
        features=_FEATURES,
        records=records,
        candidates=candidates,
    )


def _record(ranking: Ranking) -> Record:
    return {
        "prompt": message_records(ranking.prompt),
        "completions": message_records(ranking.completions),
        "ranks": list(ranking.ranks),
    }

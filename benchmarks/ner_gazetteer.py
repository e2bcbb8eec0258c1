"""Span F1 of a gazetteer: the least that a trained named-entity model should do better than.

    python benchmarks/ner_gazetteer.py --data_dir=data/xtreme_up_v1.1 --held_out sn yo

Every entity of the training data of the languages that are not held out is looked up in the text,
longest match first, and gets the label that it most often has. Prints span F1 per language of the
chosen split and its means, as `flix evaluate` does.
"""

import argparse
import collections
import re
from collections.abc import Iterable

from flix_jax.data.cells import Cell
from flix_jax.evaluation.metrics import parse_entities, span_f1
from flix_jax.evaluation.scoreboard import Scoreboard
from flix_jax.tasks.xtreme_up import XtremeUp

LONGEST = 8  # words and marks of an entity
_PIECES = re.compile(r"\w+|[^\w\s]")


def gazetteer(targets: Iterable[str]) -> dict[str, str]:
    """Entity -> the label that it most often has in targets of the form `PER: x $$ LOC: y`."""
    labels: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for target in targets:
        for label, entity in parse_entities(target):
            labels[entity][label] += 1
    return {entity: counts.most_common(1)[0][0] for entity, counts in labels.items()}


def predict(labels: dict[str, str], text: str) -> str:
    """The entities of the gazetteer in a text, from left to right, longest match first."""
    pieces = [match.span() for match in _PIECES.finditer(text)]
    found, position = [], 0
    while position < len(pieces):
        for length in range(min(LONGEST, len(pieces) - position), 0, -1):
            candidate = text[pieces[position][0] : pieces[position + length - 1][1]]
            if candidate in labels:
                found.append(f"{labels[candidate]}: {candidate}")
                position += length
                break
        else:
            position += 1
    return " $$ ".join(found)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--held_out", nargs="*", default=(), metavar="LANGUAGE")
    arguments = parser.parse_args()
    source = XtremeUp(arguments.data_dir)
    cells = [cell for cell in source.cells() if cell.task == "ner"]

    def is_seen(cell: Cell) -> bool:
        return cell.language not in arguments.held_out

    labels = gazetteer(
        target for cell in cells if is_seen(cell) for target in source.pairs(cell, "train")[1]
    )
    scores = {}
    for cell in cells:
        inputs, targets = source.pairs(cell, arguments.split)
        scores[cell.name] = span_f1(targets, [predict(labels, text) for text in inputs])
        scores[cell.name]["examples"] = len(inputs)
    groups = {cell.name: "seen" if is_seen(cell) else "unseen_language" for cell in cells}
    print(f"{len(labels):,} entities\n\n{Scoreboard(scores, groups).to_markdown()}")


if __name__ == "__main__":
    main()

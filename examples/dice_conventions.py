"""One model, five numbers that are all called Dice: the means that different conventions take of the same predictions.

    python examples/dice_conventions.py logs/lgg-unetpp/version_1/scores.csv

It reads the ``scores.csv`` that ``test`` writes (``ScoreWriter``), or that ``predict`` writes if the truth is known
(``MaskWriter``): a line for each image and class. It needs Python alone.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def conventions(path: Path) -> dict[str, float]:
    by_mask, foreground, empty_is_one = [], [], []
    volumes: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if not row.get("true_pixels"):
                continue  # not scored: the background, and images without a true mask
            sizes = int(row["predicted_pixels"]) + int(row["true_pixels"])
            dice = float(row["dice"]) if row["dice"] else None  # left out: empty in prediction and truth
            empty_is_one.append(1.0 if dice is None else dice)
            volume = volumes[row.get("patient", ""), row["class"]]
            volume[0] += (dice or 0.0) * sizes  # twice the pixels that both have
            volume[1] += sizes
            if dice is not None:
                by_mask.append(dice)
            if dice is not None and int(row["true_pixels"]):
                foreground.append(dice)
    if not empty_is_one:
        raise SystemExit(f"{path} holds no scores: take that of a test, or predict images whose true masks are known.")
    marked = [volume for volume in volumes.values() if volume[1]]
    return {
        "mean over masks (dice)": mean(by_mask),
        "mean over patients (dice_per_patient)": mean([overlap / sizes for overlap, sizes in marked]),
        "over all pixels together": (
            sum(overlap for overlap, _ in marked) / sum(sizes for _, sizes in marked) if marked else float("nan")
        ),
        "mean over masks with a true structure (dice_foreground)": mean(foreground),
        "mean over masks, two empty ones count as 1 (empty: best)": mean(empty_is_one),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Means of Dice by five conventions.")
    parser.add_argument("scores", type=Path, help="the scores.csv of a test or a prediction")
    for name, value in conventions(parser.parse_args().scores).items():
        print(f"{name:<56} {value:.3f}")


if __name__ == "__main__":
    main()

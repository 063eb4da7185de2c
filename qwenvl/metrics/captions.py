"""Longer texts, by sacrebleu: BLEU-4 and chrF.

CIDEr is left out: it needs the Java tokenizer of coco-caption, or packages that are no longer maintained.
"""

from __future__ import annotations

import numpy as np
from sacrebleu import metrics as sacrebleu

from qwenvl.metrics.base import Case, Metric, Scored

_ORDER = 4


def _bleu(case: Case) -> Scored:
    """Score a sentence by BLEU with effective order, and keep its counts for corpus BLEU."""
    score = sacrebleu.BLEU(effective_order=True).sentence_score(case.prediction.strip(), list(case.expected))
    counts = (*score.counts, *score.totals, score.sys_len, score.ref_len)
    value = 1.0 if _is_rightly_empty(case) else score.score / 100
    return Scored(value, statistics=tuple(map(float, counts)))


def _is_rightly_empty(case: Case) -> bool:
    """Return whether prediction and an expected answer are both empty, as for a blank page; sacrebleu scores that 0."""
    return not case.prediction.strip() and not all(expected.strip() for expected in case.expected)


def _total_bleu(sums: np.ndarray, count: int) -> float:
    """Return BLEU of a corpus (Papineni et al. 2002; 13a tokens and smoothing as sacrebleu's default, Post 2018)."""
    if not count:
        return 0.0
    numbers = [round(value) for value in sums.tolist()]
    score = sacrebleu.BLEU.compute_bleu(numbers[:_ORDER], numbers[_ORDER : 2 * _ORDER], numbers[-2], numbers[-1], "exp")
    return float(score.score) / 100


def _chrf(case: Case) -> Scored:
    if _is_rightly_empty(case):
        return Scored(1.0)
    return Scored(sacrebleu.CHRF().sentence_score(case.prediction.strip(), list(case.expected)).score / 100)


BLEU = Metric("bleu", "BLEU-4", "corpus score (Papineni et al. 2002), by sacrebleu", _bleu, _total_bleu)
CHRF = Metric("chrf", "chrF", "mean of the texts (Popovic 2015), by sacrebleu", _chrf)

"""DSPy's path to the metrics that compare texts; see `programs/evaluation/metrics.py`.

Declared for type checkers; the names are loaded when used (`dspy_paths.py`).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspylite.programs.evaluation.metrics import (
        EM,
        F1,
        HotPotF1,
        answer_exact_match,
        answer_passage_match,
        em_score,
        f1_score,
        hotpot_f1_score,
        normalize_text,
        precision_score,
    )

__all__ = [
    "EM",
    "F1",
    "HotPotF1",
    "answer_exact_match",
    "answer_passage_match",
    "em_score",
    "f1_score",
    "hotpot_f1_score",
    "normalize_text",
    "precision_score",
]

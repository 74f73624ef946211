"""DSPy's path to the metrics that ask a model; see `programs/evaluation/judges.py`.

Declared for type checkers; the names are loaded when used (`dspy_paths.py`).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspylite.programs.evaluation.judges import (
        AnswerCompleteness,
        AnswerGroundedness,
        CompleteAndGrounded,
        DecompositionalSemanticRecallPrecision,
        SemanticF1,
        SemanticRecallPrecision,
    )

__all__ = [
    "AnswerCompleteness",
    "AnswerGroundedness",
    "CompleteAndGrounded",
    "DecompositionalSemanticRecallPrecision",
    "SemanticF1",
    "SemanticRecallPrecision",
]

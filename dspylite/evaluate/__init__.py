"""DSPy's paths to evaluation, such as `from dspylite.evaluate import SemanticF1`.

Nothing is defined here; see `programs/evaluation/`.
Declared for type checkers; the names are loaded when used (`dspy_paths.py`).
"""

from typing import TYPE_CHECKING

from dspylite.evaluate import auto_evaluation as auto_evaluation
from dspylite.evaluate import evaluate as evaluate
from dspylite.evaluate import metrics as metrics

if TYPE_CHECKING:
    from dspylite.programs.evaluation.evaluate import Evaluate
    from dspylite.programs.evaluation.judges import CompleteAndGrounded, SemanticF1
    from dspylite.programs.evaluation.metrics import (
        EM,
        answer_exact_match,
        answer_passage_match,
        normalize_text,
    )
    from dspylite.programs.evaluation.result import EvaluationResult

__all__ = [
    "EM",
    "CompleteAndGrounded",
    "Evaluate",
    "EvaluationResult",
    "SemanticF1",
    "answer_exact_match",
    "answer_passage_match",
    "normalize_text",
]

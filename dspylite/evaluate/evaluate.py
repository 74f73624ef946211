"""DSPy's path to `Evaluate`; see `programs/evaluation/evaluate.py`.

Declared for type checkers; the names are loaded when used (`dspy_paths.py`).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspylite.programs.evaluation.evaluate import Evaluate
    from dspylite.programs.evaluation.result import EvaluationResult

__all__ = ["Evaluate", "EvaluationResult"]

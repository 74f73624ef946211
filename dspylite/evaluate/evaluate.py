"""DSPy's path to `Evaluate`; see `programs/evaluation/evaluate.py`."""

from dspylite.programs.evaluation.evaluate import Evaluate
from dspylite.programs.evaluation.result import EvaluationResult

__all__ = ["Evaluate", "EvaluationResult"]

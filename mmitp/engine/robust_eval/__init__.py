"""Robust evaluation: a config's own test, clean and under attack.

``settings`` names the attack, ``attacker`` puts it between a preprocessor and its model, ``evaluation`` runs the test,
``report`` shows the figures. What is only for classifiers is in ``classification``, only for detectors in
:mod:`mmitp.engine.detector_attack`, which needs mmdet.
"""

from mmitp.engine.robust_eval.attacker import AttackLog, attacked
from mmitp.engine.robust_eval.evaluation import build_test_runner, evaluate, tested_images
from mmitp.engine.robust_eval.report import RobustReport
from mmitp.engine.robust_eval.settings import EvalAttack

__all__ = [
    "AttackLog",
    "EvalAttack",
    "RobustReport",
    "attacked",
    "build_test_runner",
    "evaluate",
    "tested_images",
]

"""Evaluation: :mod:`mmitp.evaluation.kitti_ap` is the core (numpy only), ``mmitp.evaluation.metrics`` the adapters."""

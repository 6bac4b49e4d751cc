# The main job on generated scenes, trained by FastAT besides. `tools/train.py` runs it on data/scenes.
_base_ = ["./centernet_scenes_prune50.py", "../_base_/attacks/fastat_kitti.py"]

custom_hooks = [*_base_.custom_hooks, *_base_.fastat]

"""`tunesmith sweep`: many runs of one run file with other settings, ranked by the held-out loss they end with.

space.py reads `lora.rank=8,16,64` and `train.learning_rate=1e-4..1e-3`; job.py is one training process; study.py starts, stops and
counts them with Optuna's storage beside; result.py ranks what came of it. Needs the `sweep` extra. No torch: each run is a process.
"""

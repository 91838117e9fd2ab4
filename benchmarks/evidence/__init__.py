"""The study of the paper's claim: ``python launch.py --config=configs/evidence.py``."""

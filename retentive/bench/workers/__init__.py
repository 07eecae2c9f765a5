"""The code of the contenders' processes, a module for each kind of contender.

These modules import torch and what they measure; only `ours` imports the rest of this package.
"""

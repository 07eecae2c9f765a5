"""How good a model is: perplexity over context, tasks of lm-eval, recall over distance.

`scores` gives the log-likelihood of tokens; `branches` that of many continuations, what they share
read once and branched from a saved state; `perplexity`, `tasks` (with `harness`, the adaptor that
lm-eval sees) and `recall` are the commands; `results` is their folder, in which a run that was
killed finds what it had finished.
"""

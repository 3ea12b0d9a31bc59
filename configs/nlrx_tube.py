# nlrx_jepa with the newer objective of LLM-JEPA's authors (arXiv 2602.22617), as they released it:
# the steps of a random span of the row point where all its other steps do. No [PRED] and no second
# view, so a step costs what one of λ = 0 does, which is nlrx_baseline.
base = "nlrx_jepa"
objective = "tube"
n_pred = 0
jepa_weight = 0.02  # theirs, from the first step on
jepa_warmup_iters = 0
spread = "none"
spread_weight = 0.0

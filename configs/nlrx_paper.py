# nlrx_jepa as the LLM-JEPA paper trains from scratch: the cosine alone, λ 2, three [PRED]. There an
# answer counts that begins with the target: evaluations log those (prefix) beside the exact ones.
# Its λ = 0 is nlrx_baseline.
base = "nlrx_jepa"
jepa_weight = 2.0
n_pred = 3
jepa_warmup_iters = 0
spread = "none"
spread_weight = 0.0
eval_answers = 512

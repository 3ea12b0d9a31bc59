# debug without JEPA: the plain language model on the same seed, data order and code path.
base = "debug"
jepa_weight = 0.0

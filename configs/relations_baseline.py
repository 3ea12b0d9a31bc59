# relations without JEPA: the plain language model on the same seed, data order and code path.
base = "relations"
jepa_weight = 0.0  # switches the spread term off as well

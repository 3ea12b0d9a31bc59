# smollm2_jepa without JEPA: the plain fine-tuning on the same seed, data order and code path.
base = "smollm2_jepa"
jepa_weight = 0.0  # switches the spread term off as well

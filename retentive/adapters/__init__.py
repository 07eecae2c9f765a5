"""What a model learns beside its weights: LoRA's matrices, or the states that texts begin with.

An adapter is a folder of its own, tied to its model by the model's fingerprint. `lora` and
`initial_state` are the two kinds, `loading` opens a model with an adapter of either, `command`
merges one.
"""

"""Other people's RetNet checkpoints: opened, converted, and written back.

`source` finds and reads files, `dialects` says what their names mean, `plan` checks that everything
fits, `conversion` and `loading` do it tensor by tensor.
"""

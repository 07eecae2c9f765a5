"""Text to batches: corpora -> a tokenizer -> token shards on disk -> the batch of a step.

`corpus` reads documents from files; `tokenizer` trains or loads a `tokenizers.Tokenizer`;
`dataset` splits documents into train and validation and writes their tokens once, cached by content
(`cache`); `batches` says which tokens step s trains on. Nothing here knows of models or holds a
corpus in memory: documents stream in, shards are memory-mapped.
"""

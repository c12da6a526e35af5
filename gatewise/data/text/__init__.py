"""Token data for language models: corpora, tokenizers, associative recall."""

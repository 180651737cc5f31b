"""Data: raw documents to tokenised ones, to packed rows, to batches; and packed data sets on disk."""

"""Context parallelism: packed rows shared out over ranks, with attention across them where a document is split."""

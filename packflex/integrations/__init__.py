"""Where packflex meets other frameworks: transformers models and Lightning."""

"""Drop-ins: the methods on a user's own diffusers pipelines and transformers models."""

"""Boards that npulab describes but does not compile for: what their vendors publish, as rules for models."""
